"""What a large set of images costs at each start: listing, checking, duplicates, memory; and streaming.

    python benchmarks/large_sets.py 100000 --scratch /tmp/large_sets [--size 64]

It writes so many synthetic JPEGs of 224 x 224 pixels in ten folders of classes, unless they are there, and then reads them as
`data: folder` does, each time in a process of its own: first start, second start, and as if the disk had no space for the decoded
images. Last it says how much of decoding an image holds Python's lock, which bounds what threads reach together. Seconds are of the wall clock and of the CPU; on a machine that does other work too, the CPU's are those to compare.
"""

import argparse
import cProfile
import json
import pstats
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = 10
SIDE = 224  # pixels of the files
STREAMED_BATCHES = 8
DECODED = 512  # images of which the share without Python's lock is measured
# Pillow's C functions that give the lock away
UNLOCKED = ("'decode' of 'ImagingDecoder'", "'resize' of 'ImagingCore'")


def write_images(root: Path, count: int) -> None:
    """JPEGs of smooth noise, about 7 KB each, no two of which are equal."""
    rng = np.random.default_rng(0)
    for number in range(CLASSES):
        (root / f"class{number}").mkdir(parents=True, exist_ok=True)
    for i in range(count):
        path = root / f"class{i % CLASSES}" / f"{i:06d}.jpg"
        values = rng.integers(0, 255, (7, 7, 3), dtype=np.uint8)
        if not path.exists():
            Image.fromarray(values).resize((SIDE, SIDE), Image.Resampling.BILINEAR).save(
                path, quality=80
            )


def read(root: Path, home: Path, size: int, streamed: bool) -> dict[str, float]:
    """One start: its seconds and the memory of the process afterwards; for `streamed` also images a second."""
    import torch

    from tuner.config.data_options import ImageOptions
    from tuner.core.input_spec import ImageInputSpec
    from tuner.data import folder
    from tuner.preprocessing import image_store

    if streamed:
        image_store.fits_disk = lambda folder, byte_count: False
    spec = ImageInputSpec(size, round(size * 256 / 224), "bilinear", (0.5,) * 3, (0.5,) * 3)
    wall, cpu = time.perf_counter(), time.process_time()
    dataset = folder.load(home, spec, "classification", path=str(root), image=ImageOptions())
    result = {
        "images": len(dataset.full) + len(dataset.test),
        "wall seconds": time.perf_counter() - wall,
        "CPU seconds": time.process_time() - cpu,
        "resident MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    if streamed:
        wall, cpu = time.perf_counter(), time.process_time()
        for index in torch.randperm(len(dataset.train))[: 64 * STREAMED_BATCHES].split(64):
            dataset.train.take(index, 0)
        result["CPU ms an image"] = (time.process_time() - cpu) * 1000 / (64 * STREAMED_BATCHES)
        result["images a wall second"] = 64 * STREAMED_BATCHES / (time.perf_counter() - wall)
    return result


def measure_lock(root: Path, size: int) -> dict[str, float]:
    """Milliseconds of CPU for an image, and how many of them hold Python's lock at most: the profiler's own time is in these."""
    from tuner.core.input_spec import ImageInputSpec
    from tuner.preprocessing.image_decoding import decode

    spec = ImageInputSpec(size, round(size * 256 / 224), "bilinear", (0.5,) * 3, (0.5,) * 3)
    files = sorted(root.rglob("*.jpg"))[:DECODED]
    for _ in range(2):  # the first time Pillow loads its formats
        start = time.thread_time()
        for file in files:
            decode(file, spec)
        total = time.thread_time() - start
    profile = cProfile.Profile(time.thread_time)
    with profile:
        for file in files:
            decode(file, spec)
    rows = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    unlocked = sum(row[2] for (_, _, name), row in rows.items() if any(u in name for u in UNLOCKED))
    milliseconds = 1000 / len(files)
    return {
        "CPU ms an image": total * milliseconds,
        "with the lock": (total - unlocked) * milliseconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("count", type=int)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--size", type=int, default=SIDE, help="side of the decoded images, pixels")
    parser.add_argument(
        "--read", choices=("stored", "streamed", "lock"), help="one start in this process"
    )
    arguments = parser.parse_args()
    root = arguments.scratch / f"images-{arguments.count}"
    if arguments.read:
        home = arguments.scratch / f"home-{arguments.count}-{arguments.size}-{arguments.read}"
        result = (
            measure_lock(root, arguments.size)
            if arguments.read == "lock"
            else read(root, home, arguments.size, arguments.read == "streamed")
        )
        print(json.dumps({name: round(value, 2) for name, value in result.items()}))
        return
    write_images(root, arguments.count)
    starts = [
        (f"{kind}, {start} start", kind)
        for kind in ("stored", "streamed")
        for start in ("first", "second")
    ]
    for label, kind in [*starts, ("decoding", "lock")]:
        print(label, run(arguments, kind), flush=True)


def run(arguments: argparse.Namespace, kind: str) -> str:
    """One start in a process of its own."""
    command = [sys.executable, __file__, str(arguments.count), "--scratch", str(arguments.scratch)]
    command += ["--size", str(arguments.size), "--read", kind]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
