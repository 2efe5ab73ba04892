"""What stands in the terminal: lines in columns, JSON that parses, nothing that an ascii terminal or a pipe cannot take."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from tests.conftest import SMALL
from tests.helpers.terminal import Terminal, rows_of
from tuner.commands.console import Console, describe_trainings_after
from tuner.commands.progress import Progress
from tuner.commands.trial_line import TrialLineFormatter, format_duration, format_value
from tuner.config import parsing, yaml_document
from tuner.config.run import ConfirmSettings, SearchSettings
from tuner.messages import DatasetReport, ModelSurvey
from tuner.search.history import DUPLICATE_OF, REASON

ROOT = Path(__file__).parents[2]
PARAMS: list[dict[str, Any]] = [
    {"optimizer": "sgd", "lr": 0.001, "momentum": 0.925, "freeze_depth": 0, "epochs": 3},
    {"optimizer": "adamw", "lr": 0.0342, "freeze_depth": 5, "epochs": 1},
]
SPACE = parsing.parse_space(yaml_document.parse_document(SMALL, "small.yaml"))


def ended(
    number: int, scores: list[float], state: TrialState = TrialState.COMPLETE, **attrs: Any
) -> FrozenTrial:
    params = PARAMS[number % 2]
    distributions = {
        k: optuna.distributions.CategoricalDistribution((v,)) for k, v in params.items()
    }
    trial = optuna.trial.create_trial(
        state=state,
        value=max(scores) if state == TrialState.COMPLETE else None,
        params=params,
        distributions=distributions,
        intermediate_values=dict(enumerate(scores, 1)),
        user_attrs=attrs,
    )
    trial.number = number
    return trial


def line(
    columns: TrialLineFormatter,
    trial: FrozenTrial,
    best: tuple[float, int] | None,
    tally: str = "2/12, eta 18m",
) -> str:
    run = SPACE.sample(optuna.trial.FixedTrial(trial.params))
    return columns.format_line(trial, run, 100.0 if trial.number % 2 else 4.0, best, tally)


def test_lines_stand_in_columns() -> None:
    columns = TrialLineFormatter(SPACE, "accuracy", 12, 5, None)
    lines = [
        line(columns, ended(0, [0.5, 0.75, 0.9433]), (0.9433, 0)),
        line(columns, ended(11, [0.71]), (0.9433, 0)),
        line(columns, ended(2, [0.2], TrialState.PRUNED), (0.9433, 0)),
        line(columns, ended(3, [0.71], **{DUPLICATE_OF: 11}), (0.9433, 0)),
    ]

    assert lines == [
        "#0  acc 0.9433 ★ (best 0.9433 #0)  sgd   lr 1.0e-3 mom 0.93   freeze 0/5 ep 3/3 4s           | 2/12, eta 18m",
        "#11 acc 0.7100   (best 0.9433 #0)  adamw lr 0.034             freeze 5/5 ep 1/1 1m40s        | 2/12, eta 18m",
        "#2  acc 0.2000   (best 0.9433 #0)  sgd   lr 1.0e-3 mom 0.93   freeze 0/5 ep 1/3 4s    pruned | 2/12, eta 18m",
        "#3  acc 0.7100   (best 0.9433 #0)  adamw lr 0.034             freeze 5/5 ep 1/1 1m40s same as #11 | 2/12, eta 18m",
    ]


def test_a_key_with_several_ranges_has_one_column() -> None:
    ranges = "[{low: 1e-3, high: 0.1, when: {optimizer: sgd}}, {low: 1e-5, high: 1e-3, when: {optimizer: adamw}}]"
    text = SMALL.replace("{low: 1e-4, high: 1e-1, log: true}", ranges)
    columns = TrialLineFormatter(
        parsing.parse_space(yaml_document.parse_document(text, "x")), "accuracy", 12, 5, None
    )
    assert [
        columns.format_params({"optimizer": "sgd", "lr[sgd]": 0.034, "momentum": 0.925}),
        columns.format_params({"optimizer": "adamw", "lr[adamw]": 0.0001}),
    ] == ["sgd   lr 0.034  mom 0.93  ", "adamw lr 1.0e-4           "]


@pytest.mark.parametrize(("room", "told"), [(140, "(best"), (100, "(best"), (80, "pruned")])
def test_a_line_fits_the_terminal(room: int, told: str) -> None:
    text = line(
        TrialLineFormatter(SPACE, "accuracy", 12, 5, room),
        ended(2, [0.2], TrialState.PRUNED),
        (0.9433, 0),
        "12/50, 3 pruned, eta 18m",
    )

    assert len(text) <= room
    assert told in text
    assert ("eta" in text) == (room == 140)


def test_a_failure_gives_its_reason_in_one_line() -> None:
    trial = ended(0, [], TrialState.FAIL, **{REASON: "ValueError: bad\nand more"})

    assert "no score" in line(TrialLineFormatter(SPACE, "accuracy", 12, 5, None), trial, None)
    assert "FAILED (ValueError: bad) |" in line(
        TrialLineFormatter(SPACE, "accuracy", 12, 5, None), trial, None
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.00161, "1.6e-3"),
        (0.0342, "0.034"),
        (0.925, "0.93"),
        (0.0, "0"),
        (64, "64"),
        (128.0, "128"),
        (True, "true"),
        ("sgd", "sgd"),
    ],
)
def test_parameters_are_short(value: Any, text: str) -> None:
    assert format_value(value, 2) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (90, "1m30s"), (3600, "1h00m"), (5400, "1h30m")]
)
def test_durations_are_spoken(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_under_json_every_line_parses_and_nothing_else_is_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console = Console("json")
    console.print_line("plain words")
    console.warn("größer")

    out, err = capsys.readouterr()
    assert json.loads(out) == {"event": "warning", "text": "größer"}
    assert err == ""


def test_quiet_leaves_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console("quiet")
    console.print_line("plain words")
    console.warn("careful")

    assert capsys.readouterr() == ("", "tuner: warning: careful\n")


def test_markup_and_emoji_codes_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    Console("normal").print_line("[red]classes[/red] :smile: [0]")

    assert capsys.readouterr().out == "[red]classes[/red] :smile: [0]\n"


def test_an_ascii_terminal_gets_ascii() -> None:
    code = "from tuner.commands.console import Console; c = Console('normal'); c.print_line('best ★ IMAGE… größer')"
    out = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=True,
    )

    assert out.stdout == b"best * IMAGE... gr??er\n"


RUNNING_TRIAL = """
import sys
import optuna
from tuner.commands.console import Console
from tuner.commands.progress import Progress
from tuner.messages import DatasetReport, Epoch, ModelSurvey
from tuner.config import parsing, yaml_document as document
from tuner.search.running_trial import RunningTrial
from tests.conftest import SMALL
from tests.helpers.terminal import Terminal, rows_of
space = parsing.parse_space(document.parse_document(SMALL, "small.yaml"))
facts = DatasetReport("d", ("a", "b"), {"train": 7}, {"shape": ["batch", 3, 8, 8]}, 2_000_000)
params = {"optimizer": "sgd", "lr": 0.001, "momentum": 0.925, "freeze_depth": 4, "epochs": 3}
trial = optuna.trial.FixedTrial(params, number=2)
running = RunningTrial(trial, space.sample(trial), 2, 1, "", 1)
c = Console("normal")
progress = Progress(2, 4, frozenset([2]), 75.0)
c.start_search(space, lambda: progress, [], facts, ModelSurvey({"resnet18": 5}, 0), 1)
c.on_trial_start(running)
c.bar.refresh()
"""


def test_in_a_terminal_a_bar_and_whole_lines_and_warnings_above_it() -> None:
    """A pseudo-terminal: the table is redrawn, and what is said meanwhile stands on lines of its own."""
    code = f"""{RUNNING_TRIAL}
