"""Segmentation as a task: losses, scores, what is shown and told; and from the file to the prediction."""

import ast
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchmetrics.functional.classification import (
    multiclass_confusion_matrix,
    multiclass_f1_score,
    multiclass_jaccard_index,
)

from tests.conftest import CommandResult
from tests.helpers.exported_programs import run_programs
from tests.helpers.mask_files import (
    CLASS_COLOURS,
    SPACE,
    draw_image_and_mask,
    paint_mask,
    write_images_and_masks,
)
from tuner.config.run import Recipe
from tuner.core.input_spec import ImageInputSpec, TensorTree
from tuner.core.targets import IGNORED
from tuner.core.types import Batch
from tuner.tasks.segmentation import (
    METRICS,
    Segmentation,
    build,
    count_pixels,
    dice_loss,
    mask_on_image,
)

CANVAS = ImageInputSpec(32, 36, "nearest", (0.0,) * 3, (1.0,) * 3, "letterbox")


def task(classes: int = 3, **keys: Any) -> Segmentation:
    found = build(tuple("abcdef"[:classes]), Recipe(), **keys)
    assert isinstance(found, Segmentation)
    return found


def made_up(seed: int = 0, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, classes, (2, 8, 8), generator=generator, dtype=torch.uint8)
    truth[:, :2] = 255
    return torch.randn(2, classes, 8, 8, generator=generator), truth


class Says(nn.Module):
    def __init__(self, tree: TensorTree) -> None:
        super().__init__()
        self.tree = tree

    def forward(self, x: TensorTree) -> TensorTree:
        return self.tree


def criterion(inputs: dict[str, Tensor], target: Tensor) -> Tensor:
    """torchvision's references/segmentation/train.py."""
    losses = {}
    for name, x in inputs.items():
        losses[name] = nn.functional.cross_entropy(x, target, ignore_index=255)
    if len(losses) == 1:
        return losses["out"]
    return losses["out"] + 0.5 * losses["aux"]


def test_the_loss_is_torchvisions_criterion() -> None:
    (out, truth), (aux, _) = made_up(0), made_up(1)
    for tree in ({"out": out, "aux": aux}, {"out": out}):
        assert torch.equal(
            task().loss(Says(tree), Batch(out, truth)), criterion(tree, truth.long())
        )
    assert torch.equal(
        task().loss(Says(out), Batch(out, truth)), criterion({"out": out}, truth.long())
    )


def test_the_dice_loss_is_that_of_segmentation_models_pytorch() -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    theirs = smp.losses.DiceLoss("multiclass", ignore_index=255)
    for seed in range(3):
        logits, truth = made_up(seed)
        if seed == 2:
            truth[truth == 1] = 0  # a class that is nowhere
        expected = theirs(logits, truth.long())
        assert dice_loss(logits, truth.long()) == pytest.approx(float(expected), abs=1e-6)
        assert task(loss="dice").loss(Says(logits), Batch(logits, truth)) == pytest.approx(
            float(expected), abs=1e-6
        )
        both = task(loss="both").loss(Says(logits), Batch(logits, truth))
        assert both == pytest.approx(
            float(expected + F.cross_entropy(logits, truth.long(), ignore_index=255)), abs=1e-6
        )


def test_rare_classes_weigh_more_in_the_cross_entropy_of_both_heads() -> None:
    counts = torch.tensor([80, 15, 5])
    recipe = Recipe(class_weights="balanced")
    weighted = build(("a", "b", "c"), recipe, counts)
    (out, truth), (aux, _) = made_up(0), made_up(1)
    weights = 100 / 3 / counts
    each = [
        F.cross_entropy(logits, truth.long(), ignore_index=255, reduction="none")
        for logits in (out, aux)
    ]
    pixel_weights = weights[truth.long().where(truth != 255, 0)]
    expected = ((each[0] + 0.5 * each[1]) * pixel_weights).sum() / (truth != 255).sum()
    loss = weighted.loss(Says({"out": out, "aux": aux}), Batch(out, truth))
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert build(("a", "b", "c"), Recipe(), counts).class_weights is None  # type: ignore[attr-defined]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("loss", ["cross_entropy", "dice", "both"])
def test_a_batch_that_is_all_border_has_loss_0_and_gradients_of_0(
    loss: str, smoothing: float
) -> None:
    judged = Segmentation(("a", "b", "c"), smoothing, loss)
    out, truth = made_up(0)
    aux = made_up(1)[0].requires_grad_()
    out.requires_grad_()
    border = torch.full_like(truth, 255)
    value = judged.loss(Says({"out": out, "aux": aux}), Batch(out, border))
    value.backward()  # type: ignore[no-untyped-call]
    assert value == 0
    assert out.grad is not None and aux.grad is not None
    assert not out.grad.any() and not aux.grad.any()
    border[1] = truth[1]  # and an image that is all border changes nothing of the other one's
    alone = judged.loss(Says({"out": out[1:]}), Batch(out[1:], truth[1:]))
    both = judged.loss(Says({"out": out}), Batch(out, border))
    assert torch.allclose(both, alone, rtol=1e-5)


