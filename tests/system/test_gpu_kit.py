"""The kit for a machine with a GPU: what it says when something is missing or fails, and, slow, each of its rows in miniature on the CPU."""

import importlib
import importlib.metadata
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
HERE = "tests.system.test_gpu_kit"


@pytest.fixture
def kit(monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/gpu.py as a module."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    return importlib.import_module("gpu")


def two_figures(setup: Any) -> Iterator[Any]:
    from gpu_measure import Figure

    yield Figure("quick", 0.5, 1.0, "s", [1.0, 2.0], [3.0])
    yield Figure("slow", 0.5, 1.0, "images/s", [1.0], [2.0], at_least=True, notes="as expected")


def one_figure_then_an_error(setup: Any) -> Iterator[Any]:
    yield from list(two_figures(setup))[:1]
    raise ValueError("no more")


def measured(kit: Any, file: Path, rows: tuple[Any, ...], minutes: float = 9.0) -> dict[str, Any]:
    """What the file says after the rows were measured."""
    from argparse import Namespace

    import torch
    from gpu_measure import Setup

    kit.ROWS = rows
    args = Namespace(rows=None, small=False, minutes=minutes, json=file)
    kit.run(args, Setup(torch.device("cpu"), False, file.parent))
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_a_row_is_measured_skipped_or_failed_and_the_others_go_on(
    kit: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kit, "ROWS", kit.ROWS)  # put back afterwards
    rows = (
        kit.Row("broken", f"{HERE}:one_figure_then_an_error", 1),
        kit.Row("long", f"{HERE}:two_figures", 1000),
        kit.Row("lacking", f"{HERE}:two_figures", 1, ("json", "no_such_module")),
        kit.Row("good", f"{HERE}:two_figures", 1),
    )
    found = measured(kit, tmp_path / "gpu.json", rows)
    states = {row["name"]: (row["state"], len(row["figures"])) for row in found["rows"]}
    assert states == {
        "broken": ("failed", 1),
        "long": ("skipped", 0),
        "lacking": ("skipped", 0),
        "good": ("measured", 2),
    }
    reasons = [row["reason"] for row in found["rows"]]
    assert reasons[0] == "ValueError: no more"
    assert reasons[1].startswith("it takes about 1000 s, and ") and "--rows long" in reasons[1]
    assert reasons[2] == f"not installed: no_such_module; {kit.HOW_TO_BRING}"
    assert [figure["verdict"] for figure in found["rows"][3]["figures"]] == ["reached", "missed"]
    table = capsys.readouterr().out.splitlines()
    assert (
        "| good | slow | ≥ 1 | 0.500 | missed | 1.000 against 2.000 images/s; as expected, n = 1 |"
        in table
    )


def test_what_was_measured_is_in_the_file_when_a_run_is_cut_off(
    kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kit, "ROWS", kit.ROWS)
    rows = (
        kit.Row("good", f"{HERE}:two_figures", 1),
        kit.Row("interrupted", f"{HERE}:interrupt", 1),
    )
    with pytest.raises(KeyboardInterrupt):
        measured(kit, tmp_path / "gpu.json", rows)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["good"]


def interrupt(setup: Any) -> Iterator[Any]:
    raise KeyboardInterrupt
    yield


def test_every_row_has_a_function_and_all_of_them_fit_nine_minutes(kit: Any) -> None:
    for row in kit.ROWS:
        module, _, function = row.function.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
    assert sum(row.seconds for row in kit.ROWS) <= 9 * 60


def test_busy_time_counts_once_where_kernels_overlap(kit: Any) -> None:
    from gpu_measure import busy_share

    assert busy_share([], 0, 10) == 0
    assert busy_share([(2, 4), (3, 5), (8, 9)], 0, 10) == pytest.approx(0.4)
    assert busy_share([(-5, 1), (9, 50), (0.5, 0.75)], 0, 10) == pytest.approx(0.2)


def test_arms_take_turns_and_the_first_turn_does_not_count(kit: Any) -> None:
    from gpu_measure import take_turns

    order = []

    def arm(name: str) -> Iterator[float]:
        for number in range(9):
            order.append(f"{name}{number}")
            yield float(number)

    assert take_turns({"a": arm("a"), "b": arm("b")}, 2) == {"a": [1, 2], "b": [1, 2]}
    assert " ".join(order) == "b0 a0 a1 b1 b2 a2"


def test_kept_pixels_are_found_once_and_other_tensors_are_not(kit: Any) -> None:
    import torch
    from gpu_measure import pixel_bytes

    cpu = torch.device("cpu")
    before = pixel_bytes(cpu)
    pixels = torch.zeros(3, 1000, dtype=torch.uint8)
    views = [pixels[1], pixels[:, 5:], torch.zeros(777)]
    assert pixel_bytes(cpu) - before == 3000 and len(views) == 3


# -- the wheels


@pytest.fixture
def wheels(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    return importlib.import_module("gpu_wheels")


def test_the_wheels_bring_all_that_their_packages_require(wheels: Any) -> None:
    carried = {canonicalize_name(name) for name in wheels.names()}
    there = carried | {canonicalize_name(name) for name in wheels.PROVIDED.split()}
    environment = {"python_version": "3.12", "python_full_version": "3.12.3", "extra": ""}
    lacking = {
        f"{name} requires {requirement.name}"
        for name in carried
        for requirement in map(Requirement, importlib.metadata.requires(name) or [])
        if requirement.marker is None or requirement.marker.evaluate(environment)
        if canonicalize_name(requirement.name) not in there
    }
    assert not lacking


def test_only_what_is_missing_is_installed(wheels: Any) -> None:
    names = ["pydantic_core-2.50.4-cp312-cp312-manylinux.whl", "no_such_package-1-py3-none-any.whl"]
    assert [path.name for path in wheels.missing_wheels([Path(n) for n in names])] == names[1:]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_row_runs_in_miniature_on_the_cpu(kit: Any, tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--cpu", "--small", "--json", file]
    done = subprocess.run(
        command,
        text=True,
        capture_output=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["name"]: row for row in json.loads(file.read_text())["rows"]}
    assert list(rows) == [row.name for row in kit.ROWS]
    for row in rows.values():
        lacks = row["state"] == "skipped" and row["reason"].startswith("not installed")
        assert row["state"] == "measured" or lacks, row["reason"]
        assert all(math.isfinite(figure["ratio"]) for figure in row["figures"]), row
