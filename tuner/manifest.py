"""A published export as it lies on disk: its manifest, checked against its files."""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.config.objective import metric_label
from tuner.config.related_tasks import output_word
from tuner.config.run import PluginConfig, Recipe, Run
from tuner.errors import DataError
from tuner.files import removal
from tuner.files.atomic import file_sha256, lock_of_export, remove_unused_lock, sweep_exports
from tuner.files.removal import MANIFEST
from tuner.messages import OutputSettings

MAX_CLASSES_LISTED = 100  # on a model card
TEST_RESULTS = "test_results.safetensors"  # in an export: what each test example adds to its scores


@dataclass(frozen=True)
class PublishedExport:
    folder: Path
    manifest: dict[str, Any]

    @property
    def run(self) -> Run:
        return run_from_dict(self.manifest["run"])

    def code(self, format_: str) -> dict[str, str]:
        """What a prediction by that format would import and run, by its key in the manifest.

        Names such as `package.module:attribute`.
        """
        run = self.manifest["run"]
        names = {f"run.{part}.name": str(run[part]["name"]) for part in ("task", "model")}
        return {key: name for key, name in {**names, "exports": format_}.items() if ":" in name}


def run_from_dict(tree: Mapping[str, Any]) -> Run:
    """A run from `Run.tree()`, as JSON keeps it."""

    def part(section: Mapping[str, Any]) -> PluginConfig:
        options = {
            k: tuple(v) if isinstance(v, list) else v for k, v in section.items() if k != "name"
        }
        return PluginConfig(section["name"], options)

    return Run(
        part(tree["task"]),
        part(tree["data"]),
        part(tree["model"]),
        Recipe(**tree["recipe"]),
        tree["seed"],
    )


def read_export(folder: Path) -> PublishedExport | None:
    """The export in `folder`; None when there is none.

    Raises DataError when a file is missing or was changed.

    Where another export takes its place meanwhile, that one is read.
    """
    while True:
        text = _text(folder)
        if text is None:
            return None
        try:
            return _read(folder, text)
        except (DataError, FileNotFoundError):
            if _text(folder) == text:
                raise


def replaced(published: PublishedExport) -> bool:
    """Whether another export has taken the place of one that was read."""
    text = _text(published.folder)
    try:
        return text is not None and json.loads(text)["files"] != published.manifest["files"]
    except (ValueError, KeyError, TypeError):
        return True


def _text(folder: Path) -> bytes | None:
    """What the manifest in `folder` says now; None where there is none."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return (folder / MANIFEST).read_bytes()
    return None


def _read(folder: Path, text: bytes) -> PublishedExport:
    """The export in `folder`, whose manifest says `text`."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(text)
        files = dict(manifest["files"])
        loaded = [str(entry["file"]) for entry in manifest["exports"].values()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path}: damaged ({error}); remove the folder and run `tuner export` again"
        ) from None
    strange = [
        name
        for name in (*files, *loaded)
        if name not in files or name.startswith("/") or ".." in Path(name).parts
    ]
    if strange:
        raise DataError(
            f"{path}: names {strange[0]!r}, which is no file that it vouches for in its folder"
        )
    for name, digest in files.items():
        if not (folder / name).is_file():
            raise DataError(
                f"{folder / name}: missing; remove the folder and run `tuner export` again"
            )
        if file_sha256(folder / name) != digest:
            raise DataError(
                f"{folder / name}: changed since it was exported (its SHA-256 differs from "
                f"{MANIFEST}); export again"
            )
    return PublishedExport(folder, manifest)


def is_export_of(manifest: Mapping[str, Any], run: Run, outputs: OutputSettings) -> bool:
    """Whether an export is of a run, with these outputs.

    An export of an earlier version says nothing of its outputs: it has no temperature and no flips.
    It stays as it is where none is stated.
    """
    calibrate = manifest.get("calibrate")
    return (
        manifest["run_digest"] == run.digest()
        and (manifest.get("test_flips") or False) == outputs.test_flips
        and (
            calibrate == outputs.calibrate
            or (calibrate is None and isinstance(outputs.calibrate, str))
        )
    )


