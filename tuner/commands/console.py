"""What a person sees in the terminal.

That is a line for each trial that ended, a bar for each that runs, and the result at the end.
"""

import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from optuna.trial import FrozenTrial, TrialState
from rich.console import Console as Terminal
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.table import Column

from tuner.commands import summary
from tuner.commands.progress import Progress
from tuner.commands.summary import Summary
from tuner.commands.trial_line import (
    TrialLineFormatter,
    format_duration,
    reached_score,
)
from tuner.config.objective import is_improvement
from tuner.config.related_tasks import output_word
from tuner.config.run import Run, SearchSettings, parse_duration
from tuner.config.space import Space
from tuner.errors import count_words
from tuner.jobs import AS_MANY_AS_POSSIBLE
from tuner.messages import DatasetReport, Epoch, ModelSurvey, TrialResult
from tuner.search.confirmation import settings_for
from tuner.search.history import DUPLICATE_OF, REASON, TAKEN_FROM
from tuner.search.running_trial import RunningTrial

OutputMode = Literal["normal", "quiet", "json"]
ASCII = str.maketrans({"★": "*", "…": "..."})
OPEN_BUDGET_WIDTH = 999  # trials, for the width of their numbers where the time is the budget
STYLES = {TrialState.PRUNED: "dim", TrialState.FAIL: "red"}


