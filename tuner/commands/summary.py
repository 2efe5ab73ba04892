"""The result of a study: the winner, the default recipe beside it, the test, the exports.

After these come the commands that a person may want to type next.
"""

import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from tuner.commands.progress import Progress
from tuner.commands.trial_line import format_value
from tuner.config.objective import Direction, is_improvement, metric_label
from tuner.config.run import Run
from tuner.manifest import (
    PublishedExport,
    averaged_runs,
    describe_check,
    describe_comparison,
    describe_soup,
)
from tuner.search.confirmation import Confirmed
from tuner.search.leases import CoordinatorInfo

STANDARD_ERRORS = 3  # of the difference between validation and test accuracy that are worth a word


@dataclass(frozen=True)
class Summary:
    """The result of one command that worked on a study.

    `tied_numbers`: the trials with the winner's score. `anything_new`: this command added
    something to the study. `default_trial`: the trial of the default recipe. `made_elsewhere`: the
    coordinator that makes the winner's export, where that is another one. `confirmed`: the repeats
    of the best trials. `beaten`: the best trial, where the default recipe has won because it is as
    good within `noise`, the standard error of their difference.
    """

    folder: Path
    metric: str
    progress: Progress
    winner: FrozenTrial
    tied_numbers: list[int]
    run: Run
    published: PublishedExport | None
    anything_new: bool
    default_trial: FrozenTrial | None = None
    made_elsewhere: CoordinatorInfo | None = None
    direction: Direction = "maximise"
    confirmed: Confirmed | None = None
    beaten: FrozenTrial | None = None
    noise: float = 0.0


def summary_values(summary: Summary) -> dict[str, Any]:
    """The summary as --json prints it."""
    default = summary.default_trial
    return {
        "study": summary.folder.name,
        "folder": str(summary.folder),
        "trial": summary.winner.number,
        "value": summary.winner.value,
        "default": default.value if default else None,
        "params": summary.winner.params,
        "test": summary.published.manifest["scores"]["test"] if summary.published else None,
        "confirmed": summary.confirmed.to_dict(summary.metric) if summary.confirmed else None,
        "beaten": summary.beaten.number if summary.beaten else None,
        "comparison": summary.published.manifest.get("comparison") if summary.published else None,
        "soup": summary.published.manifest.get("soup") if summary.published else None,
        "export": str(summary.published.folder) if summary.published else None,
    }


def summary_lines(summary: Summary) -> Iterator[str]:
    """The summary as a person reads it."""
    winner, progress, metric = summary.winner, summary.progress, metric_label(summary.metric)
    if not summary.anything_new:
        yield f"nothing left to do: {why_nothing_is_left(progress)}"
    yield ""
    best_epoch = f"epoch {winner.user_attrs['best_epoch']} of {max(winner.intermediate_values)}"
    yield f"best     #{winner.number}, validation {metric} {winner.value:.4f} in {best_epoch}"
    if winner.params:
        yield f"         {'  '.join(f'{k} {format_value(v)}' for k, v in winner.params.items())}"
    if summary.tied_numbers:
        tied = ", ".join(f"#{number}" for number in summary.tied_numbers)
        yield f"         tied with {tied}; chosen for fewer epochs, then the lower number"
    if summary.confirmed is not None:
        yield from confirmed_lines(summary.confirmed)
    yield from default_lines(summary)
    if summary.published is not None:
        yield from export_lines(summary.published, summary.metric)
    if summary.made_elsewhere is not None:
        yield (
            f"export   by {summary.made_elsewhere}, into {summary.made_elsewhere.folder}/export; "
            "should it not come to that, run the same command"
        )
    report = "" if summary.made_elsewhere else ", with report.html"
    yield f"study    {summary.folder}{report}"
    yield ""
    yield from next_steps(summary)


def why_nothing_is_left(progress: Progress) -> str:
    """Why a search that goes on adds nothing, and what would have it go on."""
    used, budget = progress.budget_used, progress.budget
    if used >= budget and progress.is_whole:
        tried = "1 trial is" if budget == 1 else f"the {budget} different trials are"
        return f"{tried} all that the file describes; give more keys a range to go on"
    if used >= budget:
        return f"{used} of {budget} trials are done; raise search.trials to go on"
    of = "" if progress.is_open else f" of {budget}"
    return f"the search ended after {used}{of} trials by search.stop, search.target or the time"


def default_lines(summary: Summary) -> Iterator[str]:
    """How good the default recipe is beside the best trial, or why it has won."""
    default, beaten, winner = summary.default_trial, summary.beaten, summary.winner
    if default is None or default.value is None:
        return
    compared = compare_with_best(default.value, float(winner.value or 0), summary.direction)
    if beaten is not None:
        compared = f"taken: #{beaten.number} has {beaten.value:.4f},"
    elif default.number == winner.number:
        compared = "the best itself"
    label = metric_label(summary.metric)
    yield f"default  #{default.number}, validation {label} {default.value:.4f}, {compared}"
    if beaten is not None:
        yield f"         which is within the noise of the validation examples ({summary.noise:.4f})"