def recover_export(folder: Path) -> None:
    """Undoes what a killed export left: the older export comes back, half-written ones go."""
    removal.recover_older(folder)
    removal.remove_arriving(folder)
    sweep_exports(folder.parent)
    if (lock := lock_of_export(folder)).exists():
        remove_unused_lock(lock)


def describe_comparison(m: Mapping[str, Any]) -> str | None:
    """How far the model's score is from the default recipe's on the test examples, in one sentence.

    None where they were not compared. Scores from 0 to 1 are told in points, which are hundredths.
    """
    comparison = m.get("comparison")
    if comparison is None:
        return None
    if "difference" not in comparison:
        return "the default recipe won: the search found nothing better"
    score, metric = m["scores"]["test"][comparison["metric"]], comparison["metric"]
    in_points = all(0 <= value <= 1 for value in (score, comparison["default_scores"][metric]))
    unit = "points" if in_points else metric_label(metric)
    sign = -1 if m.get("direction") == "minimise" else 1

    def signed(value: float) -> str:
        return f"{100 * value:+.1f}" if in_points else f"{value:+.4f}"

    told = f"{signed(comparison['difference'])} {unit} over the default recipe on the test examples"
    if comparison["interval"] is None:
        return f"{told}, without an interval: the task keeps no results of single examples"
    low, high = comparison["interval"]
    noise = (m.get("confirmation") or {}).get("deviation")
    of_noise = "" if noise is None else f"; seed noise {signed(noise)[1:]}"
    told += f" ({100 * comparison['confidence']:g} %: {signed(low)} to {signed(high)}{of_noise})"
    if sign == -1:
        told += ", where less is better"
    if min(sign * low, sign * high) > 0:
        return told
    if max(sign * low, sign * high) < 0:
        return f"{told}: the default recipe is better"
    return f"{told}: within the noise of {m['examples']['test']:,} test examples"


def averaged_runs(soup: Mapping[str, Any] | None) -> list[str]:
    """The digests of the runs whose weights were averaged; empty where the winner is alone."""
    if soup is None or not soup["taken"]:
        return []
    return [entry["run_digest"] for entry in soup["tried"] if entry["stays"]]


def describe_soup(m: Mapping[str, Any]) -> str | None:
    """What an export is an average of, or that no average was better, in one sentence.

    None where none was tried.
    """
    soup = m.get("soup")
    if soup is None:
        return None
    winner, label = soup["tried"][0]["trial"], metric_label(soup["metric"])
    score = f"{soup['winner_score']:.4f} on validation"
    if "failed" in soup:
        return f"no soup: trial {soup['failed']['trial']} again: {soup['failed']['reason']}"
    if not soup["taken"]:
        others = ", ".join(str(entry["trial"]) for entry in soup["tried"][1:])
        return f"trial {winner} alone: no soup with {others} is better than its {label} of {score}"
    trials = ", ".join(str(entry["trial"]) for entry in soup["tried"] if entry["stays"])
    return (
        f"soup of trials {trials}: {label} {soup['score']:.4f} on validation against "
        f"{soup['winner_score']:.4f} of trial {winner} alone"
    )


def describe_outputs(m: Mapping[str, Any]) -> str:
    """What is done with the model's outputs, as paragraphs for the model card; empty: nothing."""
    paragraphs = ""
    if m.get("temperature") is not None:
        paragraphs += (
            f"\nThe export divides its logits by the temperature {m['temperature']:g}, so that its "
            "probabilities are calibrated (temperature scaling: Guo et al., ICML 2017). The test "
            "scores are those of these probabilities, the validation scores those before.\n"
        )
    if m.get("thresholds"):
        pairs = [f"{n} {t:g}" for n, t in zip(m["classes"], m["thresholds"], strict=True)]
        listed = ", ".join(pairs[:MAX_CLASSES_LISTED])
        paragraphs += (
            "\nAn example has a label from this probability on, which `tuner predict` uses and at "
            f"which the scores of decisions are, such as F1: {listed}.\n"
        )
    if m.get("target_scale"):
        paragraphs += (
            "\nThe model was trained on standardised targets. The export contains the way back, so "
            "that its outputs are in the units of the data.\n"
        )
    if m.get("test_flips"):
        paragraphs += (
            "\nThe test scores are those of the mean of the outputs for each image and its mirror "
            "image. `tuner predict` takes this mean too, unless `--no-flips` is given; a program "
            "that calls the export has to do so itself.\n"
        )
    return paragraphs


