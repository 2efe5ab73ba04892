"""The winner: retrained on all it may learn from, tested once, exported, each export read back and compared, then published."""

import json
import math
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tuner
from tuner import plugins
from tuner.building import build, load
from tuner.core import Data, Normalised
from tuner.devices import place
from tuner.errors import ExportMismatch, NoUsableTrial
from tuner.files import disk_errors, fsync, sha256
from tuner.manifest import MANIFEST, Published, model_card, read
from tuner.orders import Assignment, Crown, Epoch
from tuner.run import Run
from tuner.trial import Bench, Best, Diverged, fit, predictions, prepare

TOLERANCE = 1e-3
SAMPLES = 16
WAY_OUT = "lower recipe.lr, or export the next best with `tuner export STUDY --trial N`"


def crown(order: Crown, report: Callable[[Epoch], bool], slot: int) -> Published | None:
    """Carries out `order` and returns what was published; None when `report` said stop. Raises ExportMismatch."""
    folder = Path(order.folder)
    recover(folder)
    a = order.assignment
    data = load(a.run, Path(a.home))
    held = reuse(folder, a)
    if held is not None:
        model, scores, seconds = held
    else:
        start = time.monotonic()
        bench = prepare(a.run, place(a.engine, Path(a.home), slot), a.metric)
        best = Best()
        try:
            for epoch in fit(bench, a.run.recipe, a.run.seed, best):
                if not report(epoch):
                    return None
            tested = test(bench)
        except Diverged as error:
            raise NoUsableTrial(f"training diverged ({error}); {WAY_OUT}") from None
        scores = {"valid": best.epoch.scores if best.epoch else dict(order.valid), "test": tested}
        model, seconds = bench.staged.model, time.monotonic() - start
    portable = Normalised(model.cpu().float().to(memory_format=torch.contiguous_format), data.preprocess).eval()
    return publish(order, portable, data, scores, seconds)


def test(bench: Bench) -> dict[str, float]:
    """The scores on the test examples; called once per winner. Raises Diverged."""
    scores = bench.task.score(predictions(bench, bench.test))
    if not all(map(math.isfinite, scores.values())):
        raise Diverged("the test scores are not finite")
    return scores


def reuse(folder: Path, a: Assignment) -> tuple[torch.nn.Module, dict[str, Any], float] | None:
    """The model of an earlier export of the same run, so that a further format needs no training."""
    published = read(folder)
    if published is None or published.manifest["run_digest"] != a.run.digest():
        return None
    function = open_export(published, "safetensors")
    assert isinstance(function, Normalised)
    return function.model, published.manifest["scores"], published.manifest["training_seconds"]


def open_export(published: Published, name: str) -> Callable[[Tensor], Tensor]:
    """An export as a function of RGB in 0..1, float32 (n, 3, size, size)."""
    manifest = published.manifest
    run = published.run

    def blank() -> torch.nn.Module:
        return build(run.without_weights(), published.folder, len(manifest["classes"])).model

    found: Callable[[Tensor], Tensor] = exporter(name).load(published.folder / manifest["exports"][name]["file"], blank)
    return found


def exporter(name: str) -> Any:
    """What has FILE, save and load: a module of export/, or an object of the user's own."""
    return plugins.attribute("export", name) if ":" in name else plugins.module("export", name)


def publish(order: Crown, model: Normalised, data: Data, scores: Mapping[str, Any], seconds: float) -> Published:
    """Writes every format beside the export folder, verifies each, and only then puts the folder in place."""
    folder = Path(order.folder)
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".export-", suffix=".tmp", dir=folder.parent))
        try:
            exports = save_all(order, model, data, temporary)
            manifest = describe(order, model, data, scores, seconds, exports)
            (temporary / "model.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False))
            (temporary / "MODEL_CARD.md").write_text(model_card(manifest))
            manifest["files"] = {p.name: sha256(p) for p in sorted(temporary.iterdir())}
            for path in temporary.iterdir():
                fsync(path)
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False))  # last: it vouches for the rest
            fsync(temporary / MANIFEST)
            temporary.chmod(0o755)
            replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return Published(folder, manifest)