class Console:
    """Prints to stdout; warnings go to stderr.

    Without a terminal it prints plain lines, and under --json one JSON object on each line.
    """

    def __init__(self, mode: OutputMode) -> None:
        self.mode = mode
        if isinstance(sys.stdout, io.TextIOWrapper):
            # a class name that the terminal cannot write must not end a search
            sys.stdout.reconfigure(errors="replace")
        self.out = Terminal(highlight=False, soft_wrap=True, emoji=False)
        self.shows_bars = mode == "normal" and self.out.is_interactive and sys.stdout.isatty()
        self.bar: Bars | None = None
        self.bar_of_trial: dict[int, TaskID] = {}  # trial number -> its bar
        self.total_bar: TaskID | None = None
        self.search: SearchSettings | None = None
        self.read_progress: Callable[[], Progress] | None = None
        self.line_formatter: TrialLineFormatter | None = None
        self.started_at, self.pruned = time.monotonic(), 0
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
        self,
        space: Space,
        read_progress: Callable[[], Progress],
        earlier_trials: Sequence[FrozenTrial],
        facts: DatasetReport,
        survey: ModelSurvey,
        workers: int,
    ) -> None:
        """Prints what is searched, and shows the bars.

        `read_progress` gives the counts of the moment; the console calls it after every trial.
        """
        progress = read_progress()
        self.search, self.read_progress = space.settings.search, read_progress
        self.started_at = time.monotonic()
        depth = max(survey.max_depths.values())
        self.line_formatter = TrialLineFormatter(
            space,
            str(self.search.metric),
            OPEN_BUDGET_WIDTH if progress.is_open else progress.budget,
            depth,
            self.out.width if self.shows_bars else None,
        )
        for trial in earlier_trials:
            self.update_best(trial)
        self.emit_event(
            "begin",
            sizes=facts.split_sizes,
            classes=list(facts.classes),
            parameters=facts.parameter_count,
            depths=survey.max_depths,
            trials_left=None
            if progress.is_open
            else max(0, progress.budget - progress.budget_used),
        )
        for line in opening_lines(space, facts, survey, progress, workers):
            self.print_line(line)
        if progress.budget_used < progress.budget:
            self.open_bars()
        if self.bar is not None:
            self.total_bar = self.bar.add_task(
                "search",
                total=None if progress.is_open else progress.budget,
                completed=progress.budget_used,
                state=self.progress_text(progress, in_bar=True),
            )

    def open_bars(self) -> None:
        """Bars at the foot of the terminal.

        Warnings go above them, unless stderr goes elsewhere.
        """
        if self.shows_bars:
            columns = (
                TextColumn("{task.description:<6}"),
                BarColumn(bar_width=12),
                TextColumn(
                    "{task.fields[state]}",
                    markup=False,  # a choice may have brackets
                    table_column=Column(no_wrap=True, overflow="ellipsis"),
                ),
            )
            self.bar = Bars(
                *columns,
                console=self.out,
                transient=True,
                refresh_per_second=4,
                redirect_stderr=sys.stderr.isatty(),
            )
            self.bar.start()

    def on_trial_start(self, trial: RunningTrial) -> None:
        """A trial begins: it has a bar with its parameters until it ends."""
        if self.bar is None or self.read_progress is None or self.line_formatter is None:
            return
        self.show_trial(trial, self.bar, self.read_progress())

    def show_trial(self, trial: RunningTrial, bar: Bars, progress: Progress) -> None:
        """Adds the bar of a trial where it has none, and takes away those of trials that ended."""
        for ended in self.bar_of_trial.keys() - progress.running:
            bar.remove_task(self.bar_of_trial.pop(ended))
        if trial.number not in self.bar_of_trial:
            self.bar_of_trial[trial.number] = bar.add_task(
                f"#{trial.number}", total=trial.epochs, state=self.bar_text(trial, 0, None)
            )

    def on_epoch(self, trial: RunningTrial, epoch: Epoch) -> None:
        """An epoch of a trial has ended."""
        for note in epoch.notes:
            self.warn(f"trial {trial.number}: {note}")
        values = {"loss": epoch.loss, "scores": epoch.scores, "seconds": epoch.seconds}
        of = trial.run.recipe.epochs
        self.emit_event("epoch", trial=trial.number, epoch=epoch.number, of=of, **values)
        if self.bar is None or self.read_progress is None or self.search is None:
            return
        progress = self.read_progress()
        self.show_trial(trial, self.bar, progress)
        score = epoch.scores.get(str(self.search.metric))  # with validate_every not each has one
        text = self.bar_text(trial, epoch.number, score)
        self.bar.update(self.bar_of_trial[trial.number], completed=epoch.number, state=text)
        self.update_total(progress)

    def bar_text(self, trial: RunningTrial, epoch: int, score: float | None) -> str:
        """What stands beside the bar of a running trial: epoch, score, parameters."""
        assert self.line_formatter is not None
        count = f"{epoch:>{len(str(trial.epochs))}}/{trial.epochs}"
        formatter, given = self.line_formatter, trial.trial.params
        params = f"{formatter.format_params(given)} {formatter.format_frozen(trial.run)}"
        shown = formatter.format_score(0.0 if score is None else score)
        shown = shown if score is not None else " " * len(shown)
        return f"epoch {count}  {shown}  {' '.join(params.split())}"

    def on_trial_end(self, trial: FrozenTrial, run: Run, result: TrialResult | None) -> None:
        assert self.line_formatter is not None and self.read_progress is not None
        is_best = self.update_best(trial)
        seconds = result.seconds if result else 0.0
        self.emit_event(
            "trial",
            number=trial.number,
            state=trial.state.name.lower(),
            value=reached_score(trial),
            params=trial.params,
            reason=trial.user_attrs.get(REASON),
            same_as=trial.user_attrs.get(DUPLICATE_OF),
            seconds=round(seconds, 3),
        )
        if self.bar is not None and trial.number in self.bar_of_trial:
            self.bar.remove_task(self.bar_of_trial.pop(trial.number))
        progress = self.read_progress()
        text = self.progress_text(progress)
        self.update_total(progress)
        if self.bar is not None:
            self.line_formatter.fit_to(self.out.width)  # a person may have changed it
            self.bar.refresh()  # what is printed comes above the bars as they were drawn last
        self.print_line(
            self.line_formatter.format_line(trial, run, seconds, self.best, text),
            "bold" if is_best else STYLES.get(trial.state),
        )

    def update_total(self, progress: Progress) -> None:
        """Shows how far the whole search is, in the first bar."""
        if self.bar is not None and self.total_bar is not None:
            text = self.progress_text(progress, in_bar=True)
            self.bar.update(self.total_bar, completed=progress.budget_used, state=text)

    def update_best(self, trial: FrozenTrial) -> bool:
        """Counts a trial that ended; True when the trial is the best so far."""
        self.pruned += trial.state == TrialState.PRUNED and TAKEN_FROM not in trial.user_attrs
        if trial.state == TrialState.COMPLETE and DUPLICATE_OF not in trial.user_attrs:
            value = float(trial.value or 0)
            direction = (self.search and self.search.direction) or "maximise"
            if self.best is None or is_improvement(value, self.best[0], direction):
                self.best = (value, trial.number)
        return self.best is not None and self.best[1] == trial.number

    def progress_text(self, progress: Progress, *, in_bar: bool = False) -> str:
        """`12/50, 3 pruned, eta 18m`; in the bar, which has its own line, with the best trial."""
        used, budget = progress.budget_used, progress.budget
        texts = [f"{used} trials" if progress.is_open else f"{used}/{budget}"]
        if in_bar and self.best is not None:
            texts.append(f"best {self.best[0]:.4f} #{self.best[1]}")
        if self.pruned:
            texts.append(f"{self.pruned} pruned")
        left = self.seconds_left(progress)
        if left is not None and used < budget:
            texts.append(f"eta {format_duration(left)}")
        return ", ".join(texts)

    def seconds_left(self, progress: Progress) -> float | None:
        """Until the command ends; at most what `search.time` leaves. None: not known."""
        assert self.search is not None
        limit = [parse_duration(self.search.time)] if self.search.time else []
        ends = [seconds - (time.monotonic() - self.started_at) for seconds in limit]
        if progress.seconds_left is not None:
            ends.append(progress.seconds_left)
        return max(0.0, min(ends)) if ends else None

    def close_bars(self) -> None:
        """Takes the bars away."""
        if self.bar is not None:
            self.bar.stop()
        self.bar, self.total_bar, self.bar_of_trial = None, None, {}

    # -- the winner

    def show_retraining(
        self, run: Run, *, is_default: bool = False, ingredient: int | None = None
    ) -> Callable[[Epoch], None]:
        """Shows the epochs of a training that is not a trial: of the winner, of the default
        recipe, which is not exported, or of the trial whose weights become part of a soup.
        """
        total = run.recipe.stop_epoch or run.recipe.epochs
        examples = run.recipe.fit.replace("+", " and ")
        epochs = count_words(total, "epoch", "epochs")
        name, what, then, state_then = ("winner", "", "test and export", "testing and exporting")
        if is_default:
            name, what, then, state_then = ("default", " the default recipe", "test", "testing")
        if ingredient is not None:
            name, then, state_then = (f"#{ingredient}", "average", "averaging")
            what = f" #{ingredient} for the soup"
        self.note(f"training{what} on {examples}: up to {epochs}, then {then}")
        self.open_bars()
        row = self.bar.add_task(name, total=total, state="") if self.bar is not None else None

        def show(epoch: Epoch) -> None:
            for note in epoch.notes:
                self.warn(note)
            self.emit_event(
                "retrain",
                what=name,
                epoch=epoch.number,
                of=total,
                loss=epoch.loss,
                scores=epoch.scores,
            )
            if self.bar is not None and row is not None:
                state = f"epoch {epoch.number}/{total}  loss {epoch.loss:.3f}"
                if epoch.number == total:
                    state = state_then
                self.bar.update(row, completed=epoch.number, state=state)

        return show

    def print_summary(self, s: Summary) -> None:
        self.emit_event("summary", **summary.summary_values(s))
        for line in summary.summary_lines(s):
            self.print_line(line)


