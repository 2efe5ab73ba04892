"""Publishes a model: writes every format, reads each back and compares it with the model, then puts
the folder in place.
"""

import contextlib
import json
import platform
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

import tuner
from tuner.config.objective import metric_label
from tuner.config.run import Run
from tuner.core.export_module import ExportModule
from tuner.core.input_spec import TensorTree, tree_to_dict
from tuner.core.targets import split_weights
from tuner.core.types import Dataset, Task
from tuner.errors import ExportMismatch
from tuner.export._model_card import format_model_card
from tuner.export._onnx_files import OUTPUT_NAME
from tuner.export._readme import format_readme
from tuner.files import removal
from tuner.files.atomic import disk_errors, file_sha256, fsync, half_export
from tuner.files.crash_points import crash_point
from tuner.files.removal import MANIFEST
from tuner.manifest import HEAT_MAPS, TEST_RESULTS, PublishedExport
from tuner.messages import FinalizeJob
from tuner.training.building import build_task
from tuner.training.explained_examples import explain_examples
from tuner.training.exported_models import load_exporter, open_export, slice_rows
from tuner.training.model_costs import median_milliseconds
from tuner.training.own_metric import score_own_metric

MAX_RELATIVE_DIFFERENCE = 1e-3  # of an export's output from the model's
SAMPLE_COUNT = 16  # test examples on which they are compared
MAX_SCORE_LOSS = 0.01  # one point, or 1 % of a score that is no share, that a lossy format may lose
SCORES_IN_UNITS = ("mae", "rmse")  # in the units of the targets: no shares, however small they are
MAX_SCORED = 1000  # validation examples on which a lossy format is scored
TIMED_CALLS = 30
MODEL_JSON = "model.json"
OWN_FOLDERS = ("openvino", "pretrained")  # of formats that are several files


def publish(
    job: FinalizeJob,
    model: ExportModule,
    dataset: Dataset,
    scores: Mapping[str, Any],
    seconds: float,
    findings: Mapping[str, Any],
    tested_run: bytes | None = None,
) -> PublishedExport:
    """Writes every format beside the export folder, verifies each, and only then puts the folder in
    place. The findings go into the manifest, and the file with the model's test into the folder.

    Raises:
        ExportMismatch: A format differs from the model. Nothing is published.
        StorageError: The folder cannot be written.
    """
    folder = Path(job.export_folder)
    weight_count = sum(value.numel() for value in model.export_state().values())
    bytes_needed = 4 * weight_count * len(export_formats(job))
    with disk_errors(folder, bytes_needed):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with half_export(folder.parent) as temporary:
            for name, path in dataset.input_spec.export_files().items():
                (temporary / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, temporary / name)
            if tested_run is not None:
                (temporary / TEST_RESULTS).write_bytes(tested_run)
            explained = explain_examples(job.assignment.run, model, dataset)
            if explained is not None:
                (temporary / HEAT_MAPS).write_bytes(explained)
            manifest = make_manifest(job, model, dataset, scores, seconds)
            manifest |= findings
            manifest |= save_and_verify_all(
                job, model, dataset, PublishedExport(temporary, manifest)
            )
            (temporary / MODEL_JSON).write_text(format_json(manifest))
            (temporary / "MODEL_CARD.md").write_text(format_model_card(manifest))
            (temporary / "README.md").write_text(format_readme(manifest))
            crash_point("export.filled")
            written = sorted(path for path in temporary.rglob("*") if path.is_file())
            manifest["files"] = {
                str(path.relative_to(temporary)): file_sha256(path) for path in written
            }
            for path in written:
                fsync(path)
            # the manifest is written last, because it vouches for all other files
            (temporary / MANIFEST).write_text(format_json(manifest))
            fsync(temporary / MANIFEST)
            crash_point("export.written")
            replace_folder(temporary, folder)
    return PublishedExport(folder, manifest)