def test_scores_of_four_pixels_and_an_ignored_one() -> None:
    truth = torch.tensor([[[0, 0, 0, 1, 255]]], dtype=torch.uint8)
    predicted = torch.tensor([[[0, 0, 1, 1, 2]]], dtype=torch.uint8)
    assert task().score([(predicted, truth)]) == pytest.approx(
        {
            "mean_iou": (2 / 3 + 1 / 2) / 2,
            "dice": (4 / 5 + 2 / 3) / 2,
            "pixel_accuracy": 3 / 4,
            "mean_accuracy": (2 / 3 + 1) / 2,
        }
    )
    assert tuple(task().score([(predicted, truth)])) == METRICS


def test_each_class_has_its_scores_and_one_that_nobody_sees_only_its_pixels() -> None:
    truth = torch.tensor([[[0, 0, 0, 1, 255]]], dtype=torch.uint8)
    predicted = torch.tensor([[[0, 0, 1, 1, 1]]], dtype=torch.uint8)
    judged = task(3)
    first, second, third = judged.class_scores([(predicted, truth)]).values()
    assert first == pytest.approx(
        {"iou": 2 / 3, "dice": 4 / 5, "recall": 2 / 3, "precision": 1, "pixels": 3}
    )
    assert second == pytest.approx(
        {"iou": 1 / 2, "dice": 2 / 3, "recall": 1, "precision": 1 / 2, "pixels": 1}
    )
    assert third == {"pixels": 0}


def test_a_class_that_is_predicted_but_nowhere_true_counts_and_one_that_is_neither_does_not() -> (
    None
):
    truth, predicted = (
        torch.zeros(1, 1, 4, dtype=torch.uint8),
        torch.tensor([[[0, 0, 0, 1]]], dtype=torch.uint8),
    )
    assert task(3).score([(predicted, truth)])["mean_iou"] == pytest.approx((3 / 4 + 0) / 2)
    assert task(3).score([(truth, truth)])["mean_iou"] == 1.0


def test_scores_over_batches_are_torchmetrics_over_all_pixels() -> None:
    pairs = []
    for seed in range(4):
        logits, truth = made_up(seed)
        pairs.append((task().predict(Says(logits), logits), truth))
    predicted, truth = (torch.cat([pair[i] for pair in pairs]).long() for i in (0, 1))
    scores = task().score(pairs)
    assert scores["mean_iou"] == pytest.approx(
        float(multiclass_jaccard_index(predicted, truth, 3, ignore_index=255))
    )
    assert scores["dice"] == pytest.approx(
        float(multiclass_f1_score(predicted, truth, 3, ignore_index=255, average="macro"))
    )


def test_predictions_are_kept_small() -> None:
    logits, _ = made_up()
    found = task().predict(Says({"out": logits, "aux": -logits}), logits)
    assert found.dtype == torch.uint8 and torch.equal(found, logits.argmax(1).to(torch.uint8))


