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
from tuner.core.export_module import ExportModule
from tuner.core.input_spec import TensorTree, input_spec_from_dict, tree_to_dict
from tuner.core.types import Dataset, StagedModel, Task
from tuner.errors import DataError, ExportMismatch, NoUsableTrial
from tuner.files import removal
from tuner.files.atomic import disk_errors, file_sha256, fsync, half_export
from tuner.files.crash_points import crash_point
from tuner.files.removal import MANIFEST
from tuner.manifest import PublishedExport, format_model_card, read_export, recover_export
from tuner.messages import Assignment, Epoch, FinalizeJob
from tuner.training.building import build_model, build_task, load_dataset
from tuner.training.checkpoints import load_best_weights
from tuner.training.devices import select_device
from tuner.training.epoch import TrainingContext, predict_source
from tuner.training.training_loop import (
    BestEpoch,
    Diverged,
    fit,
    open_checkpoints,
    prepare_training,
)

MAX_RELATIVE_DIFFERENCE = 1e-3
SAMPLE_COUNT = 16
DIVERGED_HINT = "lower recipe.lr, or export the next best with `tuner export STUDY --trial N`"


def finalize(
    job: FinalizeJob, report: Callable[[Epoch], bool], slot: int
) -> PublishedExport | None:
    """Carries out `order` and returns what was published; None when `report` said stop. Raises ExportMismatch."""
    folder = Path(job.export_folder)
    recover_export(folder)
    a = job.assignment
    data = load_dataset(a.run, Path(a.home))
    held = load_earlier_export(folder, a)
    if held is not None:
        staged, scores, seconds = held
    else:
        start = time.monotonic()
        bench = prepare_training(
            a.run, select_device(a.engine, Path(a.home), slot, a.micro_batches), a.metric
        )
        best = BestEpoch()
        try:
            for epoch in [] if job.weights_file else retrain(a, bench, best):
                if not report(epoch):
                    return None
            if job.weights_file and not load_best_weights(
                Path(job.weights_file), bench.staged_model.model, bench.net
            ):
                raise DataError(
                    f"{job.weights_file}: damaged or of another model; with search.retrain: true the run is trained again"
                )
            tested = score_test_split(bench, a.run.recipe.batch_size)
        except Diverged as error:
            raise NoUsableTrial(f"training diverged ({error}); {DIVERGED_HINT}") from None
        scores = {
            "valid": best.epoch.scores if best.epoch else dict(job.valid_scores),
            "test": tested,
        }
        staged, seconds = bench.staged_model, time.monotonic() - start
    staged.model.cpu().float().to(memory_format=torch.contiguous_format)
    return publish(job, ExportModule(staged, data.input_spec).eval(), data, scores, seconds)


def retrain(assignment: Assignment, context: TrainingContext, best: BestEpoch) -> Iterator[Epoch]:
    """The winner's epochs; a training that was killed goes on."""
    return fit(
        context,
        assignment.run.recipe,
        assignment.run.seed,
        best,
        open_checkpoints(
            assignment.run,
            context,
            Path(assignment.checkpoint_folder) if assignment.checkpoint_folder else None,
        ),
    )


def score_test_split(context: TrainingContext, batch_size: int) -> dict[str, float]:
    """The scores on the test examples; called once per winner. Raises Diverged."""
    scores = context.task.score(predict_source(context, context.test, batch_size))
    if not all(map(math.isfinite, scores.values())):
        raise Diverged("the test scores are not finite")
    return scores


def load_earlier_export(
    folder: Path, assignment: Assignment
) -> tuple[StagedModel, dict[str, Any], float] | None:
    """The model of an earlier export of the same run, so that a further format needs no training."""
    published = read_export(folder)
    if published is None or published.manifest["run_digest"] != assignment.run.digest():
        return None
    if (
        published.run.digest() != assignment.run.digest()
    ):  # else a manifest from elsewhere chose the model
        return None
    model = model_without_weights(published)
    load_exporter("safetensors").restore(
        published.folder / published.manifest["exports"]["safetensors"]["file"], model
    )
    return model.staged[0], published.manifest["scores"], published.manifest["training_seconds"]


def model_without_weights(published: PublishedExport) -> ExportModule:
    """The exported model without its weights."""
    manifest = published.manifest
    staged = build_model(
        published.run.without_weights(), published.folder, len(manifest["classes"])
    )
    return ExportModule(staged, input_spec_from_dict(manifest["preprocess"], published.folder))


def open_export(published: PublishedExport, name: str) -> Callable[[TensorTree], TensorTree]:
    """An export as a function of examples as it takes them, any number at once."""
    entry = published.manifest["exports"][name]
    function: Callable[[TensorTree], TensorTree] = load_exporter(name).load(
        published.folder / entry["file"], lambda: model_without_weights(published)
    )
    return function if entry.get("batched", True) else apply_one_by_one(function)


def apply_one_by_one(
    function: Callable[[TensorTree], TensorTree],
) -> Callable[[TensorTree], TensorTree]:
    """A function of one example as one of many."""

    def many(x: TensorTree) -> TensorTree:
        count = len(next(iter(tree_to_dict(x).values())))
        outputs = [tree_to_dict(function(slice_rows(x, slice(i, i + 1)))) for i in range(count)]
        joined = {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]}
        return joined[""] if set(joined) == {""} else joined

    return many


