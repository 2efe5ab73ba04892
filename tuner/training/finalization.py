"""The winner: retrained on all it may learn from, tested once, exported, each export read back and compared, then published."""

import json
import math
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import tuner
from tuner.config import plugins
from tuner.config.run import Run
from tuner.core.export_module import Portable
from tuner.core.input_spec import Tree, leaves, wanted_of
from tuner.core.types import Data, Staged, Task
from tuner.errors import DataError, ExportMismatch, NoUsableTrial
from tuner.files import removal
from tuner.files.atomic import disk_errors, fsync, half_export, sha256
from tuner.files.crash_points import crash
from tuner.files.removal import MANIFEST
from tuner.manifest import Published, model_card, read, recover
from tuner.messages import Assignment, Crown, Epoch
from tuner.training.building import build, load, task_of
from tuner.training.checkpoints import put
from tuner.training.devices import place
from tuner.training.epoch import Bench, predictions
from tuner.training.training_loop import Best, Diverged, checkpoints_of, fit, prepare

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
        staged, scores, seconds = held
    else:
        start = time.monotonic()
        bench = prepare(a.run, place(a.engine, Path(a.home), slot), a.metric)
        best = Best()
        try:
            for epoch in [] if order.weights else retraining(a, bench, best):
                if not report(epoch):
                    return None
            if order.weights and not put(Path(order.weights), bench.staged.model, bench.net):
                raise DataError(
                    f"{order.weights}: damaged or of another model; with search.retrain: true the run is trained again"
                )
            tested = test(bench, a.run.recipe.batch_size)
        except Diverged as error:
            raise NoUsableTrial(f"training diverged ({error}); {WAY_OUT}") from None
        scores = {"valid": best.epoch.scores if best.epoch else dict(order.valid), "test": tested}
        staged, seconds = bench.staged, time.monotonic() - start
    staged.model.cpu().float().to(memory_format=torch.contiguous_format)
    return publish(order, Portable(staged, data.wanted).eval(), data, scores, seconds)


def retraining(a: Assignment, bench: Bench, best: Best) -> Iterator[Epoch]:
    """The winner's epochs; a training that was killed goes on."""
    return fit(
        bench,
        a.run.recipe,
        a.run.seed,
        best,
        checkpoints_of(a.run, bench, Path(a.checkpoints) if a.checkpoints else None),
    )


def test(bench: Bench, size: int) -> dict[str, float]:
    """The scores on the test examples; called once per winner. Raises Diverged."""
    scores = bench.task.score(predictions(bench, bench.test, size))
    if not all(map(math.isfinite, scores.values())):
        raise Diverged("the test scores are not finite")
    return scores


def reuse(folder: Path, a: Assignment) -> tuple[Staged, dict[str, Any], float] | None:
    """The model of an earlier export of the same run, so that a further format needs no training."""
    published = read(folder)
    if published is None or published.manifest["run_digest"] != a.run.digest():
        return None
    if published.run.digest() != a.run.digest():  # else a manifest from elsewhere chose the model
        return None
    model = blank(published)
    exporter("safetensors").restore(
        published.folder / published.manifest["exports"]["safetensors"]["file"], model
    )
    return model.staged[0], published.manifest["scores"], published.manifest["training_seconds"]


def blank(published: Published) -> Portable:
    """The exported model without its weights."""
    manifest = published.manifest
    staged = build(published.run.without_weights(), published.folder, len(manifest["classes"]))
    return Portable(staged, wanted_of(manifest["preprocess"], published.folder))


def open_export(published: Published, name: str) -> Callable[[Tree], Tree]:
    """An export as a function of examples as it takes them, any number at once."""
    entry = published.manifest["exports"][name]
    function: Callable[[Tree], Tree] = exporter(name).load(
        published.folder / entry["file"], lambda: blank(published)
    )
    return function if entry.get("batched", True) else one_by_one(function)


def one_by_one(function: Callable[[Tree], Tree]) -> Callable[[Tree], Tree]:
    """A function of one example as one of many."""

    def many(x: Tree) -> Tree:
        count = len(next(iter(leaves(x).values())))
        outputs = [leaves(function(rows(x, slice(i, i + 1)))) for i in range(count)]
        joined = {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]}
        return joined[""] if set(joined) == {""} else joined

    return many


def rows(x: Tree, which: slice) -> Tree:
    return {name: leaf[which] for name, leaf in x.items()} if isinstance(x, dict) else x[which]


def exporter(name: str) -> Any:
    """What has FILE, save and load: a module of export/, or an object of the user's own."""
    return plugins.attribute("export", name) if ":" in name else plugins.module("export", name)