def replace(new: Path, folder: Path) -> None:
    """Puts a finished folder in the place of an older one; `recover` mends a crash between the two renames."""
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    new.rename(folder)
    fsync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(folder: Path) -> None:
    """Undoes what a killed export left: the older export comes back, half-written ones go."""
    old = folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():
        old.rename(folder)
    for rest in [old, *folder.parent.glob(".export-*.tmp")]:
        shutil.rmtree(rest, ignore_errors=True)


def samples(data: Data) -> Tensor:
    """Real test images as RGB in 0..1, float32 (n, 3, size, size)."""
    batch = data.test.take(torch.arange(min(SAMPLES, len(data.test))), 0)
    assert isinstance(batch.x, Tensor)
    return batch.x.float() / 255


@torch.no_grad()
def save_all(order: Crown, model: Normalised, data: Data, folder: Path) -> dict[str, Any]:
    """Saves each format, reads it back, compares it with the model on real images. Raises ExportMismatch."""
    images = samples(data)
    expected = model(images)
    exports: dict[str, Any] = {}
    for name in dict.fromkeys(["safetensors", *order.formats]):
        module = exporter(name)
        path = folder / module.FILE
        module.save(model, images, path)
        exports[name] = {"file": module.FILE}
        again = open_export(
            Published(folder, {"run": order.assignment.run.tree(), "classes": list(data.classes), "exports": exports}), name
        )
        difference = compare(name, expected, again(images), again(images[:1]))
        exports[name] |= {"largest_difference": difference, "milliseconds": latency(again, images[:1])}
    return exports


def compare(name: str, expected: Tensor, got: Tensor, first: Tensor) -> float:
    """The largest difference of the outputs. Raises ExportMismatch above the tolerance, relative to the largest output."""
    scale = max(1.0, float(expected.abs().max()))
    difference = max(float((expected - got).abs().max()), float((expected[:1] - first).abs().max()))
    if not difference <= TOLERANCE * scale:  # NaN is a disagreement too
        raise ExportMismatch(
            f"export {name}: read back, it differs from the model by {difference:g} on real images (allowed: {TOLERANCE * scale:g}); nothing was published"
        )
    return difference


def latency(function: Callable[[Tensor], Tensor], image: Tensor) -> float:
    """Median milliseconds for one image on this machine's CPU, of 10 calls after 2."""
    times = []
    for _ in range(12):
        start = time.perf_counter()
        function(image)
        times.append(1000 * (time.perf_counter() - start))
    return round(statistics.median(times[2:]), 3)


def describe(
    order: Crown, model: Normalised, data: Data, scores: Mapping[str, Any], seconds: float, exports: Mapping[str, Any]
) -> dict[str, Any]:
    """The manifest: all that someone who ships the model must know."""
    run: Run = order.assignment.run
    p = data.preprocess
    return {
        "tuner": tuner.__version__,
        "study": order.study,
        "trial": order.trial,
        "run": run.tree(),
        "run_digest": run.digest(),
        "data_digest": data.digest,
        "classes": list(data.classes),
        "examples": {"train": len(data.train), "valid": len(data.valid), "test": len(data.test)},
        "input": {"shape": ["batch", 3, p.size, p.size], "dtype": "float32", "range": "RGB in 0..1; normalised inside the model"},
        "output": {"shape": ["batch", len(data.classes)], "meaning": "logits; softmax gives probabilities"},
        "preprocess": {"resize": p.resize, "size": p.size, "interpolation": p.interpolation, "mean": p.mean, "std": p.std},
        "metric": order.assignment.metric,
        "scores": dict(scores),
        "parameters": sum(v.numel() for v in model.model.parameters()),
        "training_seconds": round(seconds, 3),
        "exports": dict(exports),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
