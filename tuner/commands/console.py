"""What a person sees in the terminal: a line per finished trial, a bar for the running one, the result at the end."""

import io
import json
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

from optuna.trial import FrozenTrial, TrialState
from rich.console import Console as Terminal
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from tuner.commands import summary
from tuner.commands.summary import Summary
from tuner.commands.trial_line import METRICS, Columns, reached, spoken
from tuner.config.run import Run, seconds
from tuner.jobs import AS_MANY
from tuner.messages import Epoch, Facts, Result, Survey
from tuner.search.coordinator import Coordinator
from tuner.search.history import REASON, SAME_AS
from tuner.search.running_trial import RunningTrial

Mode = Literal["normal", "quiet", "json"]
ASCII = str.maketrans({"★": "*", "…": "..."})
STYLES = {TrialState.PRUNED: "dim", TrialState.FAIL: "red"}


class Console:
    """Prints to stdout; warnings go to stderr. Plain lines without a terminal, one JSON object a line under --json."""

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(
                errors="replace"
            )  # a class name that the terminal cannot write must not end a search
        self.out = Terminal(highlight=False, soft_wrap=True, emoji=False)
        self.lively = mode == "normal" and self.out.is_interactive and sys.stdout.isatty()
        self.bar: Progress | None = None
        self.rows: dict[int, TaskID] = {}  # trial number -> its bar
        self.tally_row: TaskID | None = None
        self.coordinator: Coordinator | None = None
        self.columns: Columns | None = None
        self.begun, self.done_before, self.pruned = time.monotonic(), 0, 0
        self.best: tuple[float, int] | None = None

    # -- plain words

    def say(self, text: str, style: str | None = None) -> None:
        if self.mode == "normal":
            self.out.print(
                text if self.out.encoding.startswith("utf") else text.translate(ASCII),
                style=style,
                markup=False,
            )

    def note(self, text: str) -> None:
        self.event("note", text=text)
        self.say(text)

    def warn(self, text: str) -> None:
        self.event("warning", text=text)
        if self.mode != "json":
            print(f"tuner: warning: {text}", file=sys.stderr)

    def event(self, kind: str, **values: Any) -> None:
        if self.mode == "json":
            print(json.dumps({"event": kind, **values}), flush=True)

    # -- the search

    def begin(self, coordinator: Coordinator, facts: Facts, survey: Survey, workers: int) -> None:
        search, depth, budget = (
            coordinator.search,
            max(survey.depths.values()),
            coordinator.asker.budget(),
        )
        self.coordinator, self.begun, self.done_before = (
            coordinator,
            time.monotonic(),
            coordinator.closed,
        )
        self.columns = Columns(
            coordinator.space,
            str(search.metric),
            budget,
            depth,
            self.out.width if self.lively else None,
        )
        for t in coordinator.study.get_trials(deepcopy=False):
            self.count(t)
        left = max(0, budget - coordinator.closed)
        known = {
            "sizes": facts.sizes,
            "classes": list(facts.classes),
            "parameters": facts.parameters,
            "depths": survey.depths,
        }
        self.event("begin", **known, trials_left=left)
        sizes = ", ".join(f"{n:,} {part}" for part, n in facts.sizes.items())
        classes = f", {len(facts.classes)} classes" if facts.classes else ""
        self.say(
            f"data   {sizes} examples{classes}, {' x '.join(map(str, facts.input['shape'][1:]))}"
        )
        self.say(
            f"model  {', '.join(survey.depths)}, {facts.parameters / 1e6:.2f} M parameters, freeze depth 0..{depth}"
        )
        trials = (
            f"{coordinator.closed} of {budget} trials done"
            if coordinator.closed
            else f"{budget} trials"
        )
        many = "as many workers as the cluster has room for"
        crew = (
            many
            if workers == AS_MANY
            else f"{workers} {'worker' if workers == 1 else 'workers'} on {f'{survey.gpus} GPU' if survey.gpus else 'CPU'}"
        )
        self.say(f"search {trials}, {search.sampler} sampler, {search.pruner} pruner, {crew}")
        if left > 0:
            self.open_bar()
        if self.bar is not None:
            self.tally_row = self.bar.add_task(
                "search", total=budget, completed=coordinator.closed, state=self.tally(bar=True)
            )

    def open_bar(self) -> None:
        """Bars at the foot of the terminal. Warnings go above them, unless stderr goes elsewhere."""
        if self.lively:
            columns = (
                TextColumn("{task.description:<6}"),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[state]}"),
            )
            self.bar = Progress(
                *columns,
                console=self.out,
                transient=True,
                refresh_per_second=4,
                redirect_stderr=sys.stderr.isatty(),
            )
            self.bar.start()

    def epoch(self, running: RunningTrial, epoch: Epoch) -> None:
        number, total = running.trial.number, running.run.recipe.epochs
        for note in epoch.notes:
            self.warn(f"trial {number}: {note}")
        values = {"loss": epoch.loss, "scores": epoch.scores, "seconds": epoch.seconds}
        self.event("epoch", trial=number, epoch=epoch.number, of=total, **values)
        if self.bar is None or self.coordinator is None:
            return
        for gone in self.rows.keys() - self.coordinator.running.keys():
            self.bar.remove_task(self.rows.pop(gone))
        if number not in self.rows:
            self.rows[number] = self.bar.add_task(f"#{number}", total=total, state="")
        metric = str(self.coordinator.search.metric)
        score = f"{METRICS.get(metric, metric)} {epoch.scores[metric]:.4f}"
        self.bar.update(
            self.rows[number],
            completed=epoch.number,
            state=f"epoch {epoch.number}/{total}  loss {epoch.loss:.3f}  {score}",
        )

    def ended(self, trial: FrozenTrial, run: Run, result: Result | None) -> None:
        assert self.columns is not None
        star = self.count(trial)
        took = result.seconds if result else 0.0
        self.event(
            "trial",
            number=trial.number,
            state=trial.state.name.lower(),
            value=reached(trial),
            params=trial.params,
            reason=trial.user_attrs.get(REASON),
            same_as=trial.user_attrs.get(SAME_AS),
            seconds=round(took, 3),
        )
        if self.bar is not None and trial.number in self.rows:
            self.bar.remove_task(self.rows.pop(trial.number))
        self.say(
            self.columns.line(trial, run, took, self.best, self.tally()),
            "bold" if star else STYLES.get(trial.state),
        )
        if self.bar is not None and self.tally_row is not None and self.coordinator is not None:
            self.bar.update(
                self.tally_row, completed=self.coordinator.closed, state=self.tally(bar=True)
            )

    def count(self, trial: FrozenTrial) -> bool:
        """Keeps the tally; True when the trial is the best so far."""
        self.pruned += trial.state == TrialState.PRUNED
        better = (
            self.best is None or float(trial.value or 0) > self.best[0]
            if trial.state == TrialState.COMPLETE
            else False
        )
        if better and SAME_AS not in trial.user_attrs:
            self.best = (float(trial.value or 0), trial.number)
        return self.best is not None and self.best[1] == trial.number

    def tally(self, *, bar: bool = False) -> str:
        """`12/50, 3 pruned, eta 18m`; in the bar, which has its own line, with the best."""
        assert self.coordinator is not None
        closed, budget, limit = (
            self.coordinator.closed,
            self.coordinator.asker.budget(),
            self.coordinator.search.timeout,
        )
        done, passed = closed - self.done_before, time.monotonic() - self.begun
        known = [f"{closed}/{budget}"]
        if bar and self.best is not None:
            known.append(f"best {self.best[0]:.4f} #{self.best[1]}")
        if self.pruned:
            known.append(f"{self.pruned} pruned")
        if done > 0 and closed < budget:
            left = passed / done * (budget - closed)
            known.append(
                f"eta {spoken(left if limit is None else max(0.0, min(left, seconds(limit) - passed)))}"
            )
        return ", ".join(known)

    def pause(self) -> None:
        """Takes the bars away."""
        if self.bar is not None:
            self.bar.stop()
        self.bar, self.tally_row, self.rows = None, None, {}

    # -- the winner

    def retraining(self, run: Run) -> Callable[[Epoch], None]:
        """Shows the epochs of a training that is not a trial."""
        total = run.recipe.stop_epoch or run.recipe.epochs
        self.note(
            f"training on {run.recipe.fit.replace('+', ' and ')}: up to {total} epochs, then test and export"
        )
        self.open_bar()
        row = self.bar.add_task("winner", total=total, state="") if self.bar is not None else None

        def show(epoch: Epoch) -> None:
            for note in epoch.notes:
                self.warn(note)
            self.event(
                "retrain", epoch=epoch.number, of=total, loss=epoch.loss, scores=epoch.scores
            )
            if self.bar is not None and row is not None:
                state = (
                    "testing and exporting"
                    if epoch.number == total
                    else f"epoch {epoch.number}/{total}  loss {epoch.loss:.3f}"
                )
                self.bar.update(row, completed=epoch.number, state=state)

        return show

    def summary(self, s: Summary) -> None:
        self.event("summary", **summary.values(s))
        for line in summary.lines(s):
            self.say(line)