def slice_rows(x: TensorTree, which: slice) -> TensorTree:
    return {name: leaf[which] for name, leaf in x.items()} if isinstance(x, dict) else x[which]


def load_exporter(name: str) -> Any:
    """What has FILE, save and load: a module of export/, or an object of the user's own."""
    return (
        plugins.load_plugin("export", name)
        if ":" in name
        else plugins.import_plugin("export", name)
    )


def publish(
    job: FinalizeJob, model: ExportModule, data: Dataset, scores: Mapping[str, Any], seconds: float
) -> PublishedExport:
    """Writes every format beside the export folder, verifies each, and only then puts the folder in place."""
    folder = Path(job.export_folder)
    need = (
        4
        * sum(value.numel() for value in model.export_state().values())
        * len({"safetensors", *job.export_formats})
    )
    with disk_errors(folder, need):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with half_export(folder.parent) as temporary:
            for name, path in data.input_spec.export_files().items():
                (temporary / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, temporary / name)
            manifest = make_manifest(job, model, data, scores, seconds)
            manifest["exports"] = save_and_verify_all(
                job, model, data, PublishedExport(temporary, manifest)
            )
            (temporary / "model.json").write_text(
                json.dumps(manifest, indent=2, ensure_ascii=False)
            )
            (temporary / "MODEL_CARD.md").write_text(format_model_card(manifest))
            crash_point("export.filled")
            written = sorted(p for p in temporary.rglob("*") if p.is_file())
            manifest["files"] = {str(p.relative_to(temporary)): file_sha256(p) for p in written}
            for path in written:
                fsync(path)
            (temporary / MANIFEST).write_text(
                json.dumps(manifest, indent=2, ensure_ascii=False)
            )  # last: it vouches for the rest
            fsync(temporary / MANIFEST)
            crash_point("export.written")
            replace_folder(temporary, folder)
    return PublishedExport(folder, manifest)


def replace_folder(new: Path, folder: Path) -> None:
    """Puts a finished folder in the place of an older one; `recover` ends what a crash in between leaves."""
    old = removal.take_place(new, folder)
    crash_point("export.renamed")
    fsync(folder.parent)
    if old is not None:
        removal.remove_export(old)


def sample_inputs(data: Dataset) -> TensorTree:
    """Real test examples as an export takes them."""
    return data.input_spec.to_export_input(
        data.test.take(torch.arange(min(SAMPLE_COUNT, len(data.test))), 0).x
    )


@torch.no_grad()
def save_and_verify_all(
    job: FinalizeJob, model: ExportModule, data: Dataset, unpublished: PublishedExport
) -> dict[str, Any]:
    """Saves each format, reads it back, compares it with the model on real examples. Raises ExportMismatch."""
    task = build_task(job.assignment.run, data.classes)
    examples, batched = sample_inputs(data), model.staged[0].exports_batched
    first = slice_rows(examples, slice(0, 1))
    expected = model(examples)
    exports: dict[str, Any] = {}
    for name in dict.fromkeys(["safetensors", *job.export_formats]):
        module = load_exporter(name)
        module.save(model, examples if batched else first, unpublished.folder / module.FILE)
        exports[name] = {"file": module.FILE, "batched": batched}
        again = open_export(
            PublishedExport(unpublished.folder, {**unpublished.manifest, "exports": exports}), name
        )
        difference = max(
            verify_output(name, task, expected, again(examples)),
            verify_output(name, task, slice_rows(expected, slice(0, 1)), again(first)),
        )
        exports[name] |= {
            "largest_difference": difference,
            "milliseconds": measure_latency(again, first),
        }
    return exports


def verify_output(name: str, task: Task, expected: TensorTree, got: TensorTree) -> float:
    """The relative difference of the outputs. Raises ExportMismatch above the tolerance."""
    difference = task.output_difference(expected, got)
    if not difference <= MAX_RELATIVE_DIFFERENCE:  # NaN is a disagreement too
        raise ExportMismatch(
            f"export {name}: read back, it differs from the model by {difference:g} on real examples (allowed: {MAX_RELATIVE_DIFFERENCE:g}); nothing was published"
        )
    return difference


def measure_latency(function: Callable[[TensorTree], TensorTree], example: TensorTree) -> float:
    """Median milliseconds for one example on this machine's CPU, of 10 calls after 2."""
    times = []
    for _ in range(12):
        start = time.perf_counter()
        function(example)
        times.append(1000 * (time.perf_counter() - start))
    return round(statistics.median(times[2:]), 3)


def make_manifest(
    job: FinalizeJob, model: ExportModule, data: Dataset, scores: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """The manifest, but for its exports: all that someone who ships the model must know."""
    run: Run = job.assignment.run
    return {
        "tuner": tuner.__version__,
        "study": job.study_name,
        "trial": job.trial_number,
        "retrained": job.weights_file is None,
        "run": run.to_dict(),
        "run_digest": run.digest(),
        "data_digest": data.digest,
        "classes": list(data.classes),
        "examples": {"train": len(data.train), "valid": len(data.valid), "test": len(data.test)},
        "input": data.input_spec.describe_input(),
        "output": {"meaning": build_task(run, data.classes).output_description},
        "preprocess": data.input_spec.to_dict(),
        "metric": job.assignment.metric,
        "scores": dict(scores),
        "parameters": sum(v.numel() for v in model.staged[0].model.parameters()),
        "training_seconds": round(seconds, 3),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