def compare_with_best(value: float, best: float, direction: Direction) -> str:
    """How far a value is from the best one. The better ones are above it, or below it."""
    worse, better = ("above", "below") if direction == "minimise" else ("below", "above")
    if is_improvement(value, best, direction):  # the repeats have chosen another trial
        return f"{abs(best - value):.4f} {better} the winner there, but not in the repeats"
    return f"{abs(best - value):.4f} {worse} the best, on the examples that chose it"


def confirmed_lines(confirmed: Confirmed) -> Iterator[str]:
    """What the repeats of the best trials gave."""
    winner, count = confirmed.winner, len(confirmed.winner.scores)
    noise = "" if winner.deviation is None else f", seed noise {winner.deviation:.4f}"
    times = f"{count} repeats" if count > 1 else "1 repeat"
    yield f"         confirmed {winner.mean:.4f} in {times} with other seeds and splits{noise}"
    others = [
        f"#{c.trial.number} {c.mean:.4f}" if c.is_usable else f"#{c.trial.number} failed"
        for c in confirmed.candidates
        if c is not winner
    ]
    if others:
        why = "; the best within noise, and cheaper" if confirmed.is_cheaper else ""
        yield f"         beside {', '.join(others)}{why}"


def export_lines(published: PublishedExport, metric: str) -> Iterator[str]:
    m = published.manifest
    if averaged := describe_soup(m):
        yield f"weights  {averaged}"
    score, count = m["scores"]["test"][metric], m["examples"]["test"]
    yield f"test     {metric_label(metric)} {score:.4f} on {count:,} examples used for nothing else"
    if compared := describe_comparison(m):
        difference, bracket, interval = compared.partition(" (")
        yield f"         {difference}"
        if bracket:
            yield f"         ({interval}"
    yield from validation_gap_lines(m["scores"], m["examples"])
    yield f"export   {published.folder}"
    width = max((len(e["file"]) for e in m["exports"].values()), default=0)
    for kind, e in m["exports"].items():
        size = (published.folder / e["file"]).stat().st_size / 1e6
        megabytes = e.get("megabytes", size)
        verified = f"{kind}, {describe_check(e)}"
        yield f"         {e['file']:<{width}}  {megabytes:>6.1f} MB  {verified}"
    for kind, reason in m.get("left_out", {}).items():
        yield f"         {kind} was not published: {reason}"


def validation_gap_lines(
    scores: Mapping[str, Mapping[str, float]], examples: Mapping[str, int]
) -> Iterator[str]:
    """A line if the test accuracy is far below the validation accuracy, or none.

    Far is more than STANDARD_ERRORS of the difference of two proportions (the pooled z-test). This
    holds for accuracy alone, the share of examples that are right; of other scores the standard
    error does not follow from the number of examples.

    Args:
        scores: the scores of the splits `valid` and `test`, by metric.
        examples: the number of examples of each split.
    """
    valid, test = (scores[split].get("accuracy", math.nan) for split in ("valid", "test"))
    if not (0 <= valid <= 1 and 0 <= test <= 1):  # a task of the user's own may count in percent
        return
    valid_count, test_count = examples["valid"], examples["test"]
    pooled = (valid * valid_count + test * test_count) / (valid_count + test_count)
    error = math.sqrt(pooled * (1 - pooled) * (1 / valid_count + 1 / test_count))
    if valid - test > STANDARD_ERRORS * error:
        yield (
            f"         {valid - test:.4f} below the validation accuracy, "
            f"{(valid - test) / error:.1f} standard errors: the test examples differ from the "
            "others, the search fitted"
        )
        yield (
            f"         its {valid_count:,} validation examples, or the retraining failed; "
            "search.retrain: false exports the trial's own weights"
        )


def next_steps(summary: Summary) -> Iterator[str]:
    at_home = (
        summary.folder.parent.name == "studies"
        and summary.folder.parent.parent.resolve() == Path.cwd()
    )
    studies = "" if at_home else f" --studies {shlex.quote(str(summary.folder.parent))}"
    name = shlex.quote(summary.folder.name)
    steps = [(f"tuner dashboard {name}{studies}", "every trial in the browser")]
    if summary.published is not None:
        example = (
            "TEXT" if summary.published.manifest["preprocess"]["kind"] == "tokens" else "IMAGE"
        )
        own = bool(summary.published.code("safetensors"))
        before, after = ("PYTHONPATH=. ", " --trust") if own else ("", "")
        steps.append(
            (
                f"{before}tuner predict {name} {example}…{studies}{after}",
                "what it says of your own",
            )
        )
        steps.append(
            (
                f"{before}tuner test {name} NEW_DATA{studies}{after}",
                "its score on new labelled data",
            )
        )
    steps.append((f"tuner export {name} --trial N{studies}", "another trial's model"))
    if summary.made_elsewhere is None:
        soup = summary.published.manifest.get("soup") if summary.published else None
        alone = " alone, without the soup" if averaged_runs(soup) else ""
        best = shlex.quote(str(summary.folder / "best.yaml"))
        steps.append((f"tuner train {best}", f"repeat the winner{alone}"))
    yield "next:"
    width = max(len(command) for command, _ in steps)
    for command, why in steps:
        yield f"  {command:<{width}}   {why}"
