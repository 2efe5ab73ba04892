"""What a study came to: the best, how the default recipe compares, the test, the exports, and what to type next."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from tuner.commands.trial_line import shown
from tuner.config.run import Run
from tuner.manifest import Published
from tuner.search.coordinator import Coordinator
from tuner.search.leases import Holder


@dataclass(frozen=True)
class Summary:
    """`tied`: the trials that scored the same as the winner. `fresh`: this command added something to the study.

    `default`: the trial of the default recipe. `elsewhere`: the coordinator that makes the winner, where that is another one.
    """

    folder: Path
    coordinator: Coordinator
    winner: FrozenTrial
    tied: list[int]
    run: Run
    published: Published | None
    fresh: bool
    default: FrozenTrial | None = None
    elsewhere: Holder | None = None

    @property
    def metric(self) -> str:
        return str(self.coordinator.search.metric).replace("_", " ")


def values(s: Summary) -> dict[str, Any]:
    """The summary as --json prints it."""
    default = s.default
    return {
        "study": s.folder.name,
        "folder": str(s.folder),
        "trial": s.winner.number,
        "value": s.winner.value,
        "default": default.value if default else None,
        "params": s.winner.params,
        "test": s.published.manifest["scores"]["test"] if s.published else None,
        "export": str(s.published.folder) if s.published else None,
    }


def lines(s: Summary) -> Iterator[str]:
    """The summary as a person reads it."""
    winner, coordinator = s.winner, s.coordinator
    if not s.fresh:
        yield f"nothing left to do: {coordinator.closed} of {coordinator.asker.budget()} trials are done; raise search.trials to go on"
    yield ""
    best_epoch = f"epoch {winner.user_attrs['best_epoch']} of {max(winner.intermediate_values)}"
    yield f"best     #{winner.number}, validation {s.metric} {winner.value:.4f} in {best_epoch}"
    if winner.params:
        yield f"         {'  '.join(f'{k} {shown(v)}' for k, v in winner.params.items())}"
    if s.tied:
        yield f"         tied with {', '.join(f'#{n}' for n in s.tied)}; chosen for fewer epochs, then the lower number"
    default = s.default
    if default is not None and default.value is not None:
        below = f"{float(winner.value or 0) - default.value:.4f} below the best, on the examples that it was chosen by"
        compared = "the best itself" if default.number == winner.number else below
        yield f"default  #{default.number}, validation {s.metric} {default.value:.4f}, {compared}"
    if s.published is not None:
        yield from outcome(s.published, s.metric, str(coordinator.search.metric))
    if s.elsewhere is not None:
        yield f"export   by {s.elsewhere}, into {s.elsewhere.folder}/export; should it not come to that, run the same command"
    yield f"study    {s.folder}"
    yield ""
    yield from next_steps(s)


def outcome(published: Published, spoken: str, metric: str) -> Iterator[str]:
    m = published.manifest
    yield f"test     {spoken} {m['scores']['test'][metric]:.4f} on {m['examples']['test']:,} examples used for nothing else"
    yield f"export   {published.folder}"
    width = max((len(e["file"]) for e in m["exports"].values()), default=0)
    for kind, e in m["exports"].items():
        size = (published.folder / e["file"]).stat().st_size / 1e6
        yield f"         {e['file']:<{width}}  {size:>6.1f} MB  {kind}, verified to {e['largest_difference']:.0e}"


def next_steps(s: Summary) -> Iterator[str]:
    at_home = s.folder.parent.name == "studies" and s.folder.parent.parent.resolve() == Path.cwd()
    studies = "" if at_home else f" --studies {shlex.quote(str(s.folder.parent))}"
    name = shlex.quote(s.folder.name)
    steps = [(f"tuner dashboard {name}{studies}", "every trial in the browser")]
    if s.published is not None:
        example = "TEXT" if s.published.manifest["preprocess"]["kind"] == "tokens" else "IMAGE"
        own = bool(s.published.code("safetensors"))
        before, after = ("PYTHONPATH=. ", " --trust") if own else ("", "")
        steps.append(
            (
                f"{before}tuner predict {name} {example}…{studies}{after}",
                "what it says of your own",
            )
        )
    steps.append((f"tuner export {name} --trial N{studies}", "another trial's model"))
    if s.elsewhere is None:
        steps.append(
            (f"tuner train {shlex.quote(str(s.folder / 'best.yaml'))}", "repeat the winner")
        )
    yield "next:"
    width = max(len(command) for command, _ in steps)
    for command, why in steps:
        yield f"  {command:<{width}}   {why}"
