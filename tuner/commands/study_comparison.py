"""`tuner compare`: the winners of several studies, on the same test examples where that is so."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from tuner.commands.columns import align_columns
from tuner.commands.study_view import StudyView, open_view
from tuner.config.objective import Direction, metric_label
from tuner.errors import SpaceError
from tuner.manifest import TEST_RESULTS, PublishedExport

SEED = 0  # of the bootstrap: the same answer each time
# keys of `data:` that change how an example looks, or what is trained on, but not which examples
# are tested: a cross-validation never moves the test part
LOOK_KEYS = {"size", "resize", "fit", "interpolation", "augment", "views", "length"}
LOOK_KEYS |= {"mean", "std", "folds", "fold"}
PLACES = {"path", "images"}  # the same data may lie elsewhere, as their digest says


@dataclass(frozen=True)
class Difference:
    """A study's test score minus that of the first study.

    `interval` is that of a paired bootstrap with 95 %, or None where `unpaired` says why not.
    """

    value: float
    interval: tuple[float, float] | None = None
    unpaired: str = ""


def print_comparison(studies: Path, names: list[str], *, as_json: bool) -> None:
    """Prints the winners of studies under each other, and what the others differ from the first.

    Raises SpaceError where fewer than two studies are named, DataError where one is not there.
    """
    if len(names) < 2:
        raise SpaceError("name at least two studies: `tuner compare A B`; `tuner ls` lists them")
    views = [open_view(studies, name) for name in names]
    metric = views[0].metric
    rows = [winner_values(view, metric) for view in views]
    differences = [compare_tests(views[0], view, metric) for view in views[1:]]
    for row, difference in zip(rows[1:], differences, strict=True):
        if difference is not None:
            row["difference"], row["interval"] = difference.value, difference.interval
            row["unpaired"] = difference.unpaired or None
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row))
        return
    for line in comparison_lines(rows, metric, differences, views[0].direction):
        typer.echo(line)


def winner_values(view: StudyView, metric: str) -> dict[str, Any]:
    """One study's winner as --json prints it. Raises DataError where its export is damaged."""
    manifest = view.published.manifest if view.published else None
    number = manifest["trial"] if manifest else view.ranked[0].number if view.ranked else None
    trial = view.trial(number) if number is not None else None
    scores = trial.user_attrs.get("scores", {}) if trial else {}
    value = scores.get(metric)
    if value is None and trial is not None and view.metric == metric:
        value = trial.value
    return {
        "study": view.name,
        "trial": number,
        "model": manifest["run"]["model"]["name"] if manifest else None,
        "metric": metric,
        "valid": value,
        "test": manifest["scores"]["test"].get(metric) if manifest else None,
        "examples": manifest["examples"]["test"] if manifest else None,
        "parameters": manifest["parameters"] if manifest else None,
        "params": trial.params if trial else {},
        "trials": view.budget_used,
    }


def compare_tests(first: StudyView, other: StudyView, metric: str) -> Difference | None:
    """The test score of another study's winner minus the first one's.

    None where one of them has no test score. The scores are paired where both exports keep the
    results of the same test examples.
    """
    if first.published is None or other.published is None:
        return None
    exports = first.published, other.published
    scores = [published.manifest["scores"]["test"].get(metric) for published in exports]
    if None in scores:
        return None
    value = scores[1] - scores[0]
    reason = why_not_paired(first.published, other.published)
    if reason:
        return Difference(value, unpaired=reason)
    return paired_difference(first.published, other.published, metric, value)


def why_not_paired(first: PublishedExport, other: PublishedExport) -> str:
    """Why two tests cannot be paired by example, as far as their manifests tell; else empty."""
    for published in (first, other):
        if not (published.folder / TEST_RESULTS).is_file():
            return f"{published.folder} keeps no results of single test examples"
        if ":" in published.run.task.name:
            return f"the task {published.run.task.name} is code of your own, which is not run here"
    if first.run.task.name != other.run.task.name:
        return "the tasks differ"
    if first.manifest["classes"] != other.manifest["classes"]:
        return "the classes differ"
    differing = differing_keys(first.manifest["run"]["data"], other.manifest["run"]["data"])
    if first.manifest["data_digest"] == other.manifest["data_digest"]:
        differing = [key for key in differing if key not in PLACES]
    return f"the test examples differ (data.{', data.'.join(differing)})" if differing else ""


def differing_keys(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The keys of two `data:` sections that choose other examples."""
    keys = (one.keys() | other.keys()) - LOOK_KEYS
    return sorted(key for key in keys if one.get(key) != other.get(key))


def paired_difference(
    first: PublishedExport, other: PublishedExport, metric: str, value: float
) -> Difference:
    """The difference with the interval of a paired bootstrap."""
    from tuner.training.building import build_task
    from tuner.training.tested_runs import TestedRun, compare_tested_runs

    try:
        contents = [(p.folder / TEST_RESULTS).read_bytes() for p in (first, other)]
        one, two = map(TestedRun.from_bytes, contents)
    except (TypeError, KeyError, ValueError):
        return Difference(value, unpaired="another version of tuner kept its test results")
    targets = [tested.results.get("target") for tested in (one, two)]
    if one.count != two.count or (
        targets[0] is not None
        and targets[1] is not None
        and targets[0].tolist() != targets[1].tolist()
    ):
        return Difference(value, unpaired="the data was changed between the two studies")
    task = build_task(first.run, tuple(first.manifest["classes"]))
    compared = compare_tested_runs(task, metric, two, one, SEED)
    interval = compared["interval"]
    if interval is None:
        return Difference(value, unpaired="the task keeps no results of single examples")
    return Difference(value, (interval[0], interval[1]))


def comparison_lines(
    rows: list[dict[str, Any]],
    metric: str,
    differences: list[Difference | None],
    direction: Direction,
) -> list[str]:
    """What a person reads: a table, and a sentence for each study beside the first."""
    label = metric_label(metric)
    header = ("study", "trial", "model", f"validation {label}", f"test {label}", "test examples")

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    cells = [
        (
            row["study"],
            "-" if row["trial"] is None else f"#{row['trial']}",
            row["model"] or "-",
            shown(row["valid"]),
            shown(row["test"]),
            "-" if row["examples"] is None else f"{row['examples']:,}",
        )
        for row in rows
    ]
    lines = [*align_columns(header, cells, (3, 4, 5)), ""]
    for row, difference in zip(rows[1:], differences, strict=True):
        lines.append(sentence(rows[0]["study"], row["study"], metric, difference, direction))
    return lines


def sentence(
    first: str, other: str, metric: str, difference: Difference | None, direction: Direction
) -> str:
    """One difference in words."""
    if difference is None:
        return f"{other}: no test score to compare; `tuner run` or `tuner export` makes one"
    begin = f"{other}: {difference.value:+.4f} test {metric_label(metric)} against {first}"
    if difference.interval is None:
        return f"{begin}; not paired by test example: {difference.unpaired}"
    low, high = difference.interval
    begin = f"{begin} (95 %: {low:+.4f} to {high:+.4f}, paired by test example)"
    if low <= 0 <= high:
        return f"{begin}: within noise"
    is_better = (low > 0) == (direction == "maximise")
    return f"{begin}: {'better' if is_better else 'worse'}"
