"""Packs texts for text generation: joins them, and cuts them into blocks of the model's length.

No token is lost: a text that is longer than a block continues in the next one, and the last block
of a split, which is shorter than the others, stays. Otherwise this is what run_clm.py of
transformers does.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tuner.config.data_options import SplitOptions
from tuner.core.input_spec import TextInputSpec
from tuner.errors import SpaceError
from tuner.files.atomic import atomic_folder, disk_errors
from tuner.files.cache_entries import make_space, open_or_create
from tuner.preprocessing.splits import TEST, VALID, Items, assign_fold
from tuner.preprocessing.tensor_files import TensorWriter, map_tensors
from tuner.preprocessing.tokenization import (
    TEXTS_PER_CHUNK,
    EncodedTexts,
    decode_texts,
    encodable_texts,
    load_tokenizer,
    store_key,
    token_counts,
)

FORMAT_VERSION = 1  # of the stored files; another number is another store
BLOCKS_PER_CHUNK = 4096  # blocks written at once


def check_packing(task: str, second: str | None = None) -> None:
    """Raise SpaceError where `data.pack: true` has no meaning.

    Args:
        task: the name of the task.
        second: the column of second texts, if any.
    """
    if task != "text_generation":
        raise SpaceError(
            f"data.pack: true joins texts, and then a label belongs to none of them; the task is "
            f"{task}, and texts are packed for text_generation alone; leave the key out"
        )
    if second is not None:
        raise SpaceError(
            "data.pack: true joins single texts, but data.second names a column of second texts; "
            "leave one of the two keys out"
        )


@dataclass(frozen=True)
class BlockTexts(Sequence[str]):
    """The text of each block, decoded when it is asked for."""

    encoded: EncodedTexts
    input_spec: TextInputSpec

    def __len__(self) -> int:
        return len(self.encoded.lengths)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        ids = self.encoded.tensors["input_ids"][index : index + 1]
        return decode_texts(self.input_spec, {"input_ids": ids})[0]


def number_streams(items: Items, options: SplitOptions) -> NDArray[np.int64]:
    """Which texts are packed together: int64 (n,), the number of the stream of each text.

    A stream is a split, or with folds a fold or the test split. So no block has texts of two
    splits, and the blocks are the same whichever fold validates.

    Args:
        items: texts that have their splits.
        options: the options that they were split by.
    """
    if options.folds == 1 or (items.split == TEST).all():
        return items.split
    streams = np.full(len(items.split), options.folds, np.int64)
    for fold in range(options.folds):
        assigned = assign_fold(items, options.model_copy(update={"fold": fold}))
        streams[assigned.split == VALID] = fold
    return streams


def open_packed_store(
    home: Path,
    input_spec: TextInputSpec,
    texts: Sequence[str],
    items: Items,
    streams: NDArray[np.int64],
) -> tuple[EncodedTexts, Items]:
    """Pack texts, or take the blocks from the cache.

    Args:
        home: the folder with the caches.
        input_spec: the tokenizer and the length of a block.
        texts: the texts, each with its end-of-text token.
        items: the items of the texts, with their splits.
        streams: int64 (n,), which texts are packed together; those of one stream are in one split.

    Returns:
        The blocks, and their items.
    """
    content = f"{FORMAT_VERSION} {store_key(input_spec, texts, None)}\n".encode()
    key = hashlib.sha256(content + streams.tobytes()).hexdigest()[:32] + "-packed"
    folder = home / "tokens" / key
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        entry = open_or_create(folder, lambda: _build_store(folder, input_spec, texts, streams))
        block_counts = json.loads((folder / "note.json").read_text())["blocks"]
    tensors = map_tensors(entry, sum(block_counts))
    encoded = EncodedTexts(entry, tensors, token_counts(tensors["attention_mask"]), 0, key)
    split_of_stream = np.zeros(len(block_counts), np.int64)
    split_of_stream[streams] = items.split
    blocks = Items(
        BlockTexts(encoded, input_spec),
        np.zeros(sum(block_counts), np.int64),
        items.strata,
        np.repeat(split_of_stream, block_counts),
        output_names=items.output_names,
    )
    return encoded, blocks


def _build_store(
    folder: Path, input_spec: TextInputSpec, texts: Sequence[str], streams: NDArray[np.int64]
) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    ids = [
        _encode_whole(input_spec, [texts[int(i)] for i in np.flatnonzero(streams == stream)])
        for stream in range(int(streams.max()) + 1)
    ]
    block_counts = [-(-len(stream) // input_spec.length) for stream in ids]
    byte_count = 4 * len(input_spec.input_names) * sum(block_counts) * input_spec.length
    make_space(folder.parent, byte_count)
    with atomic_folder(folder, byte_count, "tokens") as temporary:
        writer = TensorWriter(temporary)
        for stream in ids:
            for chunk in _cut_into_blocks(input_spec, stream):
                writer.append(chunk)
        (temporary / "note.json").write_text(json.dumps({"blocks": block_counts}))
        writer.close()


def _encode_whole(input_spec: TextInputSpec, texts: Sequence[str]) -> NDArray[np.int32]:
    """The ids of all tokens of all texts, one text after another."""
    tokenizer = load_tokenizer(input_spec.tokenizer_folder)
    chunks = [np.zeros(0, np.int32)]
    for start in range(0, len(texts), TEXTS_PER_CHUNK):
        chunk = encodable_texts(texts[start : start + TEXTS_PER_CHUNK])
        encoded = tokenizer(chunk, verbose=False)
        chunks += [np.array(ids, np.int32) for ids in encoded["input_ids"]]
    return np.concatenate(chunks)


def _cut_into_blocks(
    input_spec: TextInputSpec, ids: NDArray[np.int32]
) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of consecutive blocks, int32 (blocks, length); the last one is padded."""
    length = input_spec.length
    padding = load_tokenizer(input_spec.tokenizer_folder).pad_token_id
    for start in range(0, len(ids), BLOCKS_PER_CHUNK * length):
        part = torch.from_numpy(ids[start : start + BLOCKS_PER_CHUNK * length].copy())
        blocks = -(-len(part) // length)
        values = {"input_ids": torch.full((blocks * length,), padding, dtype=torch.int32)}
        values["input_ids"][: len(part)] = part
        values["attention_mask"] = torch.zeros(blocks * length, dtype=torch.int32)
        values["attention_mask"][: len(part)] = 1
        zeros = torch.zeros(blocks * length, dtype=torch.int32)  # of the first text of a pair
        yield {
            name: values.get(name, zeros).view(blocks, length) for name in input_spec.input_names
        }