def describe_frozen(recipe: Mapping[str, Any]) -> str:
    """What of a model was frozen, and what adapters were trained, in words."""
    share, lora = recipe.get("freeze"), recipe.get("lora")
    frozen = f"freeze depth {recipe['freeze_depth']}" if share is None else f"freeze {share:.0%}"
    if lora and lora["rank"]:
        return f"{frozen}, adapters of rank {lora['rank']} and alpha {lora['alpha']:g}"
    return frozen


def format_model_card(m: Mapping[str, Any]) -> str:
    """MODEL_CARD.md: what the model is, how it was found, how well it does, how to call it."""
    run, metric = m["run"], m["metric"]
    recipe = run["recipe"]
    valid, test = m["scores"]["valid"], m["scores"]["test"]
    scores = "\n".join(
        f"| {metric_label(name)} | {_format_score(valid.get(name))} "
        f"| {_format_score(test.get(name))} |"
        for name in test
    )
    exports = "\n".join(
        f"| {e['file']} | {name} | {e['largest_difference']:.1e} | {e['milliseconds']:g} "
        f"| {_format_megabytes(e)} |"
        for name, e in m["exports"].items()
    )
    listed = ", ".join(m["classes"][:50]) + (" …" if len(m["classes"]) > 50 else "")
    outputs = output_word(run["task"]["name"])
    classes = f", {len(m['classes'])} {outputs}: {listed}" if m["classes"] else ""
    model, examples = run["model"], m["examples"]
    weights = model.get("weights", "the model's own")
    data_name = run["data"].get("path") or run["data"]["name"]
    described_recipe = (
        f"{recipe['optimizer']}, lr {recipe['lr']:g}, momentum {recipe['momentum']:g}, "
        f"{describe_frozen(recipe)}, "
        f"{recipe['stop_epoch'] or recipe['epochs']} epochs, "
        f"batch {recipe['batch_size']}, learnt from {recipe['fit']}"
    )
    described_data = (
        f"{examples['train']} training, {examples['valid']} validation, {examples['test']} test"
    )
    study = f"study `{m['study']}` (trial {m['trial']})"
    which = "lowest" if m.get("direction") == "minimise" else "highest"
    sentence = describe_comparison(m)
    compared = f"\n{sentence[0].upper()}{sentence[1:]}.\n" if sentence else ""
    averaged = describe_soup(m)
    soup = f"\n| weights | {averaged} |" if averaged else ""
    return f"""# {model["name"]} fine-tuned on {data_name}

Found by `tuner` {m["tuner"]} in {study}, searched for the {which} {metric_label(metric)}.

| | |
|---|---|
| task | {run["task"]["name"].replace("_", " ")}{classes} |
| model | {model["name"]}, {m["parameters"]:,} parameters, weights: {weights} |
| data | {described_data} examples |
| recipe | {described_recipe} |{soup}

## Scores

| | validation (during the search) | test (once, at the end) |
|---|---|---|
{scores}
{compared}{describe_outputs(m)}
{_format_classes(m["scores"].get("per_class", {}))}
## Use

{_format_usage(m)}

| file | format | largest difference from the trained model | ms for one example, CPU | MB |
|---|---|---|---|---|
{exports}
{describe_formats(m)}"""


def describe_check(entry: Mapping[str, Any]) -> str:
    """How a format was compared with the model: by its outputs, or by its validation score."""
    if "validation_score" not in entry:
        return f"verified to {entry['largest_difference']:.0e}"
    scores = f"{entry['validation_score']:.4f}, the model {entry['model_validation_score']:.4f}"
    return f"lossy: on validation {scores}"