@pytest.mark.parametrize("size", [(40, 30), (31, 47), (64, 20), (200, 200)])
def test_a_mask_comes_back_onto_the_image(size: tuple[int, int]) -> None:
    """A rectangle on the canvas, where decoding puts it, is found where it is on the image, but for the blur of resizing."""
    from tuner.preprocessing.image_decoding import fit_to_canvas

    mask = np.zeros((size[1], size[0]), np.uint8)
    mask[size[1] // 4 : size[1] // 2, size[0] // 3 : size[0] // 2] = 1
    canvas = np.asarray(fit_to_canvas(Image.fromarray(mask), CANVAS, "nearest", 0)).copy()
    logits = F.one_hot(torch.from_numpy(canvas).long(), 2).permute(2, 0, 1).float()
    found = mask_on_image(logits, *size, CANVAS)
    assert found.shape == mask.shape and found.max() == 1
    edge = max(1, round(max(size) / 32))
    middle = mask.copy()
    middle[size[1] // 4 + edge : size[1] // 2 - edge, size[0] // 3 + edge : size[0] // 2 - edge] = 2
    assert (found[middle == 2] == 1).all()
    grown = np.asarray(Image.fromarray(mask).resize(size)).copy()
    grown[size[1] // 4 - edge : size[1] // 2 + edge, size[0] // 3 - edge : size[0] // 2 + edge] = 1
    assert (found[grown == 0] == 0).all()


def test_what_a_crop_cuts_away_is_ignored() -> None:
    found = mask_on_image(
        torch.ones(2, 32, 32), 64, 32, ImageInputSpec(32, 32, "nearest", (0.0,) * 3, (1.0,) * 3)
    )
    assert (
        (found[:, :16] == 255).all()
        and (found[:, 16:48] == 0).all()
        and (found[:, 48:] == 255).all()
    )


def test_what_is_told_is_a_share_for_each_class_and_a_picture() -> None:
    logits = torch.full((1, 3, 32, 32), -1.0)
    logits[0, 0], logits[0, 2, :, :8] = 0.0, 1.0
    original = Image.new("RGB", (64, 64), "white")
    (told,) = task().describe_predictions(lambda _: logits, logits, [original], CANVAS)
    assert told.line == "a 75.0%  c 25.0%"
    assert told.values == {"shares": {"a": 0.75, "b": 0.0, "c": 0.25}}
    assert told.picture is not None
    picture = Image.open(io.BytesIO(told.picture))
    assert picture.size == (64, 64) and picture.getpixel((60, 30)) == (
        255,
        255,
        255,
    ) != picture.getpixel((4, 30))


def oracle(x: TensorTree) -> TensorTree:
    """Logits that say of each pixel the class whose ink it has."""
    assert isinstance(x, Tensor)
    inks = torch.tensor(CLASS_COLOURS).float() / 255
    return -(x[:, None] - inks[None, :, :, None, None]).abs().sum(2)


def test_what_is_true_of_a_drawn_image_is_told_of_it() -> None:
    image, mask = draw_image_and_mask(0, 3)
    from tuner.preprocessing.image_decoding import decode

    x = torch.from_numpy(decode(np.asarray(image), CANVAS)[None].copy()).float() / 255
    (told,) = task().describe_predictions(oracle, x, [image], CANVAS)
    assert [told.values["shares"][name] for name in "abc"] == pytest.approx(
        (np.bincount(np.asarray(mask).ravel(), minlength=3) / mask.width / mask.height).tolist(),
        abs=0.06,
    )


# -- from the file to the prediction


@pytest.fixture
def space(tmp_path: Path) -> Path:
    path = tmp_path / "s.yaml"
    path.write_text(
        SPACE.replace("path: x", f"path: {write_images_and_masks(tmp_path / 'scenes', 20)}")
    )
    return path


def test_from_the_file_to_a_prediction_with_a_picture(
    space: Path, tuner: Callable[..., CommandResult], tmp_path: Path
) -> None:
    said = tuner(
        "run",
        space,
        "recipe.epochs=6",
        "recipe.lr=0.01",
        "search.trials=1",
        "data.classes=[floor, box]",
    )
    assert said.code == 0, said.err
    assert "validation mean iou" in said.out and "\ntest     mean iou" in said.out
    study = tmp_path / "studies" / "s"
    kept = [path.read_bytes() for path in (study / "artifacts").iterdir()]
    (table,) = (content for content in kept if content.startswith(b"class,"))
    assert [line.split(b",")[0] for line in table.splitlines()] == [b"class", b"floor", b"box"]
    (sheet,) = (content for content in kept if content.startswith(b"\x89PNG"))
    assert Image.open(io.BytesIO(sheet)).size == (720, 20 + 4 * 240)  # 4 validation examples
    manifest = json.loads((study / "export" / "manifest.json").read_text())
    assert manifest["scores"]["test"]["mean_iou"] > 0.8
    image, mask = draw_image_and_mask(100)
    image.save(tmp_path / "new.png")
    said = tuner("predict", "s", "new.png", "--json", "--out", "seen")
    assert said.code == 0, said.err
    found = json.loads(said.out)
    assert found["shares"]["box"] == pytest.approx(float(np.asarray(mask).mean()), abs=0.1)
    (picture,) = (tmp_path / "seen").iterdir()
    assert Image.open(io.BytesIO(picture.read_bytes())).size == image.size


def test_a_trial_of_several_folds_is_their_mean(space: Path, tmp_path: Path) -> None:
    from tuner.config import parsing
    from tuner.config.run import EngineSettings
    from tuner.training.cross_validation import fit_folds, prepare_folds
    from tuner.training.devices import select_device
    from tuner.training.preparation import prepare_training
    from tuner.training.training_loop import fit

    def run(*words: str) -> Any:
        return parsing.load_space(space, ["recipe.epochs=1", "data.folds=3", *words]).sample(
            None, seed=1
        )

    here = select_device(EngineSettings.model_validate({"device": "cpu"}), tmp_path / "home")
    (whole,) = fit_folds(run(), prepare_folds(run(), here, "mean_iou"))
    single = []
    for fold in range(3):
        r = run(f"data.fold={fold}")
        (progress,) = fit(prepare_training(r, here, "mean_iou"), r.recipe, r.seed)
        single.append(progress.epoch.scores["mean_iou"])
    assert whole.epoch.scores["mean_iou"] == pytest.approx(sum(single) / 3, abs=1e-6)
    assert whole.best is not None and len(whole.best.predictions) > 0


def test_a_model_of_ones_own_may_give_logits_or_a_dict(
    space: Path, tuner: Callable[..., CommandResult], tmp_path: Path
) -> None:
    (tmp_path / "own_segmenter_of_a_test.py").write_text(
        "from torch import nn\n\n\ndef tiny(outputs):\n    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, outputs, 1))\n"
    )
    said = tuner(
        "run",
        space,
        "model=own_segmenter_of_a_test:tiny",
        "search.trials=1",
        "export=[safetensors,onnx]",
    )
    assert said.code == 0, said.err
    export = tmp_path / "studies/s/export"
    draw_image_and_mask(100)[0].save(export / "image.jpg")
    (pixels,) = run_programs(export, "onnx")
    size = json.loads((export / "manifest.json").read_text())["preprocess"]["size"]
    assert sum(ast.literal_eval(pixels).values()) == size**2


def test_the_scenes_are_what_they_seem() -> None:
    image, mask = draw_image_and_mask(3, 3)
    assert image.size == mask.size and np.array_equal(
        np.asarray(paint_mask(mask)), np.asarray(image)
    )


def test_weights_follow_the_pixels_of_the_training_masks(space: Path, tmp_path: Path) -> None:
    from tuner.config import parsing
    from tuner.config.run import EngineSettings
    from tuner.training.devices import select_device
    from tuner.training.preparation import prepare_training

    words = ["recipe.class_weights=balanced", "data.augment=flip"]
    run = parsing.load_space(space, words).make_run({}, seed=0)
    here = select_device(EngineSettings(device="cpu"), tmp_path)
    context = prepare_training(run, here, "mean_iou")
    masks = context.dataset.train.take(torch.arange(len(context.dataset.train)), 0).y
    assert isinstance(masks, Tensor)
    counts = torch.bincount(masks[masks != 255].long(), minlength=len(context.dataset.classes))
    expected = counts.sum() / len(counts) / counts
    weights = context.task.class_weights  # type: ignore[attr-defined]
    assert torch.allclose(weights.double(), expected.double())


def test_pixels_are_counted_as_torchmetrics_counts_them() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted, truth = torch.randint(0, 200, (2, 3, 40, 50), generator=generator).to(torch.uint8)
    truth[truth > 190] = IGNORED
    expected = multiclass_confusion_matrix(
        predicted.long(), truth.long(), 200, ignore_index=IGNORED
    )
    assert torch.equal(count_pixels(predicted, truth, 200), expected)
    truth[:] = IGNORED
    assert not count_pixels(predicted, truth, 200).any()


def test_the_test_score_is_that_of_the_pixels_of_the_original_masks(
    space: Path, tmp_path: Path
) -> None:
    from tuner.config import parsing, yaml_document
    from tuner.config.run import EngineSettings
    from tuner.training.devices import select_device
    from tuner.training.finalization import score_test_split
    from tuner.training.preparation import prepare_training

    run = parsing.parse_space(yaml_document.parse_document(space.read_text(), "s.yaml")).sample(
        None, seed=0
    )
    device = select_device(EngineSettings(device="cpu"), tmp_path / "home")
    context = prepare_training(run, device, "mean_iou")
    tested = score_test_split(context, "digest", 4, None, False)
    total = torch.zeros(2, 2, dtype=torch.int64)
    sizes = []
    dataset = context.dataset
    assert isinstance(dataset.input_spec, ImageInputSpec)
    for number in range(len(dataset.test)):
        truth = dataset.test.take_original(number)  # type: ignore[attr-defined]
        x = dataset.input_spec.to_model_input(
            dataset.test.take(torch.tensor([number]), 0).x, device.device
        )
        with torch.no_grad():
            logits = context.net.eval()(x)
        height, width = truth.shape
        predicted = torch.from_numpy(mask_on_image(logits[0], width, height, dataset.input_spec))
        total += count_pixels(predicted[None], truth[None], 2)
        sizes.append(width * height)
    assert tested.results["true"].sum(1).tolist() == sizes
    assert len(set(sizes)) > 1  # a canvas has one size
    hits, true, seen = total.diag(), total.sum(1), total.sum(0)
    assert tested.scores["mean_iou"] == pytest.approx(float((hits / (true + seen - hits)).mean()))
