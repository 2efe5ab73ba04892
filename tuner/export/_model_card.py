"""MODEL_CARD.md of an export: what the model is, how it was found, how well it does."""

import math
from collections.abc import Mapping
from typing import Any

from tuner.config.objective import metric_label
from tuner.config.related_tasks import output_word
from tuner.manifest import describe_comparison, describe_soup

MAX_CLASSES_LISTED = 100
# the scores of each class and the heads of their columns, by the score that says which is the worst
CLASS_COLUMNS: Mapping[str, Mapping[str, str]] = {
    "f1": {"precision": "precision", "recall": "recall", "f1": "F1", "examples": "examples"},
    "average_precision": {
        "average_precision": "average precision",
        "average_recall": "average recall",
        "objects": "objects",
    },
    "iou": {
        "iou": "IoU",
        "dice": "Dice",
        "recall": "recall",
        "precision": "precision",
        "pixels": "pixels",
    },
}


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


def _format_megabytes(entry: Mapping[str, Any]) -> str:
    """The size of a format; exports of earlier versions do not say it."""
    return f"{entry['megabytes']:.1f}" if "megabytes" in entry else ""


def _format_calls(m: Mapping[str, Any]) -> str:
    """How often the formats were called; earlier versions called all of them equally often."""
    counts = {entry.get("calls", m["measured"].get("calls")) for entry in m["exports"].values()}
    counts.discard(None)
    least, most = min(counts), max(counts)
    return f"{most} calls" if least == most else f"{least} to {most} calls"


def describe_formats(m: Mapping[str, Any]) -> str:
    """How the formats were measured, what lossy ones score and what was left out, as paragraphs."""
    paragraphs = ""
    measured = m.get("measured")
    if measured is not None:
        paragraphs += (
            f"\nMeasured at the export in one process: the median of {_format_calls(m)} "
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
    known = (key for key in CLASS_COLUMNS if any(key in c for c in per_class.values()))
    main = next(known, None)
    if main is None:
        return _format_targets(per_class)
    columns = CLASS_COLUMNS[main]
    worst_first = sorted(per_class.items(), key=lambda pair: pair[1].get(main, math.inf))
    rows = [
        f"| {name.replace('|', chr(92) + '|')} | "
        + " | ".join(_format_class_score(scores.get(key)) for key in columns)
        + " |"
        for name, scores in worst_first[:MAX_CLASSES_LISTED]
    ]
    more, label = len(per_class) - MAX_CLASSES_LISTED, columns[main]
    note = f"\n\n{more} further classes, all with a higher {label}, are in `manifest.json`."
    table = "\n".join(rows)
    return f"""
Of each class on the test examples, by rising {label}:

| class | {" | ".join(columns.values())} |
|{"---|" * (len(columns) + 1)}
{table}{note if more > 0 else ""}
"""


def _format_class_score(value: float | None) -> str:
    """A score of a class, or a count; a dash for 0 of 0."""
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.4f}"


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
