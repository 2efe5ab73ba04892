"""Texts as token ids, by the tokenizer that a model came with (extra `text`): encoded once and kept in memory-mapped files."""

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tuner.config.requirements import pip_install
from tuner.core.input_spec import InputSpec, TensorTree, TextInputSpec
from tuner.core.types import Batch
from tuner.errors import DataError, SpaceError
from tuner.files.atomic import atomic_folder, disk_errors, file_sha256
from tuner.files.cache_entries import PinnedEntry, make_space, open_or_create
from tuner.preprocessing.tensor_files import TensorWriter, map_tensors

FORMAT_VERSION = 1  # of the stored files; another number is another store
TEXTS_PER_CHUNK = 1024  # texts encoded at once
LENGTH_MULTIPLE = 8  # batches are cut to a multiple of so many tokens, so that few shapes occur


def without_transformers() -> SpaceError:
    return SpaceError(
        f"model.name: models of texts need the package transformers: {pip_install('text')}"
    )


def encode_texts(
    input_spec: TextInputSpec, texts: Sequence[str], second_texts: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Each leaf int64 (n, wanted.length), cut and padded on the right; with `second`, pairs of texts."""
    found, _ = _encode_int32(input_spec, texts, second_texts)
    return {name: leaf.to(torch.int64) for name, leaf in found.items()}


def _encode_int32(
    input_spec: TextInputSpec, texts: Sequence[str], second: Sequence[str] | None
) -> tuple[dict[str, Tensor], int]:
    """The leaves as int32, and how many texts were cut."""
    found = load_tokenizer(input_spec.tokenizer_folder)(
        list(texts),
        list(second) if second else None,
        padding="max_length",
        truncation=True,
        max_length=input_spec.length,
        return_token_type_ids="token_type_ids" in input_spec.input_names,
    )
    leaves = {
        name: torch.tensor(found[name], dtype=torch.int32).view(len(texts), input_spec.length)
        for name in input_spec.input_names
    }
    return leaves, sum(bool(one.overflowing) for one in found.encodings)


def load_tokenizer(folder: str) -> Any:
    """The tokenizer in a folder, never run from code that lies there. It pads on the right, with the end of text where it has no padding.

    Raises SpaceError where transformers is not installed, DataError where the folder holds no tokenizer that can be read.
    """
    files = (
        [path.stat() for path in TextInputSpec(folder, 0).export_files().values()]
        if Path(folder).is_dir()
        else []
    )
    return _read_tokenizer(
        str(Path(folder).absolute()),
        tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in files),
    )


@functools.lru_cache(maxsize=4)
def _read_tokenizer(folder: str, state: tuple[tuple[int, ...], ...]) -> Any:
    """`state` is that of the folder's files: others in the same place are another tokenizer."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise without_transformers() from None
    try:
        with silence_transformers():
            found = AutoTokenizer.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                use_fast=True,
                padding_side="right",
            )
    except (
        Exception
    ) as error:  # the package and the Rust below it raise whatever a broken file leads them to
        raise DataError(
            f"model.folder: {folder}: its tokenizer cannot be read ({_first_line(error)}); it needs a whole tokenizer.json"
        ) from None
    if not found.is_fast:
        raise DataError(
            f"model.folder: {folder}: it has no tokenizer.json; save the tokenizer anew with save_pretrained, which writes one"
        )
    if found.pad_token_id is None:
        if found.eos_token_id is None:
            raise DataError(
                f"model.folder: {folder}: its tokenizer has neither a padding nor an end token; name one in tokenizer_config.json"
            )
        found.pad_token = (
            found.eos_token
        )  # as is usual with GPT-2, which came without; the attention mask tells them apart
    return found


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"


@contextlib.contextmanager
def silence_transformers() -> Iterator[None]:
    """Without the log and the progress bars of transformers; what is wrong is said by exceptions. For the whole process."""
    from transformers.utils import logging as found

    logging: Any = found
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def append_eos(input_spec: TextInputSpec, texts: Sequence[str]) -> list[str]:
    """The texts with the tokenizer's end after each, so that a model learns where texts end; as they are where it sets one itself."""
    words = load_tokenizer(input_spec.tokenizer_folder)
    if words.eos_token is None or words("x").input_ids[-1] == words.eos_token_id:
        return list(texts)
    return [f"{text}{words.eos_token}" for text in texts]


