"""Measures what the activations of a frozen prefix cost: to compute, to read and to store."""

import hashlib
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tuner.core.input_spec import tree_to_dict
from tuner.files.atomic import write_note
from tuner.preprocessing.ragged_tensors import LENGTH_MULTIPLE, make_offsets
from tuner.preprocessing.resident_tensors import fits
from tuner.preprocessing.tensor_files import StoredExamples
from tuner.training.cache_filling import PrefixPass, StageTensors, compute_in_chunks
from tuner.training.frozen_prefix import UncachedSource

TIMED_EXAMPLES = 32  # examples on which computing and reading are timed
TIMED_TEXTS_AT_ONCE = 8  # few, so that texts of like length share a batch, as in training


def measure_costs(uncached: UncachedSource, folder: Path) -> dict[str, float]:
    """What one example costs through a prefix.

    It is measured once for a machine on a random sample and written to `folder`, because trials
    that are repeated must make the same choice between reading and computing.

    Returns:
        `computing` and `reading`: seconds to compute it, and to read it from where it would lie:
        the memory of the GPU if the activations of all examples fit there, else the memory of the
        CPU. `bytes`: the size of its activations.
    """
    path = folder / f"{_cost_key(uncached)}.cost.json"
    try:
        known = json.loads(path.read_text())
        return {key: float(known[key]) for key in ("computing", "reading", "bytes")}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass
    costs = _measure(uncached)
    write_note(path, costs)
    return costs


def _cost_key(uncached: UncachedSource) -> str:
    """Names the machine, the stages, the shape of an example, and about how long texts are."""
    first_example = tree_to_dict(uncached.source.take(torch.tensor([0]), 0).x)
    shapes = [tuple(tensor.shape) for tensor in first_example.values()]
    machine = describe_machine(uncached.prefix.device)
    content = f"3 {machine} {uncached.prefix.stage_digests[-1]} {shapes}"
    if uncached.lengths is not None:
        content += f" {math.ceil(float(uncached.lengths.float().mean()) / LENGTH_MULTIPLE)}"
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _measure(uncached: UncachedSource) -> dict[str, float]:
    """The costs of an example, as the mean over a sample."""
    prefix, prefix_pass = uncached.prefix, PrefixPass(uncached, 0)
    depth = len(prefix.stages)
    sample = torch.randperm(len(uncached), generator=torch.Generator().manual_seed(0))
    sample = sample[:TIMED_EXAMPLES]
    at_once = prefix.max_batch
    if uncached.lengths is not None:
        sample = sample[uncached.lengths[sample].argsort(descending=True)]
        at_once = min(at_once, TIMED_TEXTS_AT_ONCE)

    def compute(index: Tensor) -> tuple[float, StageTensors, Tensor | None]:
        inputs = prefix_pass.take(index)
        seconds, x = _time_call(lambda: prefix.compute(inputs.x), prefix.device)
        return seconds, prefix_pass.to_stored(depth, x, inputs.counts), inputs.counts

    chunks = list(compute_in_chunks(sample, at_once, compute))
    stored = _join_chunks([(tensors, counts) for _, tensors, counts in chunks])
    byte_count = sum(tensor.nbytes for tensor in stored.tensors.values())
    if fits(byte_count * len(uncached) * (uncached.views or 1) // len(sample), prefix.device):
        on_device = {name: tensor.to(prefix.device) for name, tensor in stored.tensors.items()}
        stored = replace(stored, tensors=on_device)
    index = (
        torch.arange(len(sample)) if uncached.lengths is not None else torch.randperm(len(sample))
    )
    reading, _ = _time_call(
        lambda: [stored.take(part, prefix.device) for part in torch.split(index, at_once)],
        prefix.device,
    )
    totals = {
        "computing": sum(seconds for seconds, _, _ in chunks),
        "reading": reading,
        "bytes": float(byte_count),
    }
    return {key: value / len(sample) for key, value in totals.items()}


def describe_machine(device: torch.device) -> str:
    """What computes and reads: machines of equal description are equally fast."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):  # no Linux, or a processor without a name
        model = platform.processor()
    return f"{device.type} {platform.machine()} {model}"


def _join_chunks(chunks: Sequence[tuple[StageTensors, Tensor | None]]) -> StoredExamples:
    """The outputs of all chunks as the examples of one entry, on the CPU."""
    first = chunks[0][0]
    tensors = {
        name: torch.cat([stored.tensors[name] for stored, _ in chunks]) for name in first.tensors
    }
    counts = [counts for stored, counts in chunks if counts is not None and stored.widths]
    return StoredExamples(tensors, first.widths, offsets=make_offsets(counts) if counts else None)


def _time_call(function: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """The seconds of the shortest of three calls, and the result of the last."""
    shortest, result = math.inf, None
    for _ in range(3):
        start = time.perf_counter()
        result = function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()
        shortest = min(shortest, time.perf_counter() - start)
    return shortest, result
