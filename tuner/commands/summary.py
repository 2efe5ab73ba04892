"""What a study came to: the best, how the default recipe compares, the test, the exports, and what to type next."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from tuner.commands.trial_line import format_value
from tuner.config.run import Run
from tuner.manifest import PublishedExport
from tuner.search.coordinator import Coordinator
from tuner.search.leases import CoordinatorInfo


@dataclass(frozen=True)
class Summary:
    """`tied`: the trials that scored the same as the winner. `fresh`: this command added something to the study.

    `default`: the trial of the default recipe. `elsewhere`: the coordinator that makes the winner, where that is another one.
    """

    folder: Path
    coordinator: Coordinator
    winner: FrozenTrial
    tied_numbers: list[int]
    run: Run
    published: PublishedExport | None
    anything_new: bool
    default_trial: FrozenTrial | None = None
    made_elsewhere: CoordinatorInfo | None = None

    @property
    def metric(self) -> str:
        return str(self.coordinator.search_settings.metric).replace("_", " ")


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
        "export": str(summary.published.folder) if summary.published else None,
    }


def summary_lines(summary: Summary) -> Iterator[str]:
    """The summary as a person reads it."""
    winner, coordinator = summary.winner, summary.coordinator
    if not summary.anything_new:
        yield f"nothing left to do: {coordinator.budget_used} of {coordinator.proposer.trial_budget()} trials are done; raise search.trials to go on"
    yield ""
    best_epoch = f"epoch {winner.user_attrs['best_epoch']} of {max(winner.intermediate_values)}"
    yield f"best     #{winner.number}, validation {summary.metric} {winner.value:.4f} in {best_epoch}"
    if winner.params:
        yield f"         {'  '.join(f'{k} {format_value(v)}' for k, v in winner.params.items())}"
    if summary.tied_numbers:
        yield f"         tied with {', '.join(f'#{n}' for n in summary.tied_numbers)}; chosen for fewer epochs, then the lower number"
    default = summary.default_trial
    if default is not None and default.value is not None:
        below = f"{float(winner.value or 0) - default.value:.4f} below the best, on the examples that it was chosen by"
        compared = "the best itself" if default.number == winner.number else below
        yield f"default  #{default.number}, validation {summary.metric} {default.value:.4f}, {compared}"
    if summary.published is not None:
        yield from export_lines(
            summary.published, summary.metric, str(coordinator.search_settings.metric)
        )
    if summary.made_elsewhere is not None:
        yield f"export   by {summary.made_elsewhere}, into {summary.made_elsewhere.folder}/export; should it not come to that, run the same command"
    yield f"study    {summary.folder}"
    yield ""
    yield from next_steps(summary)


def export_lines(published: PublishedExport, spoken: str, metric: str) -> Iterator[str]:
    m = published.manifest
    yield f"test     {spoken} {m['scores']['test'][metric]:.4f} on {m['examples']['test']:,} examples used for nothing else"
    yield f"export   {published.folder}"
    width = max((len(e["file"]) for e in m["exports"].values()), default=0)
    for kind, e in m["exports"].items():
        size = (published.folder / e["file"]).stat().st_size / 1e6
        yield f"         {e['file']:<{width}}  {size:>6.1f} MB  {kind}, verified to {e['largest_difference']:.0e}"


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
    steps.append((f"tuner export {name} --trial N{studies}", "another trial's model"))
    if summary.made_elsewhere is None:
        steps.append(
            (f"tuner train {shlex.quote(str(summary.folder / 'best.yaml'))}", "repeat the winner")
        )
    yield "next:"
    width = max(len(command) for command, _ in steps)
    for command, why in steps:
        yield f"  {command:<{width}}   {why}"