def decode_texts(input_spec: InputSpec, x: TensorTree) -> list[str]:
    """The texts that a source's examples were made of, as their tokenizer puts them together again: cut, and perhaps in lower case."""
    assert isinstance(input_spec, TextInputSpec) and isinstance(x, dict)
    texts: list[str] = load_tokenizer(input_spec.tokenizer_folder).batch_decode(
        x["input_ids"], skip_special_tokens=True
    )
    return texts


def token_counts(attention_mask: Tensor) -> Tensor:
    """The tokens of each text, int64 (n,)."""
    return attention_mask.sum(1, dtype=torch.int64)


def trim_padding(x: TensorTree) -> TensorTree:
    """A batch without the columns in which every text is padded: equal, sooner. What has no attention mask stays as it is.

    Every leaf whose second dimension is the length is cut, so it is all one whether token ids flow or what blocks made of them.
    """
    if not isinstance(x, dict) or "attention_mask" not in x:
        return x
    mask = x["attention_mask"]
    longest = max(1, int(token_counts(mask).max()))
    keep = min(mask.shape[1], -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE)
    if keep == mask.shape[1]:
        return x
    return {
        name: leaf[:, :keep] if leaf.dim() > 1 and leaf.shape[1] == mask.shape[1] else leaf
        for name, leaf in x.items()
    }


@dataclass(frozen=True)
class EncodedTexts:
    """`leaves`: int32 (n, length) each, mapped from files; `lengths`: int64 (n,); `cut`: how many texts were longer than the length."""

    entry: PinnedEntry
    tensors: dict[str, Tensor]
    lengths: Tensor
    truncated_count: int
    digest: str


def open_token_store(
    home: Path, input_spec: TextInputSpec, texts: Sequence[str], second_texts: Sequence[str] | None
) -> EncodedTexts:
    """The texts encoded, from the cache where the same texts were encoded by the same tokenizer before."""
    key = _store_key(input_spec, texts, second_texts)
    folder = home / "tokens" / key
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        held = open_or_create(folder, lambda: _build_store(folder, input_spec, texts, second_texts))
        note = json.loads((folder / "note.json").read_text())
    leaves = map_tensors(held, len(texts))
    return EncodedTexts(held, leaves, token_counts(leaves["attention_mask"]), note["cut"], key)


def _store_key(
    input_spec: TextInputSpec, texts: Sequence[str], second: Sequence[str] | None
) -> str:
    """Names a store by the tokenizer's files, the length and the texts themselves."""
    seen = hashlib.sha256(
        f"{FORMAT_VERSION} {input_spec.length} {input_spec.input_names}\n".encode()
    )
    for name, path in input_spec.export_files().items():
        if path.name != "config.json":  # the model's
            seen.update(f"{name} {file_sha256(path)}\n".encode())
    for column in (texts, second or ()):
        for text in column:
            data = text.encode(errors="surrogatepass")
            seen.update(f"{len(data)} ".encode() + data)
        seen.update(b"\n")
    return seen.hexdigest()[:32]


def _build_store(
    folder: Path, input_spec: TextInputSpec, texts: Sequence[str], second: Sequence[str] | None
) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    cut, need = 0, 4 * len(input_spec.input_names) * len(texts) * input_spec.length
    make_space(folder.parent, need)
    with atomic_folder(folder, need, "tokens") as temporary:
        writer = TensorWriter(temporary)
        for start in range(0, len(texts), TEXTS_PER_CHUNK):
            chunk = slice(start, start + TEXTS_PER_CHUNK)
            leaves, more = _encode_int32(
                input_spec, texts[chunk], second[chunk] if second else None
            )
            writer.append(leaves)
            cut += more
        (temporary / "note.json").write_text(json.dumps({"cut": cut}))
        writer.close()


@dataclass(frozen=True)
class TextSource:
    """Rows of a store as a Source: x int64 (n, length) each leaf; y int64 (n,), a class, or the number of tokens where there are none."""

    encoded: EncodedTexts
    labels: Tensor
    rows: Tensor
    digest: str
    views: int | None = 1

    @property
    def lengths(self) -> Tensor:
        return self.encoded.lengths[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: Tensor, view: int) -> Batch:
        rows = self.rows[index]
        return Batch(
            {name: leaf[rows].to(torch.int64) for name, leaf in self.encoded.tensors.items()},
            self.labels[rows],
        )