def opening_lines(
    space: Space,
    facts: DatasetReport,
    survey: ModelSurvey,
    progress: Progress,
    workers: int,
) -> Iterator[str]:
    """What is searched, and by how many workers, before the first trial."""
    sizes = ", ".join(f"{count:,} {split}" for split, count in facts.split_sizes.items())
    search = space.settings.search
    word = output_word(str(space.values["task", "name"]))
    classes = f", {len(facts.classes)} {word}" if facts.classes else ""
    shape = " x ".join(map(str, facts.input_description["shape"][1:]))
    yield f"data   {sizes} examples{classes}, {shape}"
    models, millions = ", ".join(survey.max_depths), facts.parameter_count / 1e6
    depth = max(survey.max_depths.values())
    yield f"model  {models}, {millions:.2f} M parameters, freeze depth 0..{depth}"
    trials = count_words(progress.budget, "trial", "trials")
    if search.time is not None:
        trials = f"{search.time}, {'as many trials as fit' if progress.is_open else trials}"
    elif progress.budget_used:
        trials = f"{progress.budget_used} of {progress.budget} trials done"
    yield (
        f"search {trials}, {search.sampler} sampler, {search.pruner} pruner, "
        f"{describe_workers(workers, survey.gpu_count)}"
    )
    if after := describe_trainings_after(search, 0 if progress.is_open else progress.budget):
        yield f"then   {after}"


def describe_trainings_after(search: SearchSettings, trial_count: int) -> str:
    """The trainings that follow a search of so many trials; empty where there is none."""
    confirm = settings_for(search, trial_count)
    parts = [
        f"the best {confirm.top} with {confirm.repeats} other seeds each"
        if confirm and confirm.top > 1
        else f"the best with {confirm.repeats} other seeds"
        if confirm
        else "",
        "the winner" if search.retrain else "",
        "the default recipe" if search.compare == "default" else "",
    ]
    confirming = confirm.top * confirm.repeats if confirm else 0
    count = confirming + search.retrain + (search.compare == "default")
    trainings = "training" if count == 1 else "trainings"
    return f"up to {count} {trainings}: {', '.join(filter(None, parts))}" if count else ""


def describe_workers(workers: int, gpu_count: int) -> str:
    """`2 workers on 2 GPU`."""
    if workers == AS_MANY_AS_POSSIBLE:
        return "as many workers as the cluster has room for"
    device = f"{gpu_count} GPU" if gpu_count else "CPU"
    return f"{workers} {'worker' if workers == 1 else 'workers'} on {device}"
