"""The Python interface: what `import tuner` offers, and that it costs nothing before it is used."""

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tuner as package
from tests.conftest import SMALL, CommandResult
from tuner.config.parsing import apply_overrides
from tuner.config.yaml_document import parse_document
from tuner.errors import DataError, SpaceError
from tuner.study import _override_text

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "first_study.ipynb"
HEAVY = ("torch", "optuna", "numpy", "pydantic", "pandas", "typer")


def notebook_cells() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_importing_tuner_loads_nothing_heavy() -> None:
    code = f"import sys, tuner; dir(tuner); print([m for m in {HEAVY} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "[]\n"


def test_every_name_is_there_and_type_checkers_see_the_same() -> None:
    tree = ast.parse(Path(package.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.name: str(node.module)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == package._MODULES
    assert sorted(package.__all__) == sorted([*seen, "__version__"])
    for name, module in seen.items():
        assert getattr(package, name) is getattr(importlib.import_module(module), name)
    with pytest.raises(AttributeError, match="'tuner' has no attribute 'lod'"):
        package.lod  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("name", ["fotos \U0001f600", "a\u2028b", "né #x: 'y'"])
def test_settings_take_every_character(name: str) -> None:
    document = parse_document(SMALL, "small.yaml")
    apply_overrides(document, [f"search.name={_override_text('search.name', name)}"])
    assert document.content["search"]["name"] == name and not document.problems


def test_a_dict_is_searched_as_its_file_is(
    tuner: Callable[..., CommandResult], studied: Path, tmp_path: Path
) -> None:
    space = parse_document(SMALL, "small.yaml").content
    study = package.run(
        space, settings={"search.trials": 2}, name="small", studies=tmp_path / "py", quiet=True
    )
    assert (study.state, study.name, study.metric) == ("done", "small", "accuracy")
    by_command = package.Study(studied)
    assert [(t.params, t.score) for t in study.trials] == [
        (t.params, t.score) for t in by_command.trials
    ]
    assert (study.best.params, study.scores) == (by_command.best.params, by_command.scores)
    again = package.run(
        space, settings={"search.trials": 2}, name="small", studies=tmp_path / "py", quiet=True
    )
    assert len(again.trials) == 2
    assert (study.folder / "report.html").is_file()


def test_the_frame_has_what_the_trials_have(studied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pandas", reason="pandas is not installed: pip install pandas")
    study = package.Study(studied)
    frame, trials = study.frame(), study.trials
    assert list(frame["number"]) == [trial.number for trial in trials]
    assert list(frame["score"]) == [trial.score for trial in trials]
    assert list(frame["param.epochs"]) == [trial.params["epochs"] for trial in trials]
    assert frame["score.accuracy"].max() == study.best.score
    monkeypatch.setattr("tuner.config.requirements.DISTRIBUTION", "not-installed")
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(SpaceError, match=r"frame\(\) needs pandas: pip install 'pandas>=2"):
        study.frame()


def test_a_report_goes_where_it_is_asked_to(studied: Path, tmp_path: Path) -> None:
    study = package.Study(studied)
    assert study.report(tmp_path / "r.md", markdown=True) == tmp_path / "r.md"
    assert study.report() == studied / "report.html"


@pytest.mark.parametrize(
    ("space", "arguments", "problem"),
    [
        ({"recipe": {"momentun": 0.9}}, {}, "dict: recipe.momentun: unknown key; did you mean"),
        ({}, {"time": "1 fortnight"}, "search.time"),
        ({}, {"settings": {"recipe.lr": object()}}, "recipe.lr: a object has no place in a space"),
        ({}, {"preset": "quick"}, "preset and read_as are for data"),
    ],
)
def test_what_is_wrong_is_said_as_of_a_file(
    space: dict[str, Any], arguments: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    given = parse_document(SMALL, "small.yaml").content | space
    with pytest.raises(SpaceError) as error:
        package.run(given, studies=tmp_path / "none", quiet=True, **arguments)
    assert problem in str(error.value)
    assert not (tmp_path / "none").exists()


def test_no_study_and_no_export(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no study there"):
        package.Study(tmp_path)
    with pytest.raises(DataError, match="no export under"):
        package.load(tmp_path)


def test_a_model_takes_images_in_every_form(studied: Path, tmp_path: Path) -> None:
    model = package.load(studied)
    assert model.task == "classification" and len(model.classes) == 3
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    file = tmp_path / "images" / "a.png"
    file.parent.mkdir()
    Image.fromarray(pixels).save(file)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    with Image.open(file) as image:
        forms: list[Any] = [str(file), image, pixels, tensor, tensor / 255]
        first, *others = [model(form) for form in forms]
        assert image.getpixel((0, 0)) == tuple(pixels[0, 0])  # it is still open
    assert all(other == first for other in others)
    assert [p.values["classes"] for p in model([file, pixels])] == [
        pytest.approx(first.values["classes"], abs=1e-5) for _ in range(2)
    ]
    assert model([file, pixels]) == model(torch.stack([tensor, tensor]))
    assert model(file.parent) == [first]
    assert list(model.predict((file for _ in range(2)), batch_size=1)) == [first] * 2
    probabilities = model.torch(model.prepare([file])).softmax(1)[0].tolist()
    assert dict(zip(model.classes, probabilities, strict=True)) == pytest.approx(
        first.values["classes"], abs=1e-5
    )


def test_what_a_model_cannot_take_is_refused(studied: Path, tmp_path: Path) -> None:
    model = package.load(studied)
    (tmp_path / "bad.jpg").write_text("no image")
    with pytest.raises(DataError, match=r"bad\.jpg: cannot identify image"):
        model(tmp_path / "bad.jpg")
    with pytest.raises(SpaceError, match=r"not normalised; this one is torch\.float32 from"):
        model(torch.linspace(-2, 2, 3 * 32 * 32).view(3, 32, 32))
    with pytest.raises(SpaceError, match=r"expected a tensor \(3, h, w\)"):
        model(torch.zeros(32, 32))
    with pytest.raises(SpaceError, match=r"expected an image .* got int"):
        model([1])  # type: ignore[list-item]


def test_a_worker_does_not_run_the_script_again(tmp_path: Path) -> None:
    """A script may call tuner.run at its top, without `if __name__ == "__main__"`."""
    script = tmp_path / "script.py"
    script.write_text(
        "from tuner.engines import local\n"
        "from tuner.jobs import Job\n"
        "print('script', flush=True)\n"
        "jobs, ends = iter([Job(0, 'tests.helpers.jobs:count', 1)]), []\n"
        "with local.run() as run_jobs:\n"
        "    run_jobs(lambda: next(jobs, None), lambda j, v: True, lambda j, o: ends.append(o.value), lambda: True, 1)\n"
        "print(ends)\n"
    )
    out = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )
    assert out.stdout == "script\n[1]\n"


def test_the_notebook_names_what_is_there() -> None:
    for cell in notebook_cells():
        for node in ast.walk(ast.parse(cell)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                owner = {"tuner": package, "study": package.Study, "model": package.Model}.get(
                    node.value.id
                )
                assert owner is None or hasattr(owner, node.attr) or node.attr == "folder"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is, cell after cell, from the images it draws to its predictions."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for cell in notebook_cells():
        exec(compile(cell, "first_study.ipynb", "exec"), names)
    assert names["study"].state == "done" and (tmp_path / "studies/shapes/report.html").is_file()
    assert names["prediction"].values["classes"].keys() == {"disc", "square", "stripes"}
