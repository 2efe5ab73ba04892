"""Encodes texts as token ids by the model's own tokenizer (extra `text`), and stores them.

Texts are encoded once; later runs map the files.
"""

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
from tuner.preprocessing.ragged_tensors import padded_width
from tuner.preprocessing.tensor_files import TensorWriter, map_tensors

FORMAT_VERSION = 1  # of the stored files; another number is another store
TOKEN_STARTS = "token_starts"  # a stored tensor that is no input of a model
TEXTS_PER_CHUNK = 1024  # texts encoded at once


def without_transformers() -> SpaceError:
    """The error to raise if the package transformers is not installed."""
    return SpaceError(
        f"model.name: models of texts need the package transformers: {pip_install('text')}"
    )


def encode_texts(
    input_spec: TextInputSpec, texts: Sequence[str], second_texts: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Encode texts: each tensor int64 (n, length), cut and padded on the right.

    Args:
        input_spec: the tokenizer and the length.
        texts: the texts.
        second_texts: the second text of each pair, if the examples are pairs.
    """
    tensors, _ = _encode_int32(input_spec, texts, second_texts)
    return {name: tensor.to(torch.int64) for name, tensor in tensors.items()}


def encodable_texts(texts: Sequence[str]) -> list[str]:
    """The texts as UTF-8 can hold them: half a character, which a cut in JSON's escapes leaves, is
    a question mark. Each has as many characters as before.
    """
    return [text.encode(errors="replace").decode() for text in texts]


def _encode_int32(
    input_spec: TextInputSpec, texts: Sequence[str], second_texts: Sequence[str] | None
) -> tuple[dict[str, Tensor], int]:
    """The tensors as int32 (n, length), and how many texts were cut."""
    encoded = load_tokenizer(input_spec.tokenizer_folder)(
        encodable_texts(texts),
        encodable_texts(second_texts) if second_texts else None,
        padding="max_length",
        truncation=True,
        max_length=input_spec.length,
        return_token_type_ids="token_type_ids" in input_spec.input_names,
    )
    tensors = {
        name: torch.tensor(encoded[name], dtype=torch.int32).view(len(texts), input_spec.length)
        for name in input_spec.input_names
    }
    return tensors, sum(bool(encoding.overflowing) for encoding in encoded.encodings)


def locate_tokens(input_spec: TextInputSpec, texts: Sequence[str]) -> Tensor:
    """Where each token of each text begins: int32 (n, length), the index of its first character
    that is no space; -1 for padding and for tokens that no characters belong to, such as [CLS].
    """
    encoded = load_tokenizer(input_spec.tokenizer_folder)(
        encodable_texts(texts), padding="max_length", truncation=True, max_length=input_spec.length
    )
    starts = torch.full((len(texts), input_spec.length), -1, dtype=torch.int32)
    for row, text, encoding in zip(starts, texts, encoded.encodings, strict=True):
        for position, (begin, end) in enumerate(encoding.offsets):
            characters = text[begin:end]
            visible = characters.lstrip()
            if visible:
                row[position] = end - len(visible)
    return starts


def load_tokenizer(folder: str) -> Any:
    """The tokenizer in a folder. Code in the folder is never run.

    It pads on the right, with the end-of-text token if it has no padding token.

    Raises:
        SpaceError: the package transformers is not installed.
        DataError: the folder has no tokenizer that can be read.
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
    """`state` identifies the files, so that changed files in the folder are read again."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise without_transformers() from None
    try:
        with silence_transformers():
            tokenizer = AutoTokenizer.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                use_fast=True,
                padding_side="right",
            )
    # for a broken file transformers and its Rust library raise exceptions of any class
    except Exception as error:
        raise DataError(
            f"model.folder: {folder}: its tokenizer cannot be read ({_first_line(error)}); "
            "it needs a whole tokenizer.json"
        ) from None
    if not tokenizer.is_fast:
        raise DataError(
            f"model.folder: {folder}: it has no tokenizer.json; "
            "save the tokenizer anew with save_pretrained, which writes one"
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise DataError(
                f"model.folder: {folder}: its tokenizer has neither a padding nor an end token; "
                "name one in tokenizer_config.json"
            )
        # as is usual with GPT-2, which has no padding token; the attention mask tells them apart
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


@contextlib.contextmanager
def silence_transformers() -> Iterator[None]:
    """Silence the log and the progress bars of transformers, in the whole process.

    Problems are reported by exceptions.
    """
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
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
    """The texts with the end-of-text token after each, so that a model learns where texts end.

    The texts stay as they are if the tokenizer appends this token itself, or has none.
    """
    tokenizer = load_tokenizer(input_spec.tokenizer_folder)
    if tokenizer.eos_token is None or tokenizer("x").input_ids[-1] == tokenizer.eos_token_id:
        return list(texts)
    return [f"{text}{tokenizer.eos_token}" for text in texts]


def decode_texts(input_spec: InputSpec, x: TensorTree) -> list[str]:
    """The texts of encoded examples, as the tokenizer decodes them: cut, perhaps in lower case."""
    assert isinstance(input_spec, TextInputSpec) and isinstance(x, dict)
    texts: list[str] = load_tokenizer(input_spec.tokenizer_folder).batch_decode(
        x["input_ids"], skip_special_tokens=True
    )
    return texts


def token_counts(attention_mask: Tensor) -> Tensor:
    """The number of tokens of each text, int64 (n,)."""
    return attention_mask.sum(1, dtype=torch.int64)


def trim_padding(x: TensorTree) -> TensorTree:
    """A batch without the columns in which every text is padded: equal results, less computation.

    A batch without an attention mask stays as it is. Every tensor whose second dimension is the
    length is cut, so token ids and the activations of later stages are treated alike. A batch on a
    GPU stays as it is too: it was cut before it was sent there, and to look would make the CPU
    wait.
    """
    if not isinstance(x, dict) or "attention_mask" not in x or x["attention_mask"].is_cuda:
        return x
    return cut_padding(x)


def cut_padding(x: dict[str, Tensor]) -> dict[str, Tensor]:
    """As `trim_padding`, on a GPU too. The CPU waits for the length of the longest text."""
    mask = x["attention_mask"]
    keep = padded_width(int(token_counts(mask).max()), mask.shape[1])
    if keep == mask.shape[1]:
        return x
    return {
        name: value[:, :keep] if value.dim() > 1 and value.shape[1] == mask.shape[1] else value
        for name, value in x.items()
    }


@dataclass(frozen=True)
class EncodedTexts:
    """Encoded texts.

    Args:
        entry: the cache entry. Keep it as long as the tensors are used, so that it is not evicted.
        tensors: int32 (n, length) each, by the name of the model's input, mapped from files.
        lengths: int64 (n,), the number of tokens of each text.
        truncated_count: how many texts were longer than the length.
        digest: names the texts and the tokenizer.
        token_starts: int32 (n, length), as `locate_tokens` gives them; None: they were not asked
            for.
    """

    entry: PinnedEntry
    tensors: dict[str, Tensor]
    lengths: Tensor
    truncated_count: int
    digest: str
    token_starts: Tensor | None = None


def open_token_store(
    home: Path,
    input_spec: TextInputSpec,
    texts: Sequence[str],
    second_texts: Sequence[str] | None,
    *,
    locate: bool = False,
) -> EncodedTexts:
    """Encode texts, or take them from the cache if the same tokenizer encoded them before.

    With `locate` the place of each token in its text is kept too.
    """
    key = store_key(input_spec, texts, second_texts) + (f"-{TOKEN_STARTS}" if locate else "")
    folder = home / "tokens" / key
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        entry = open_or_create(
            folder, lambda: _build_store(folder, input_spec, texts, second_texts, locate)
        )
        note = json.loads((folder / "note.json").read_text())
    tensors = map_tensors(entry, len(texts))
    starts = tensors.pop(TOKEN_STARTS, None)
    lengths = token_counts(tensors["attention_mask"])
    return EncodedTexts(entry, tensors, lengths, note["cut"], key, starts)


def store_key(input_spec: TextInputSpec, texts: Sequence[str], second: Sequence[str] | None) -> str:
    """The name of a store: by the tokenizer's files, the length and the texts themselves."""
    digest = hashlib.sha256(
        f"{FORMAT_VERSION} {input_spec.length} {input_spec.input_names}\n".encode()
    )
    for name, path in input_spec.export_files().items():
        if path.name != "config.json":  # the model's
            digest.update(f"{name} {file_sha256(path)}\n".encode())
    for column in (texts, second or ()):
        for text in column:
            data = text.encode(errors="surrogatepass")
            digest.update(f"{len(data)} ".encode() + data)
        digest.update(b"\n")
    return digest.hexdigest()[:32]


def _build_store(
    folder: Path,
    input_spec: TextInputSpec,
    texts: Sequence[str],
    second: Sequence[str] | None,
    locate: bool,
) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    truncated_count = 0
    tensor_count = len(input_spec.input_names) + locate
    byte_count = 4 * tensor_count * len(texts) * input_spec.length
    make_space(folder.parent, byte_count)
    with atomic_folder(folder, byte_count, "tokens") as temporary:
        writer = TensorWriter(temporary)
        for start in range(0, len(texts), TEXTS_PER_CHUNK):
            chunk = slice(start, start + TEXTS_PER_CHUNK)
            tensors, chunk_truncated_count = _encode_int32(
                input_spec, texts[chunk], second[chunk] if second else None
            )
            if locate:
                tensors[TOKEN_STARTS] = locate_tokens(input_spec, texts[chunk])
            writer.append(tensors)
            truncated_count += chunk_truncated_count
        (temporary / "note.json").write_text(json.dumps({"cut": truncated_count}))
        writer.close()


@dataclass(frozen=True)
class TextSource:
    """Some rows of encoded texts as a `Source`.

    `take` gives x as int64 (n, length) per input, and y as `Labels` has them, or int64 (n,), the
    number of tokens, if there are no labels.
    """

    encoded: EncodedTexts
    labels: TensorTree
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
            {name: values[rows].to(torch.int64) for name, values in self.encoded.tensors.items()},
            self._labels_at(rows),
        )

    def take_targets(self, index: Tensor) -> TensorTree:
        return self._labels_at(self.rows[index])

    def _labels_at(self, rows: Tensor) -> TensorTree:
        if isinstance(self.labels, Tensor):
            return self.labels[rows]
        return {name: tensor[rows] for name, tensor in self.labels.items()}