c.on_epoch(running, Epoch(1, 0.5, {{"accuracy": 0.75}}, 0.1))
c.bar.refresh()
c.warn("half of the images are grey")
c.print_line("a line")
c.close_bars()
c.show_retraining(space.make_run({{}}))(Epoch(1, 0.5, {{}}, 0.1))
c.close_bars()
"""
    with Terminal([sys.executable, "-c", code], ROOT, 80, {"NO_COLOR": "1"}) as terminal:
        assert terminal.wait() == 0
        text = terminal.text
    assert "winner" in text and "━" in text and "epoch 1/" in text
    plain = [row.strip() for row in rows_of(text)]
    assert "tuner: warning: half of the images are grey" in plain
    assert "a line" in plain
    rows = [row for row in plain if row.startswith(("search ━", "#2 "))]
    assert any(row.startswith("search ━") and row.endswith(" 2/4, eta 1m15s") for row in rows)
    shown = [" ".join(row.split()) for row in rows]
    assert "#2 epoch 0/3 sgd lr 1.0e-3 mom 0.93 freeze 4/5" in shown
    assert "#2 ━━━━ epoch 1/3 acc 0.7500 sgd lr 1.0e-3 mom 0.93 freeze 4/5" in shown
    assert all(len(row) <= 80 for row in rows), "a row is cut where the terminal ends"
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", text), "NO_COLOR"


def test_after_a_terminal_became_narrow_the_table_and_the_lines_fit_it() -> None:
    code = f"""{RUNNING_TRIAL}
