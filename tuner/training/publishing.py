"""Publishes a model: writes every format, reads each back and compares it with the model, then puts
the folder in place.
"""

import json
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import tuner
from tuner.config.run import Run
from tuner.core.export_module import ExportModule
from tuner.core.input_spec import TensorTree
from tuner.core.types import Dataset, Task
from tuner.errors import ExportMismatch
from tuner.files import removal
from tuner.files.atomic import disk_errors, file_sha256, fsync, half_export
from tuner.files.crash_points import crash_point
from tuner.files.removal import MANIFEST
from tuner.manifest import TEST_RESULTS, PublishedExport, format_model_card
from tuner.messages import FinalizeJob
from tuner.training.building import build_task
from tuner.training.exported_models import load_exporter, open_export, slice_rows

MAX_RELATIVE_DIFFERENCE = 1e-3  # of an export's output from the model's
SAMPLE_COUNT = 16  # test examples on which they are compared


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
            manifest = make_manifest(job, model, dataset, scores, seconds)
            manifest |= findings
            manifest["exports"] = save_and_verify_all(
                job, model, dataset, PublishedExport(temporary, manifest)
            )
            (temporary / "model.json").write_text(format_json(manifest))
            (temporary / "MODEL_CARD.md").write_text(format_model_card(manifest))
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

    Returns the manifest's entry for each format. Raises ExportMismatch.
    """
    task = build_task(job.assignment.run, dataset.classes)
    examples, batched = sample_inputs(dataset), model.staged[0].exports_batched
    first_example = slice_rows(examples, slice(0, 1))
    expected = model(examples)
    exports: dict[str, Any] = {}
    for name in export_formats(job):
        exporter = load_exporter(name)
        file = unpublished.folder / exporter.FILE
        exporter.save(model, examples if batched else first_example, file)
        exports[name] = {"file": exporter.FILE, "batched": batched}
        manifest = {**unpublished.manifest, "exports": exports}
        function = open_export(PublishedExport(unpublished.folder, manifest), name)
        difference = max(
            verify_output(name, task, expected, function(examples)),
            verify_output(name, task, slice_rows(expected, slice(0, 1)), function(first_example)),
        )
        exports[name] |= {
            "largest_difference": difference,
            "milliseconds": measure_latency(function, first_example),
        }
    return exports


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


def measure_latency(function: Callable[[TensorTree], TensorTree], example: TensorTree) -> float:
    """The median of 10 calls in milliseconds, for one example on this machine's CPU; 2 calls come
    first to warm up.
    """
    milliseconds = []
    for _ in range(12):
        start = time.perf_counter()
        function(example)
        milliseconds.append(1000 * (time.perf_counter() - start))
    return round(statistics.median(milliseconds[2:]), 3)


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