def export_formats(job: FinalizeJob) -> list[str]:
    """The formats to write, each once. safetensors is always one: others are made from it later."""
    return list(dict.fromkeys(["safetensors", *job.export_formats]))


def format_json(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=2, ensure_ascii=False)


def replace_folder(new: Path, folder: Path) -> None:
    """Puts a finished folder in the place of an older one.

    `manifest.recover_export` repairs what a crash between the two steps leaves.
    """
    old = removal.take_place(new, folder)
    crash_point("export.renamed")
    fsync(folder.parent)
    if old is not None:
        removal.remove_export(old)


def sample_inputs(dataset: Dataset) -> TensorTree:
    """Real test examples as an export takes them."""
    index = torch.arange(min(SAMPLE_COUNT, len(dataset.test)))
    return dataset.input_spec.to_export_input(dataset.test.take(index, 0).x)


@torch.no_grad()
def save_and_verify_all(
    job: FinalizeJob, model: ExportModule, dataset: Dataset, unpublished: PublishedExport
) -> dict[str, Any]:
    """Saves each format, reads it back, and compares it with the model on real examples.

    A lossy format, such as 8-bit integers, is compared by its score on the validation examples
    instead, and left out where that falls.

    Returns:
        What the manifest says: the entry of each format as `exports`, as `left_out` why a format
        was not published, and the names of the outputs as the formats have them.

    Raises:
        ExportMismatch: A format that is not lossy differs from the model.
    """
    task = build_task(job.assignment.run, dataset.classes)
    examples, batched = sample_inputs(dataset), model.staged[0].exports_batched
    first_example = slice_rows(examples, slice(0, 1))
    expected = model(examples)
    scorer = ValidationScorer(job, model, dataset, task)
    exports: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for name in export_formats(job):
        exporter = load_exporter(name)
        file = unpublished.folder / exporter.FILE
        count = getattr(exporter, "CALIBRATION_EXAMPLES", 0)
        taken = calibration_inputs(dataset, count) if count else examples
        exporter.save(model, taken if batched else first_example, file)
        entry: dict[str, Any] = {"file": exporter.FILE, "batched": batched}
        manifest = {**unpublished.manifest, "exports": {name: entry}}
        function = open_export(PublishedExport(unpublished.folder, manifest), name)
        if getattr(exporter, "LOSSY", False):
            problem = scorer.compare(entry, function)
            if problem is not None:
                left_out[name] = problem
                removal.remove_gone(unpublished.folder, exporter.FILE)
                continue
            if count:
                entry["calibration_examples"] = min(count, len(dataset.valid))
            difference = task.output_difference(expected, function(examples))
        else:
            difference = max(
                verify_output(name, task, expected, function(examples)),
                verify_output(
                    name, task, slice_rows(expected, slice(0, 1)), function(first_example)
                ),
            )
        milliseconds, calls = median_milliseconds(partial(function, first_example), TIMED_CALLS)
        exports[name] = entry | {
            "largest_difference": difference,
            # of one example on the CPU; all formats one after another in this process
            "milliseconds": milliseconds,
            "calls": calls,
            "megabytes": round(bytes_of(file) / 1e6, 3),
        }
    return {
        "exports": exports,
        "left_out": left_out,
        "output_names": [name or OUTPUT_NAME for name in tree_to_dict(expected)],
        "measured": describe_measurement(),
    }


def calibration_inputs(dataset: Dataset, count: int) -> TensorTree:
    """Validation examples as an export takes them, spread over the whole split."""
    total = len(dataset.valid)
    index = torch.linspace(0, total - 1, min(count, total)).round().long()
    return dataset.input_spec.to_export_input(dataset.valid.take(index, 0).x)


def bytes_of(file: Path) -> int:
    """The bytes of an export: of its file, or of the folder of its own that the file lies in."""
    folder = file.parent
    is_own_folder = not (folder / MODEL_JSON).exists() and folder.name in OWN_FOLDERS
    files = folder.iterdir() if is_own_folder else [file]
    return sum(path.stat().st_size for path in files)