from optuna.trial import TrialState, create_trial
kinds = {{k: optuna.distributions.CategoricalDistribution((v,)) for k, v in params.items()}}
done = create_trial(value=0.9, params=params, distributions=kinds, intermediate_values={{1: 0.9}})
for number in (0, 1):
    done.number = number
    c.on_trial_end(done, running.run, None)
    c.on_epoch(running, Epoch(number + 1, 0.5, {{"accuracy": 0.75}}, 0.1))
    c.bar.refresh()
    print("now", flush=True)
    sys.stdin.readline()
c.close_bars()
"""
    with Terminal([sys.executable, "-c", code], ROOT, 130) as terminal:
        terminal.read_until("now")
        wide = rows_of(terminal.text)
        terminal.resize(79)
        narrow = len(terminal.text)
        terminal.press("\n")
        terminal.read_until("now")
        terminal.press("\n")
        assert terminal.wait() == 0
        rows = rows_of(terminal.text[narrow:])
    assert any("eta" in row and row.startswith("#0 ") and len(row) > 79 for row in wide)
    assert any(row.startswith("#1 ") for row in rows)
    assert any(row.startswith("#2 ") and "epoch 2/3" in row for row in rows)
    assert max(map(len, rows)) <= 79


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_search_in_a_terminal_outlives_a_resize_and_ctrl_c(small: Path) -> None:
    """The same command then goes on, and its end is said below a table that fits."""
    quick = ["search.trials=6", "recipe.epochs=1", "search.retrain=false", "search.compare=none"]
    command = [sys.executable, "-m", "tuner", "run", str(small), *quick]
    with Terminal(command, small.parent, 130) as terminal:
        terminal.read_until(r"\n[^\n]*#0 .*eta")
        terminal.resize(85)
        narrow = terminal.read_until(r"#1 ")
        terminal.read_until(r"#2 ")
        terminal.press("\x03")
        assert terminal.wait() == 130 and "Traceback" not in terminal.text
        assert terminal.text.rindex("\x1b[?25h") > terminal.text.rindex("\x1b[?25l"), "the cursor"
        rows = rows_of(terminal.text[narrow:])
    assert max(len(row) for row in rows if row.startswith(("#", "search ━"))) <= 85
    with Terminal(command, small.parent, 85) as terminal:
        assert terminal.wait() == 0
        rows = rows_of(terminal.text)
    assert any(row.startswith("best     #") for row in rows)
    assert any(row.startswith("study    ") for row in rows)
    assert max(len(row) for row in rows if row.startswith(("#", "search ━"))) <= 85


def test_the_console_and_the_summary_never_see_the_coordinator() -> None:
    """They get `Progress`, a value; under --quiet or in a test no search need exist."""
    modules = "tuner.commands.console, tuner.commands.summary"
    code = f"import sys, {modules}; sys.exit('tuner.search.coordinator' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_console_tells_how_far_the_search_is(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console("normal")
    used = 0
    facts = DatasetReport("d", ("a", "b"), {"train": 7}, {"shape": ["batch", 3, 8, 8]}, 2_000_000)
    survey = ModelSurvey({"resnet18": 5}, gpu_count=0)
    progress = lambda: Progress(used, 4, seconds_left=75.0 if used else None)  # noqa: E731
    console.start_search(SPACE, progress, [], facts, survey, workers=1)
    first = ended(0, [0.5])
    used = 1
    console.on_trial_end(first, SPACE.sample(optuna.trial.FixedTrial(first.params)), None)

    data, model, search, then, trial = capsys.readouterr().out.splitlines()
    assert data == "data   7 train examples, 2 classes, 3 x 8 x 8"
    assert model == "model  resnet18, 2.00 M parameters, freeze depth 0..5"
    assert search == "search 4 trials, tpe sampler, projection pruner, 1 worker on CPU"
    assert then.startswith("then   up to 2 trainings: the winner, the default recipe")
    assert "★ (best 0.5000 #0)" in trial and trial.endswith("| 1/4, eta 1m15s")


@pytest.mark.parametrize(
    ("trials", "keys", "expected"),
    [
        (9, {}, "up to 2 trainings: the winner, the default recipe"),
        (30, {}, "up to 6 trainings: the best 2 with 2 other seeds each, the winner, the default recipe"),
        (100, {"compare": "none"}, "up to 10 trainings: the best 3 with 3 other seeds each, the winner"),
        (9, {"compare": "none", "confirm": ConfirmSettings(top=1, repeats=5)}, "up to 6 trainings: the best with 5 other seeds, the winner"),
        (9, {"compare": "none"}, "up to 1 training: the winner"),
        (40, {"compare": "none", "confirm": "none", "retrain": False}, ""),
    ],
)  # fmt: skip
def test_what_follows_the_search_is_said_before_it(
    trials: int, keys: dict[str, Any], expected: str
) -> None:
    assert describe_trainings_after(SearchSettings(**keys), trials) == expected
