"""A whole study on real photographs through `folder`, as a user would run it."""

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest

from tests.conftest import CommandResult
from tuner.search import storage

PER_CLASS = {"train": 60, "test": 20}


@pytest.fixture
def cifar(shared: Path, tmp_path: Path) -> Path:
    """The first images of each class of CIFAR-10, as folders."""
    folder = tmp_path / "cifar10"
    with tarfile.open(shared / "cifar10.tar.gz") as archive:
        seen: dict[tuple[str, str], int] = {}
        for member in archive:
            parts = Path(member.name).parts
            if not member.isfile() or len(parts) != 4:
                continue
            part, label = parts[1:3]
            seen[part, label] = seen.get((part, label), 0) + 1
            if seen[part, label] <= PER_CLASS[part]:
                target = folder / part / label / parts[3]
                target.parent.mkdir(parents=True, exist_ok=True)
                source = archive.extractfile(member)
                assert source is not None
                target.write_bytes(source.read())
    return folder


@pytest.mark.slow
def test_a_study_of_photographs_ends_in_a_model_that_predicts_them(
    cifar: Path, tuner: Callable[..., CommandResult]
) -> None:
    space = Path(__file__).parents[2] / "search_spaces" / "resnet.yaml"
    said = tuner(
        "run",
        space,
        f"data={{name: folder, path: {cifar}, size: 64}}",
        "search.name=cifar",
        "search.trials=6",
        "recipe.epochs.low=3",
    )
    assert said.code == 0, said.err
    study = optuna.load_study(
        study_name="cifar", storage=storage.open_storage(None, Path("studies/cifar"))
    )
    assert study.best_value > 0.25  # chance is 0.1
    manifest = json.loads(Path("studies/cifar/export/manifest.json").read_text())
    assert (
        manifest["examples"] == {"train": 510, "valid": 90, "test": 200}
        and manifest["scores"]["test"]["accuracy"] > 0.2
    )
    tables = [
        p
        for p in Path("studies/cifar/artifacts").iterdir()
        if p.read_bytes().startswith(b"class,precision")
    ]
    assert tables and len(list(csv.reader(io.StringIO(tables[0].read_text())))) == 11
    answers = tuner("predict", "cifar", cifar / "test" / "ship", "--json").out.splitlines()
    assert len(answers) == 20 and all(
        sum(json.loads(a)["classes"].values()) == pytest.approx(1, abs=1e-3) for a in answers
    )