class ValidationScorer:
    """Compares the validation score of exports with that of the model, which is computed once.

    At most MAX_SCORED validation examples are used.
    """

    def __init__(self, job: FinalizeJob, model: ExportModule, dataset: Dataset, task: Task) -> None:
        self.metric = job.assignment.metric
        self.sign = -1 if job.assignment.direction == "minimise" else 1
        self.model, self.dataset, self.task = model, dataset, task
        self.count = min(MAX_SCORED, len(dataset.valid))
        self.of_model: float | None = None

    def score(self, function: Callable[[TensorTree], TensorTree]) -> float:
        pairs = []
        for index in torch.split(torch.arange(self.count), SAMPLE_COUNT):
            x, y = self.dataset.valid.take(index, 0)
            inputs = self.dataset.input_spec.to_export_input(x)
            predicted = self.task.predict(function, inputs)  # type: ignore[arg-type]
            pairs.append((predicted, split_weights(y)[0]))
        return (self.task.score(pairs) | score_own_metric(self.metric, pairs))[self.metric]

    def compare(
        self, entry: dict[str, Any], function: Callable[[TensorTree], TensorTree]
    ) -> str | None:
        """Adds the score to the manifest's entry. Returns why the format is left out, or None."""
        if self.of_model is None:
            self.of_model = self.score(self.model)
        actual = self.score(function)
        is_share = self.metric not in SCORES_IN_UNITS
        in_points = is_share and 0 <= actual <= 1 and 0 <= self.of_model <= 1
        allowed = MAX_SCORE_LOSS * (1 if in_points else abs(self.of_model))
        if not self.sign * (self.of_model - actual) <= allowed:  # true for NaN too
            return (
                f"its validation {metric_label(self.metric)} is {actual:.4f}, and the model's "
                f"{self.of_model:.4f} (allowed: {allowed:.4f} less)"
            )
        entry |= {
            "validation_score": actual,
            "model_validation_score": self.of_model,
            "allowed_loss": allowed,
            "validation_examples": self.count,
        }
        return None


def verify_output(name: str, task: Task, expected: TensorTree, actual: TensorTree) -> float:
    """The relative difference of the outputs.

    Raises ExportMismatch above MAX_RELATIVE_DIFFERENCE.
    """
    difference = task.output_difference(expected, actual)
    if not difference <= MAX_RELATIVE_DIFFERENCE:  # true for NaN too
        raise ExportMismatch(
            f"export {name}: read back, it differs from the model by {difference:g} on real "
            f"examples (allowed: {MAX_RELATIVE_DIFFERENCE:g}); nothing was published"
        )
    return difference


def describe_measurement() -> dict[str, Any]:
    """On what the exports were measured."""
    names = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "examples": 1,
        "machine": names[0] if names else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }


def make_manifest(
    job: FinalizeJob,
    model: ExportModule,
    dataset: Dataset,
    scores: Mapping[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """The manifest without its `exports` and `files`: all that someone who ships the model must
    know.
    """
    run: Run = job.assignment.run
    return {
        "tuner": tuner.__version__,
        "study": job.study_name,
        "trial": job.trial_number,
        "retrained": job.weights_file is None,
        "run": run.to_dict(),
        "run_digest": run.digest(),
        "data_digest": dataset.digest,
        "classes": list(dataset.classes),
        "examples": {
            "train": len(dataset.train),
            "valid": len(dataset.valid),
            "test": len(dataset.test),
        },
        "input": dataset.input_spec.describe_input(),
        "output": {"meaning": build_task(run, dataset.classes).output_description},
        "preprocess": dataset.input_spec.to_dict(),
        "metric": job.assignment.metric,
        "direction": job.assignment.direction,
        "scores": dict(scores),
        "parameters": sum(value.numel() for value in model.staged[0].model.parameters()),
        "training_seconds": round(seconds, 3),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
