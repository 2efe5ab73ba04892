"""Token classification: entities as conlleval counts them, and the library's own loss over the words."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import small_transformers, tagged_files
from tuner.config import parsing, yaml_document
from tuner.config.run import EngineSettings, Recipe, Run
from tuner.core.types import Batch
from tuner.errors import SpaceError
from tuner.tasks import token_classification
from tuner.tasks._entities import TagSet, find_entities
from tuner.training.building import build_model, build_task, load_dataset
from tuner.training.class_balance import count_classes
from tuner.training.devices import select_device
from tuner.training.preparation import prepare_training

TAGS = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")


def task(**keys: str) -> token_classification.TokenClassification:
    built = token_classification.build(TAGS, Recipe(), **keys)  # type: ignore[arg-type]
    assert isinstance(built, token_classification.TokenClassification)
    return built


def ids(tags: str) -> torch.Tensor:
    """A row of tags: `.` for a token that does not count, b and i for LOC, B and I for PER."""
    return torch.tensor([[{".": -100}.get(c, "ObiBI".find(c)) for c in tags]])


@pytest.mark.parametrize(
    ("tags", "entities"),
    [
        ("OBIIO", [(1, 3, "PER")]),
        ("BBI", [(0, 0, "PER"), (1, 2, "PER")]),
        ("OIIb", [(1, 2, "PER"), (3, 3, "LOC")]),  # an I- behind O begins one, as in conlleval
        ("BiI", [(0, 0, "PER"), (1, 1, "LOC"), (2, 2, "PER")]),
        ("B.I.O", [(0, 2, "PER")]),  # tokens that do not count are passed over
        ("OOO", []),
        ("...", []),
    ],
)
def test_entities_are_those_of_conlleval(tags: str, entities: list[tuple[int, int, str]]) -> None:
    row = ids(tags).numpy()
    tag_set = TagSet.of(TAGS)
    found = find_entities(np.maximum(row, 0), row >= 0, tag_set).as_set()
    assert found == {(0, a, b, tag_set.types.index(kind)) for a, b, kind in entities}


def test_an_entity_does_not_go_on_in_the_next_text() -> None:
    rows = torch.cat([ids("OB"), ids("IO")]).numpy()
    assert len(find_entities(rows, rows >= 0, TagSet.of(TAGS)).rows) == 2


def test_scores_by_hand() -> None:
    """Three true entities; one is found, one has a wrong end, one is missed; one is made up."""
    truth = torch.cat([ids("BIObi"), ids("bO.OO")]).to(torch.int16)
    predicted = torch.cat([ids("BIObO"), ids("OOBOB")])
    scores = task().score([(predicted, truth)])
    assert scores == pytest.approx(
        {
            "entity_f1": 2 / 6,
            "entity_precision": 1 / 3,
            "entity_recall": 1 / 3,
            "token_accuracy": 6 / 9,
        }
    )
    per_type = task().class_scores([(predicted, truth)])
    assert per_type["LOC"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "examples": 2}
    assert per_type["PER"] == pytest.approx(
        {"precision": 0.5, "recall": 1.0, "f1": 2 / 3, "examples": 1}
    )


def test_predictions_that_end_with_the_longest_text_are_scored_alike() -> None:
    truth = ids("BIO.....").to(torch.int16)
    assert task().score([(ids("BIO"), truth)])["entity_f1"] == 1.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("names")
    small_transformers.write_model_folder(root, "bert")
    tagged_files.write_conll(root / "names.conll")
    return root


def make_run(folder: Path, *words: str) -> Run:
    text = f"task: token_classification\ndata: {{name: tagged_text, path: {folder / 'names.conll'}}}\nmodel: {{name: bert, folder: {folder / 'bert'}, length: 32}}\n"
    document = parsing.apply_overrides(yaml_document.parse_document(text, "names.yaml"), words)
    return parsing.parse_space(document).sample(None, seed=5)


def test_the_loss_and_its_gradients_are_the_librarys_own(folder: Path, tmp_path: Path) -> None:
    run = make_run(folder)
    data = load_dataset(run, tmp_path)
    assert data.classes == TAGS
    staged = build_model(run, tmp_path, len(TAGS))
    x, y = data.train.take(torch.arange(6), 0)
    assert isinstance(x, dict) and isinstance(y, torch.Tensor)
    native = staged.model.eval()
    expected = native(**x, labels=y.long()).loss
    expected.backward()
    gradients = {n: p.grad.clone() for n, p in native.named_parameters() if p.grad is not None}
    native.zero_grad()
    loss = build_task(run, TAGS).loss(staged.split(0)[1].eval(), Batch(x, y))
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-6)
    for name, parameter in native.named_parameters():
        if name in gradients:
            assert parameter.grad is not None
            assert torch.allclose(parameter.grad, gradients[name], atol=1e-6), name


def test_class_weights_count_the_words_of_each_tag(folder: Path, tmp_path: Path) -> None:
    data = load_dataset(make_run(folder), tmp_path)
    targets = data.train.take(torch.arange(len(data.train)), 0).y
    assert isinstance(targets, torch.Tensor)
    counts = count_classes(data.train, len(TAGS))
    assert counts.tolist() == [int((targets == tag).sum()) for tag in range(len(TAGS))]
    assert counts[1] > 0 and counts[0] > counts[1]


def test_the_head_begins_as_the_probe_of_the_words(folder: Path, tmp_path: Path) -> None:
    losses = {}
    for head in ("probe", "fresh"):
        run = make_run(folder, f"recipe.head={head}")
        device = select_device(
            EngineSettings.model_validate({"name": "inline", "device": "cpu"}), tmp_path
        )
        context = prepare_training(run, device, "entity_f1")
        context.net.eval()
        batch = context.valid.take(torch.arange(len(context.valid)), 0)
        with torch.no_grad():
            losses[head] = float(context.task.loss(context.net, batch))
    assert losses["probe"] < 0.6 * losses["fresh"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("recipe.mixup=0.2", "token_classification cannot use it: a token of two mixed texts"),
        ("recipe.sampling=balanced", "token_classification has no such key"),
        ("recipe.focal_gamma=2", "token_classification has no such key"),
        ("search.calibrate=1.5", "token_classification has no such key"),
        ("model.name=resnet18", "token_classification"),
    ],
)
def test_keys_that_mean_nothing_are_refused(folder: Path, words: str, says: str) -> None:
    with pytest.raises(SpaceError) as caught:
        make_run(folder, words)
    assert says in str(caught.value)