def _format_megabytes(entry: Mapping[str, Any]) -> str:
    """The size of a format; exports of earlier versions do not say it."""
    return f"{entry['megabytes']:.1f}" if "megabytes" in entry else ""


def describe_formats(m: Mapping[str, Any]) -> str:
    """How the formats were measured, what lossy ones score and what was left out, as paragraphs."""
    paragraphs = ""
    measured = m.get("measured")
    if measured is not None:
        paragraphs += (
            f"\nMeasured at the export in one process: the median of {measured['calls']} calls "
            f"with one example, {measured['threads']} threads, {measured['machine']}.\n"
        )
    for name, entry in m["exports"].items():
        if "validation_score" in entry:
            calibrated = (
                f", calibrated on {entry['calibration_examples']} validation examples"
                if "calibration_examples" in entry
                else ""
            )
            paragraphs += (
                f"\n{name}{calibrated}: validation {metric_label(m['metric'])} "
                f"{entry['validation_score']:.4f} on {entry['validation_examples']:,} examples, "
                f"the model itself {entry['model_validation_score']:.4f}; it was published because "
                f"it loses at most {entry['allowed_loss']:g}.\n"
            )
    for name, reason in m.get("left_out", {}).items():
        paragraphs += f"\n{name} was not published: {reason}.\n"
    return paragraphs


def _format_classes(per_class: Mapping[str, Mapping[str, float]]) -> str:
    """The table of the classes' test scores, the worst class first; empty where there are none."""
    if not per_class:
        return ""
    if "f1" not in next(iter(per_class.values())):
        return _format_targets(per_class)
    worst_first = sorted(per_class.items(), key=lambda pair: pair[1]["f1"])
    rows = [
        f"| {name.replace('|', chr(92) + '|')} | {c['precision']:.4f} | {c['recall']:.4f} "
        f"| {c['f1']:.4f} | {c['examples']} |"
        for name, c in worst_first[:MAX_CLASSES_LISTED]
    ]
    more = len(per_class) - MAX_CLASSES_LISTED
    note = f"\n\n{more} further classes, all with a higher F1, are in `manifest.json`."
    table = "\n".join(rows)
    return f"""
Of each class on the test examples, by rising F1:

| class | precision | recall | F1 | examples |
|---|---|---|---|---|
{table}{note if more > 0 else ""}
"""


def _format_targets(per_target: Mapping[str, Mapping[str, float]]) -> str:
    """The table of the test scores of numbers, by target."""
    rows = [
        f"| {name.replace('|', chr(92) + '|')} | {c['r2']:.4f} | {c['mae']:.6g} | {c['rmse']:.6g} |"
        for name, c in list(per_target.items())[:MAX_CLASSES_LISTED]
    ]
    table = "\n".join(rows)
    return f"""
Of each target on the test examples, errors in its own units:

| target | R² | MAE | RMSE |
|---|---|---|---|
{table}
"""


def _format_usage(m: Mapping[str, Any]) -> str:
    """What goes in and what comes out."""
    p, output = m["preprocess"], f"Output: {m['output']['meaning']}."
    if p["kind"] == "tokens":
        return (
            f"Input: {', '.join(p['leaves'])}, int64, batch x at most {p['length']} tokens, by "
            f"the tokenizer in `tokenizer/`. {output}"
        )
    fits = {
        "crop": f"shorter side resized to {p['resize']} ({p['interpolation']}), centre crop",
        "letterbox": f"longer side resized to {p['size']} ({p['interpolation']}), "
        "the rest grey (114), centred",
        "stretch": f"both sides resized to {p['size']} ({p['interpolation']})",
    }
    return (
        f"Input: RGB in 0..1, float32, batch x 3 x {p['size']} x {p['size']}: {fits[p['fit']]}. "
        f"The normalisation is inside the model. {output}"
    )


def _format_score(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