def publish(
    order: Crown, model: Portable, data: Data, scores: Mapping[str, Any], seconds: float
) -> Published:
    """Writes every format beside the export folder, verifies each, and only then puts the folder in place."""
    folder = Path(order.folder)
    need = (
        4
        * sum(value.numel() for value in model.state().values())
        * len({"safetensors", *order.formats})
    )
    with disk_errors(folder, need):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with half_export(folder.parent) as temporary:
            for name, path in data.wanted.files().items():
                (temporary / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, temporary / name)
            manifest = describe(order, model, data, scores, seconds)
            manifest["exports"] = save_all(order, model, data, Published(temporary, manifest))
            (temporary / "model.json").write_text(
                json.dumps(manifest, indent=2, ensure_ascii=False)
            )
            (temporary / "MODEL_CARD.md").write_text(model_card(manifest))
            crash("export.filled")
            written = sorted(p for p in temporary.rglob("*") if p.is_file())
            manifest["files"] = {str(p.relative_to(temporary)): sha256(p) for p in written}
            for path in written:
                fsync(path)
            (temporary / MANIFEST).write_text(
                json.dumps(manifest, indent=2, ensure_ascii=False)
            )  # last: it vouches for the rest
            fsync(temporary / MANIFEST)
            crash("export.written")
            replace(temporary, folder)
    return Published(folder, manifest)


def replace(new: Path, folder: Path) -> None:
    """Puts a finished folder in the place of an older one; `recover` ends what a crash in between leaves."""
    old = removal.take_place(new, folder)
    crash("export.renamed")
    fsync(folder.parent)
    if old is not None:
        removal.remove_export(old)


def samples(data: Data) -> Tree:
    """Real test examples as an export takes them."""
    return data.wanted.given(data.test.take(torch.arange(min(SAMPLES, len(data.test))), 0).x)


@torch.no_grad()
def save_all(order: Crown, model: Portable, data: Data, unpublished: Published) -> dict[str, Any]:
    """Saves each format, reads it back, compares it with the model on real examples. Raises ExportMismatch."""
    task = task_of(order.assignment.run, data.classes)
    examples, batched = samples(data), model.staged[0].batched
    first = rows(examples, slice(0, 1))
    expected = model(examples)
    exports: dict[str, Any] = {}
    for name in dict.fromkeys(["safetensors", *order.formats]):
        module = exporter(name)
        module.save(model, examples if batched else first, unpublished.folder / module.FILE)
        exports[name] = {"file": module.FILE, "batched": batched}
        again = open_export(
            Published(unpublished.folder, {**unpublished.manifest, "exports": exports}), name
        )
        difference = max(
            compare(name, task, expected, again(examples)),
            compare(name, task, rows(expected, slice(0, 1)), again(first)),
        )
        exports[name] |= {"largest_difference": difference, "milliseconds": latency(again, first)}
    return exports


def compare(name: str, task: Task, expected: Tree, got: Tree) -> float:
    """The relative difference of the outputs. Raises ExportMismatch above the tolerance."""
    difference = task.difference(expected, got)
    if not difference <= TOLERANCE:  # NaN is a disagreement too
        raise ExportMismatch(
            f"export {name}: read back, it differs from the model by {difference:g} on real examples (allowed: {TOLERANCE:g}); nothing was published"
        )
    return difference


def latency(function: Callable[[Tree], Tree], example: Tree) -> float:
    """Median milliseconds for one example on this machine's CPU, of 10 calls after 2."""
    times = []
    for _ in range(12):
        start = time.perf_counter()
        function(example)
        times.append(1000 * (time.perf_counter() - start))
    return round(statistics.median(times[2:]), 3)


def describe(
    order: Crown, model: Portable, data: Data, scores: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """The manifest, but for its exports: all that someone who ships the model must know."""
    run: Run = order.assignment.run
    return {
        "tuner": tuner.__version__,
        "study": order.study,
        "trial": order.trial,
        "retrained": order.weights is None,
        "run": run.tree(),
        "run_digest": run.digest(),
        "data_digest": data.digest,
        "classes": list(data.classes),
        "examples": {"train": len(data.train), "valid": len(data.valid), "test": len(data.test)},
        "input": data.wanted.describe(),
        "output": {"meaning": task_of(run, data.classes).output},
        "preprocess": data.wanted.tree(),
        "metric": order.assignment.metric,
        "scores": dict(scores),
        "parameters": sum(v.numel() for v in model.staged[0].model.parameters()),
        "training_seconds": round(seconds, 3),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
