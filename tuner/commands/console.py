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
from tuner.commands.trial_line import (
    METRIC_LABELS,
    TrialLineFormatter,
    format_duration,
    reached_score,
)
from tuner.config.run import Run, parse_duration
from tuner.jobs import AS_MANY_AS_POSSIBLE
from tuner.messages import DatasetReport, Epoch, ModelSurvey, TrialResult
from tuner.search.coordinator import Coordinator
from tuner.search.history import DUPLICATE_OF, REASON
from tuner.search.running_trial import RunningTrial

OutputMode = Literal["normal", "quiet", "json"]
ASCII = str.maketrans({"★": "*", "…": "..."})
STYLES = {TrialState.PRUNED: "dim", TrialState.FAIL: "red"}


class Console:
    """Prints to stdout; warnings go to stderr. Plain lines without a terminal, one JSON object a line under --json."""

    def __init__(self, mode: OutputMode) -> None:
        self.mode = mode
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(
                errors="replace"
            )  # a class name that the terminal cannot write must not end a search
        self.out = Terminal(highlight=False, soft_wrap=True, emoji=False)
        self.shows_bars = mode == "normal" and self.out.is_interactive and sys.stdout.isatty()
        self.bar: Progress | None = None
        self.bar_of_trial: dict[int, TaskID] = {}  # trial number -> its bar
        self.total_bar: TaskID | None = None
        self.coordinator: Coordinator | None = None
        self.line_formatter: TrialLineFormatter | None = None
        self.started_at, self.used_before, self.pruned = time.monotonic(), 0, 0
        self.best: tuple[float, int] | None = None

    # -- plain words

    def print_line(self, text: str, style: str | None = None) -> None:
        if self.mode == "normal":
            self.out.print(
                text if self.out.encoding.startswith("utf") else text.translate(ASCII),
                style=style,
                markup=False,
            )

    def note(self, text: str) -> None:
        self.emit_event("note", text=text)
        self.print_line(text)

    def warn(self, text: str) -> None:
        self.emit_event("warning", text=text)
        if self.mode != "json":
            print(f"tuner: warning: {text}", file=sys.stderr)

    def emit_event(self, kind: str, **values: Any) -> None:
        if self.mode == "json":
            print(json.dumps({"event": kind, **values}), flush=True)

    # -- the search

    def start_search(
        self, coordinator: Coordinator, facts: DatasetReport, survey: ModelSurvey, workers: int
    ) -> None:
        search, depth, budget = (
            coordinator.search_settings,
            max(survey.max_depths.values()),
            coordinator.proposer.trial_budget(),
        )
        self.coordinator, self.started_at, self.used_before = (
            coordinator,
            time.monotonic(),
            coordinator.budget_used,
        )
        self.line_formatter = TrialLineFormatter(
            coordinator.space,
            str(search.metric),
            budget,
            depth,
            self.out.width if self.shows_bars else None,
        )
        for t in coordinator.study.get_trials(deepcopy=False):
            self.update_best(t)
        left = max(0, budget - coordinator.budget_used)
        known = {
            "sizes": facts.split_sizes,
            "classes": list(facts.classes),
            "parameters": facts.parameter_count,
            "depths": survey.max_depths,
        }
        self.emit_event("begin", **known, trials_left=left)
        sizes = ", ".join(f"{n:,} {part}" for part, n in facts.split_sizes.items())
        classes = f", {len(facts.classes)} classes" if facts.classes else ""
        self.print_line(
            f"data   {sizes} examples{classes}, {' x '.join(map(str, facts.input_description['shape'][1:]))}"
        )
        self.print_line(
            f"model  {', '.join(survey.max_depths)}, {facts.parameter_count / 1e6:.2f} M parameters, freeze depth 0..{depth}"
        )
        trials = (
            f"{coordinator.budget_used} of {budget} trials done"
            if coordinator.budget_used
            else f"{budget} trials"
        )
        many = "as many workers as the cluster has room for"
        crew = (
            many
            if workers == AS_MANY_AS_POSSIBLE
            else f"{workers} {'worker' if workers == 1 else 'workers'} on {f'{survey.gpu_count} GPU' if survey.gpu_count else 'CPU'}"
        )
        self.print_line(
            f"search {trials}, {search.sampler} sampler, {search.pruner} pruner, {crew}"
        )
        if left > 0:
            self.open_bars()
        if self.bar is not None:
            self.total_bar = self.bar.add_task(
                "search",
                total=budget,
                completed=coordinator.budget_used,
                state=self.progress_text(in_bar=True),
            )

    def open_bars(self) -> None:
        """Bars at the foot of the terminal. Warnings go above them, unless stderr goes elsewhere."""
        if self.shows_bars:
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

    def on_epoch(self, running: RunningTrial, epoch: Epoch) -> None:
        number, total = running.trial.number, running.run.recipe.epochs
        for note in epoch.notes:
            self.warn(f"trial {number}: {note}")
        values = {"loss": epoch.loss, "scores": epoch.scores, "seconds": epoch.seconds}
        self.emit_event("epoch", trial=number, epoch=epoch.number, of=total, **values)
        if self.bar is None or self.coordinator is None:
            return
        for gone in self.bar_of_trial.keys() - self.coordinator.running.keys():
            self.bar.remove_task(self.bar_of_trial.pop(gone))
        if number not in self.bar_of_trial:
            self.bar_of_trial[number] = self.bar.add_task(f"#{number}", total=total, state="")
        metric = str(self.coordinator.search_settings.metric)
        score = f"{METRIC_LABELS.get(metric, metric)} {epoch.scores[metric]:.4f}"
        self.bar.update(
            self.bar_of_trial[number],
            completed=epoch.number,
            state=f"epoch {epoch.number}/{total}  loss {epoch.loss:.3f}  {score}",
        )

    def on_trial_end(self, trial: FrozenTrial, run: Run, result: TrialResult | None) -> None:
        assert self.line_formatter is not None
        star = self.update_best(trial)
        took = result.seconds if result else 0.0
        self.emit_event(
            "trial",
            number=trial.number,
            state=trial.state.name.lower(),
            value=reached_score(trial),
            params=trial.params,
            reason=trial.user_attrs.get(REASON),
            same_as=trial.user_attrs.get(DUPLICATE_OF),
            seconds=round(took, 3),
        )
        if self.bar is not None and trial.number in self.bar_of_trial:
            self.bar.remove_task(self.bar_of_trial.pop(trial.number))
        self.print_line(
            self.line_formatter.format_line(trial, run, took, self.best, self.progress_text()),
            "bold" if star else STYLES.get(trial.state),
        )
        if self.bar is not None and self.total_bar is not None and self.coordinator is not None:
            self.bar.update(
                self.total_bar,
                completed=self.coordinator.budget_used,
                state=self.progress_text(in_bar=True),
            )

    def update_best(self, trial: FrozenTrial) -> bool:
        """Keeps the tally; True when the trial is the best so far."""
        self.pruned += trial.state == TrialState.PRUNED
        better = (
            self.best is None or float(trial.value or 0) > self.best[0]
            if trial.state == TrialState.COMPLETE
            else False
        )
        if better and DUPLICATE_OF not in trial.user_attrs:
            self.best = (float(trial.value or 0), trial.number)
        return self.best is not None and self.best[1] == trial.number

    def progress_text(self, *, in_bar: bool = False) -> str:
        """`12/50, 3 pruned, eta 18m`; in the bar, which has its own line, with the best."""
        assert self.coordinator is not None
        closed, budget, limit = (
            self.coordinator.budget_used,
            self.coordinator.proposer.trial_budget(),
            self.coordinator.search_settings.timeout,
        )
        done, passed = closed - self.used_before, time.monotonic() - self.started_at
        known = [f"{closed}/{budget}"]
        if in_bar and self.best is not None:
            known.append(f"best {self.best[0]:.4f} #{self.best[1]}")
        if self.pruned:
            known.append(f"{self.pruned} pruned")
        if done > 0 and closed < budget:
            left = passed / done * (budget - closed)
            known.append(
                f"eta {format_duration(left if limit is None else max(0.0, min(left, parse_duration(limit) - passed)))}"
            )
        return ", ".join(known)

    def close_bars(self) -> None:
        """Takes the bars away."""
        if self.bar is not None:
            self.bar.stop()
        self.bar, self.total_bar, self.bar_of_trial = None, None, {}

    # -- the winner

    def show_retraining(self, run: Run) -> Callable[[Epoch], None]:
        """Shows the epochs of a training that is not a trial."""
        total = run.recipe.stop_epoch or run.recipe.epochs
        self.note(
            f"training on {run.recipe.fit.replace('+', ' and ')}: up to {total} epochs, then test and export"
        )
        self.open_bars()
        row = self.bar.add_task("winner", total=total, state="") if self.bar is not None else None

        def show(epoch: Epoch) -> None:
            for note in epoch.notes:
                self.warn(note)
            self.emit_event(
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

    def print_summary(self, s: Summary) -> None:
        self.emit_event("summary", **summary.summary_values(s))
        for line in summary.summary_lines(s):
            self.print_line(line)
