"""What SECURITY.md says, held: its sentences name tests that exist, as the table of faults does; these are those that stand nowhere else."""

import ast
import hashlib
import json
import os
import pickle
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tuner as package
from tests.conftest import CommandResult
from tests.helpers import damaged_files
from tuner import manifest
from tuner.config.data_options import ImageOptions
from tuner.core import weights
from tuner.core.input_spec import ImageInputSpec
from tuner.data import cifar10, coco, voc, yolo
from tuner.engines import local
from tuner.errors import DataError, SpaceError
from tuner.models import _hub

ROOT = Path(__file__).parents[2]
SIDE = ImageInputSpec(16, 16, "bilinear", (0.0,) * 3, (1.0,) * 3)
Tuner = Callable[..., CommandResult]


@pytest.mark.parametrize("page", ["SECURITY.md", "docs/faults.md"])
def test_every_test_that_a_page_names_is_there(page: str) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / page).read_text())
    assert len(named) > 20
    for file, name in named:
        functions = {
            node.name
            for node in ast.walk(ast.parse((ROOT / file).read_text()))
            if isinstance(node, ast.FunctionDef)
        }
        assert name in functions, f"{file}::{name}"


class Evil:
    """Unpickled, it leaves a mark in the working folder."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


# -- the package's own calls


def calls() -> list[tuple[str, str, ast.Call]]:
    found = []
    for path in Path(package.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                found.append((path.name, ast.unparse(node.func), node))
    return found


def given(call: ast.Call) -> dict[str, str]:
    return {str(k.arg): ast.unparse(k.value) for k in call.keywords}


def test_no_loader_that_runs_code_is_called() -> None:
    seen = set()
    for file, name, call in calls():
        words = given(call)
        assert name not in (
            "pickle.load",
            "pickle.loads",
            "pickle.Unpickler",
            "marshal.loads",
            "joblib.load",
            "os.system",
            "exec",
        ), file
        assert name != "eval" or file == "plugins.py"  # annotations of the package's own source
        assert name != "torch.load" or words.get("weights_only") == "True", file
        assert name != "torch.export.load" or file == "torch_export.py"  # SECURITY.md says for whom
        assert name not in ("np.load", "numpy.load", "torch.hub.load"), file
        assert name != "yaml.load" or words["Loader"] == "_NoAliasLoader", file
        assert name not in ("yaml.unsafe_load", "yaml.full_load"), file
        assert name != "Image.open" or words.get("formats") == "FORMATS", file
        assert not name.endswith(".extractall") or words.get("filter") == "'data'", file
        assert (
            words.get("shell", "False") == "False"
            and words.get("trust_remote_code", "False") == "False"
        ), file
        assert (
            not name.endswith(".from_pretrained")
            or "state_dict" in words
            or words.get("trust_remote_code") == "False"
        ), file
        seen.add(name)
    assert {
        "torch.load",
        "yaml.load",
        "Image.open",
        "tar.extractall",
    } <= seen  # else the test looks for what is not there


def test_python_is_never_started_with_the_current_folder_on_its_path() -> None:
    started = 0
    for path in Path(package.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            words = [ast.unparse(word) for word in node.elts] if isinstance(node, ast.List) else []
            if "sys.executable" in words:
                started += 1
                assert words[:2] == ["sys.executable", "'-P'"], path.name
    assert started == 2


def test_a_worker_does_not_import_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("multiprocessing", "pickle"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)

    worker = local.start_worker(0, 1.0)
    worker.pipe.close()
    worker.process.join(60)

    assert worker.process.exitcode == 0 and not (tmp_path / "ran").exists()
    assert "PYTHONSAFEPATH" not in os.environ


# -- weights and models


@pytest.mark.parametrize("length", [2**62, 2**31, 10_000, 0])
def test_a_safetensors_header_that_promises_too_much_is_refused(
    length: int, tmp_path: Path
) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(
        struct.pack("<Q", length)
        + b'{"a":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,4]}}'
    )
    with pytest.raises(DataError, match=r"w\.safetensors is damaged or not a safetensors file"):
        weights.read_state_dict(path)


def test_pickles_of_cifar_are_not_opened_unless_their_md5_is_the_published_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        (folder / name).write_bytes(pickle.dumps(Evil()))
    from tuner.files.downloads import forbid_downloads

    with forbid_downloads(True), pytest.raises(DataError, match="is not there yet"):
        cifar10.load(
            tmp_path / "home", SIDE, "classification", path=str(tmp_path), image=ImageOptions()
        )
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"auto_map": {"AutoModel": "evil.Model"}},
        {"attn_implementation": "owner/kernel"},
        {"_attn_implementation": "a/b"},
    ],
)
def test_a_models_folder_that_asks_for_code_is_refused(
    change: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", **change}))
    with pytest.raises(SpaceError, match=r"asks for code .*never"):
        _hub.read_config(tmp_path)


# -- names that lead elsewhere


@pytest.mark.parametrize(
    "name",
    ["../outside.png", "/etc/passwd", "a/../../outside.png", "..\\outside.png", "a\0.png", ""],
)
def test_names_that_leave_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    damaged_files.make_picture(0).save(tmp_path / "outside.png")
    file = damaged_files.write_coco(tmp_path / "coco")
    tree = json.loads(file.read_text())
    tree["images"][0]["file_name"] = name
    file.write_text(json.dumps(tree))
    with pytest.raises(
        DataError, match=r"image 0: file_name: .* leaves the folder|there is no such image"
    ):
        coco.load(
            tmp_path / "home", SIDE, "detection", path=str(tmp_path / "coco"), image=ImageOptions()
        )
    damaged_files.write_yolo(tmp_path / "yolo")
    (tmp_path / "yolo/data.yaml").write_text("train: list.txt\nnames: [cat, dog]\n")
    (tmp_path / "yolo/list.txt").write_text(f"images/1.png\n{name or '..'}\n")
    with pytest.raises(DataError, match=r"list\.txt:2: .* leaves the folder"):
        yolo.load(
            tmp_path / "home", SIDE, "detection", path=str(tmp_path / "yolo"), image=ImageOptions()
        )
    annotation = damaged_files.write_voc(tmp_path / "voc")
    annotation.write_text(
        annotation.read_text().replace("<filename>0.png<", f"<filename>{name.replace(chr(0), '')}<")
    )
    data = voc.load(
        tmp_path / "home", SIDE, "detection", path=str(tmp_path / "voc"), image=ImageOptions()
    )
    assert (
        len(data.train) + len(data.valid) + len(data.test) == 12
    )  # what the file says of its own name is not used


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", ".hidden", ""])
def test_a_studys_name_cannot_leave_the_studies_folder(
    name: str, tuner: Tuner, small: Path
) -> None:
    said = tuner("run", small, f"search.name='{name}'")
    assert said.code == 2 and "search.name" in said.err and "Traceback" not in said.err
    assert [path.name for path in small.parent.iterdir()] == ["small.yaml"]


EXPORTED = (
    "recipe.lr=0.01",
    "recipe.optimizer=sgd",
    "recipe.momentum=0.9",
    "recipe.freeze_depth=5",
    "recipe.epochs=1",
    "--quiet",
)


@pytest.fixture
def export(tuner: Tuner, small: Path) -> Path:
    assert tuner("train", small, *EXPORTED, "--out", small.parent / "export").code == 0
    return small.parent / "export"


def changed(export: Path, **change: Any) -> None:
    path = export / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def test_a_manifest_that_points_elsewhere_is_refused(export: Path) -> None:
    whole = json.loads((export / "manifest.json").read_text())
    outside = export.parent / "outside.safetensors"
    outside.write_bytes((export / "model.safetensors").read_bytes())
    digest = hashlib.sha256(outside.read_bytes()).hexdigest()
    for name in ("../outside.safetensors", str(outside)):
        changed(export, files={**whole["files"], name: digest})
        with pytest.raises(DataError, match="is no file that it vouches for in its folder"):
            manifest.read_export(export)
    changed(export, files=whole["files"], exports={"safetensors": {"file": "other.safetensors"}})
    with pytest.raises(DataError, match=r"names 'other\.safetensors'"):
        manifest.read_export(export)


def test_an_export_that_names_code_runs_it_only_when_trusted(
    export: Path, tuner: Tuner, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = json.loads((export / "manifest.json").read_text())
    damaged_files.make_picture(0).save(export / "a.png")
    (export / "loader.py").write_text(
        "open('ran', 'w')\ndef build(*_, **__): raise OSError('mine')"
    )
    monkeypatch.chdir(export)
    run = whole["run"]
    forged: list[dict[str, Any]] = [
        {"run": {**run, part: {**run[part], "name": "loader:build"}}} for part in ("task", "model")
    ]
    forged.append({"exports": {"loader:build": whole["exports"]["safetensors"]}})
    for change in forged:
        changed(export, **{**whole, **change})
        said = tuner("predict", ".", "a.png")
        assert said.code == 2 and "'loader:build' is code" in said.err and "--trust" in said.err
        said = tuner("predict", ".", "a.png", "--trust")
        assert said.code == 2 and "set PYTHONPATH" in said.err  # nor is it looked for here
        assert not (export / "ran").exists() and str(export) not in sys.path
    changed(export, **{**whole, **forged[1]})  # whose digest is still that of the honest run
    monkeypatch.chdir(export.parent)
    for name in ("a.png", "loader.py"):  # an export with these in it would not be replaced
        (export / name).rename(export.parent / name)
    assert tuner("train", "small.yaml", *EXPORTED, "--out", export).code == 0
    assert not list(export.parent.rglob("ran"))
    changed(export, **forged[1])
    Path("loader.py").write_text("def build(*_, **__): raise OSError('mine')")
    monkeypatch.syspath_prepend(str(export.parent))
    said = tuner("predict", export, "a.png", "--trust")
    assert said.code == 2 and "mine" in said.err


@pytest.mark.slow
def test_an_exports_other_formats_are_not_opened_unasked(export: Path, tuner: Tuner) -> None:
    whole = json.loads((export / "manifest.json").read_text())
    for name, file in (("torch_export", "model.pt2"), ("onnx", "model.onnx")):
        (export / file).write_bytes(pickle.dumps(Evil()))
        whole["files"][file] = hashlib.sha256((export / file).read_bytes()).hexdigest()
        whole["exports"][name] = {**whole["exports"]["safetensors"], "file": file}
    changed(export, files=whole["files"], exports=whole["exports"])
    damaged_files.make_picture(0).save(export.parent / "a.png")
    said = tuner("predict", export, export.parent / "a.png")
    assert said.code == 0 and "a.png" in said.out
    assert not (export.parent / "ran").exists()
