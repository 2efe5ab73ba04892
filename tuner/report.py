"""What a person sees in the terminal: one line per finished trial, a bar for the running one, the result at the end."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from optuna.trial import FrozenTrial, TrialState
from rich.console import Console as Terminal
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from tuner import history
from tuner.history import REASON, SAME_AS
from tuner.manifest import Published
from tuner.orders import Epoch, Facts, Result, Survey
from tuner.run import Run
from tuner.search import Coordinator, Live

Mode = Literal["normal", "quiet", "json"]
SHOWN = ("optimizer", "lr", "momentum", "freeze_depth")


@dataclass(frozen=True)
class Summary:
    """What a study came to. `fresh`: this command added something to it."""

    folder: Path
    coordinator: Coordinator
    winner: FrozenTrial
    tied: list[int]
    run: Run
    published: Published | None
    fresh: bool


class Console:
    """Prints to stdout; warnings go to stderr. Plain lines without a terminal, one JSON object a line under --json."""

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self.out = Terminal(highlight=False, soft_wrap=True)
        self.bar: Progress | None = None
        self.rows: dict[int, TaskID] = {}
        self.coordinator: Coordinator | None = None
        self.depth = 0
        self.begun, self.done_before, self.workers = time.monotonic(), 0, 1
        self.best: tuple[float, int] | None = None
        self.pruned = 0

    # -- plain words

    def say(self, text: str) -> None:
        if self.mode == "normal":
            self.out.print(text, markup=False)

    def note(self, text: str) -> None:
        self.event("note", text=text)
        self.say(text)

    def warn(self, text: str) -> None:
        self.event("warning", text=text)
        if self.mode != "json":
            print(f"tuner: warning: {text}", file=sys.stderr)

    def event(self, kind: str, **values: Any) -> None:
        if self.mode == "json":
            print(json.dumps({"event": kind, **values}, ensure_ascii=False), flush=True)

    # -- the search

    def begin(self, coordinator: Coordinator, facts: Facts, survey: Survey, workers: int) -> None:
        self.coordinator, self.workers = coordinator, workers
        self.begun, self.done_before = time.monotonic(), coordinator.closed
        self.depth = max(survey.depths.values())
        for t in coordinator.study.get_trials(deepcopy=False):
            self.count(t)
        sizes = ", ".join(f"{n:,} {part}" for part, n in facts.sizes.items())
        device = f"{survey.gpus} GPU" if survey.gpus else "CPU"
        left = coordinator.budget() - coordinator.closed
        self.event(
            "begin", sizes=facts.sizes, classes=list(facts.classes), parameters=facts.parameters, trials_left=left, depths=survey.depths
        )
        self.say(f"data   {sizes} images, {len(facts.classes)} classes, {facts.side} x {facts.side} pixels")
        self.say(f"model  {', '.join(survey.depths)}, {facts.parameters / 1e6:.2f} M parameters, freeze depth 0..{self.depth}")
        state = f"{coordinator.closed} of {coordinator.budget()} trials done" if coordinator.closed else f"{coordinator.budget()} trials"
        self.say(f"search {state}, {coordinator.search.sampler} sampler, {coordinator.search.pruner} pruner, {workers} worker on {device}")
        if self.mode == "normal" and self.out.is_terminal and left > 0:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[state]}"))
            self.bar = Progress(*columns, console=self.out, transient=True)
            self.bar.start()

    def epoch(self, live: Live, epoch: Epoch) -> None:
        score = epoch.scores[self.metric()]
        total = live.run.recipe.epochs
        self.event(
            "epoch", trial=live.trial.number, epoch=epoch.number, of=total, loss=epoch.loss, scores=epoch.scores, seconds=epoch.seconds
        )
        if self.bar is not None:
            row = self.rows.get(live.trial.number)
            if row is None:
                row = self.rows[live.trial.number] = self.bar.add_task(f"#{live.trial.number}", total=total, state="")
            self.bar.update(
                row, completed=epoch.number, state=f"epoch {epoch.number}/{total}  loss {epoch.loss:.3f}  {self.short()} {score:.4f}"
            )

    def ended(self, trial: FrozenTrial, run: Run, result: Result | None) -> None:
        """One line: `#12 acc 0.9430 ★ (best 0.9430 #12) sgd lr 3.1e-03 freeze 3/5 ep 10/10 41s | 12/50, 3 pruned, eta 18m`."""
        if self.bar is not None and trial.number in self.rows:
            self.bar.remove_task(self.rows.pop(trial.number))
        star = self.count(trial)
        epochs = max(trial.intermediate_values, default=0)
        value = trial.value if trial.state == TrialState.COMPLETE else trial.intermediate_values.get(epochs)
        spent = result.seconds if result else 0.0
        self.event(
            "trial",
            number=trial.number,
            state=trial.state.name.lower(),
            value=value,
            params=trial.params,
            reason=trial.user_attrs.get(REASON),
            same_as=trial.user_attrs.get(SAME_AS),
            seconds=round(spent, 3),
        )
        score = f"{self.short()} {value:.4f}" if value is not None else "no score"
        best = f"(best {self.best[0]:.4f} #{self.best[1]})" if self.best else ""
        shape = f"freeze {run.recipe.freeze_depth}/{self.depth} ep {epochs}/{run.recipe.epochs} {spent:.0f}s"
        params = " ".join(f"{k} {_short(v)}" for k, v in trial.params.items() if k not in ("freeze_depth", "epochs"))
        note = how(trial)
        self.say(f"#{trial.number:<3} {score} {'★' if star else ' '} {best} {params} {shape}{note} | {self.progress()}")

    def count(self, trial: FrozenTrial) -> bool:
        """Keeps the tally; True when the trial is the best so far."""
        self.pruned += trial.state == TrialState.PRUNED
        if (
            trial.state == TrialState.COMPLETE
            and SAME_AS not in trial.user_attrs
            and (self.best is None or float(trial.value or 0) > self.best[0])
        ):
            self.best = (float(trial.value or 0), trial.number)
            return True
        return False

    def progress(self) -> str:
        assert self.coordinator is not None
        closed, budget = self.coordinator.closed, self.coordinator.budget()
        done = closed - self.done_before
        eta = ""
        if done > 0 and closed < budget:
            eta = f", eta {spoken((time.monotonic() - self.begun) / done * (budget - closed))}"
        return f"{closed}/{budget}{f', {self.pruned} pruned' if self.pruned else ''}{eta}"

    def pause(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar, self.rows = None, {}

    def metric(self) -> str:
        assert self.coordinator is not None
        return str(self.coordinator.search.metric)

    def short(self) -> str:
        return {"accuracy": "acc", "balanced_accuracy": "bacc", "log_likelihood": "ll"}.get(self.metric(), self.metric())

    # -- the winner

    def retraining(self, run: Run) -> Callable[[Epoch], None]:
        """Shows the epochs of a training that is not a trial."""
        total = run.recipe.stop_epoch or run.recipe.epochs
        self.note(f"training on {run.recipe.fit.replace('+', ' and ')}: up to {total} epochs, then test and export")
        if self.mode == "normal" and self.out.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[state]}"),
                console=self.out,
                transient=True,
            )
            self.bar.start()
            self.rows[-1] = self.bar.add_task("winner", total=total, state="")

        def show(epoch: Epoch) -> None:
            self.event("retrain", epoch=epoch.number, of=total, loss=epoch.loss, scores=epoch.scores)
            if self.bar is not None:
                state = "testing and exporting" if epoch.number == total else f"epoch {epoch.number}/{total}  loss {epoch.loss:.3f}"
                self.bar.update(self.rows[-1], completed=epoch.number, state=state)

        return show

    def summary(self, s: Summary) -> None:
        coordinator, winner, published = s.coordinator, s.winner, s.published
        metric = self.metric()
        name = s.folder.name
        default = history.default(coordinator.study)
        self.event(
            "summary",
            study=name,
            trial=winner.number,
            value=winner.value,
            default=default.value if default else None,
            params=winner.params,
            test=published.manifest["scores"]["test"] if published else None,
            export=str(published.folder) if published else None,
        )
        if not s.fresh:
            self.say(f"nothing left to do: {coordinator.closed} of {coordinator.budget()} trials are done; raise search.trials to go on")
        self.say("")
        self.say(
            f"best       trial {winner.number}, validation {metric.replace('_', ' ')} {winner.value:.4f} at epoch {winner.user_attrs['best_epoch']}"
        )
        self.say(f"           {'  '.join(f'{k} {_short(v)}' for k, v in winner.params.items())}")
        if s.tied:
            self.say(f"           tied with {', '.join(f'trial {n}' for n in s.tied)}; chosen for fewer epochs, then the lower number")
        if default is not None and default.value is not None:
            self.say(
                f"default    trial {default.number} scored {default.value:.4f}; the search bought {float(winner.value or 0) - default.value:+.4f}"
            )
        if published is not None:
            self.outcome(published, metric)
        self.say(f"all of it  {s.folder}")
        self.next_steps(name, s.folder, published)

    def outcome(self, published: Published, metric: str) -> None:
        m = published.manifest
        tested = f"{metric.replace('_', ' ')} {m['scores']['test'][metric]:.4f} on {m['examples']['test']:,} images used for nothing else"
        self.say(f"test       {tested}")
        for i, (kind, e) in enumerate(m["exports"].items()):
            size = (published.folder / e["file"]).stat().st_size / 1e6
            self.say(
                f"{'exports' if i == 0 else '':<10} {published.folder / e['file']}  {kind}, {size:.1f} MB, verified (differs by {e['largest_difference']:.0e})"
            )

    def next_steps(self, name: str, folder: Path, published: Published | None) -> None:
        studies = "" if folder.parent.name == "studies" and folder.parent.parent.resolve() == Path.cwd() else f" --studies {folder.parent}"
        self.say("\nnext:")
        if published is not None:
            self.say(f"  tuner predict {name} IMAGE…{studies}")
            self.say(f"  tuner export {name} --format onnx{studies}")
        self.say(f"  tuner dashboard {name}{studies}")
        self.say(f"  tuner train {folder / 'best.yaml'}")


def how(trial: FrozenTrial) -> str:
    """What was unusual about a trial's end."""
    if SAME_AS in trial.user_attrs:
        return f" same as #{trial.user_attrs[SAME_AS]}"
    reason = trial.user_attrs.get(REASON, "")
    if trial.state == TrialState.PRUNED:
        return f" pruned{f' ({reason})' if reason else ''}"
    return f" FAILED ({reason})" if trial.state == TrialState.FAIL else ""


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def spoken(seconds: float) -> str:
    """90 -> '1m30s'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
