"""A segmenter whose last convolutions are new begins as their linear probe over pixels; heads with trained weights do not."""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.helpers import segmenters
from tuner.config.run import EngineSettings
from tuner.core.targets import IGNORED
from tuner.core.types import Batch
from tuner.files.cache_entries import list_entries
from tuner.models._feature_maps import HEIGHT_NAME, WIDTH_NAME
from tuner.models.torchvision_segmentation import SegmentationHeads
from tuner.training import pixel_probe
from tuner.training.building import build_model
from tuner.training.devices import DeviceContext, select_device
from tuner.training.epoch import TrainingContext, predict_source
from tuner.training.linear_probe import LayerExamples
from tuner.training.preparation import prepare_training


@pytest.fixture
def here(tmp_path: Path) -> DeviceContext:
    return select_device(EngineSettings(device="cpu"), tmp_path / "home")


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of pixels of every group of convolutions that is solved."""
    seen: list[int] = []
    real = pixel_probe.solve_convolutions

    def solve(group: Any, loss: Any, train: Any, valid: Any, **options: Any) -> None:
        seen.append(len(train) + (len(valid) if options["join_valid"] else 0))
        real(group, loss, train, valid, **options)

    monkeypatch.setattr(pixel_probe, "solve_convolutions", solve)
    return seen


def pixel_accuracy(context: TrainingContext) -> float:
    pairs = predict_source(context, context.valid, 4)
    return context.task.score(pairs)["pixel_accuracy"]


def head_state(context: TrainingContext) -> dict[str, Tensor]:
    return list(context.staged_model.stages.values())[-1].state_dict()


def test_a_segmenter_begins_as_the_probe_of_its_pixels(
    tmp_path: Path, here: DeviceContext, solved: list[int]
) -> None:
    weights = segmenters.write_weights(
        tmp_path / "five.safetensors", "lraspp_mobilenet_v3_large", 5
    )
    fresh = prepare_training(
        segmenters.make_run(tmp_path, weights, "recipe.head=fresh"), here, "mean_iou"
    )
    assert solved == []
    probed = prepare_training(segmenters.make_run(tmp_path, weights), here, "mean_iou")
    images = len(probed.dataset.train)
    assert 0 < solved[0] <= images * pixel_probe.PIXELS_PER_IMAGE
    assert pixel_accuracy(probed) > max(0.7, pixel_accuracy(fresh) + 0.05)

    deep = prepare_training(
        segmenters.make_run(tmp_path, weights, "recipe.freeze_depth=6"), here, "mean_iou"
    )
    assert all(
        torch.equal(value, head_state(probed)[key]) for key, value in head_state(deep).items()
    )
    assert len(solved) == 1 and len(list_entries(here.home / "probes")) == 1


def test_the_layers_before_the_new_convolutions_keep_their_weights(
    tmp_path: Path, here: DeviceContext
) -> None:
    weights = segmenters.write_weights(
        tmp_path / "five.safetensors", "lraspp_mobilenet_v3_large", 5
    )
    states = [
        head_state(prepare_training(segmenters.make_run(tmp_path, weights, word), here, "mean_iou"))
        for word in ("recipe.head=probe", "recipe.head=fresh")
    ]
    changed = {key for key, value in states[0].items() if not torch.equal(value, states[1][key])}
    assert changed == {
        f"classifier.{name}_classifier.{kind}"
        for name in ("low", "high")
        for kind in ("weight", "bias")
    }


def test_who_learns_from_train_and_valid_has_a_probe_of_both(
    tmp_path: Path, here: DeviceContext, solved: list[int]
) -> None:
    weights = segmenters.write_weights(
        tmp_path / "five.safetensors", "lraspp_mobilenet_v3_large", 5
    )
    for word in ("recipe.fit=train", "recipe.fit=train+valid"):
        prepare_training(segmenters.make_run(tmp_path, weights, word), here, "mean_iou")
    assert len(solved) == 2 and solved[1] > solved[0]


def test_heads_with_trained_weights_or_over_new_layers_are_left_alone(
    tmp_path: Path, here: DeviceContext, solved: list[int]
) -> None:
    trained = segmenters.write_weights(tmp_path / "two.safetensors", "lraspp_mobilenet_v3_large", 2)
    run = segmenters.make_run(tmp_path, trained)
    state = head_state(prepare_training(run, here, "mean_iou"))
    built = build_model(run, here.home, 2)
    assert all(
        torch.equal(value, state[key])
        for key, value in list(built.stages.values())[-1].state_dict().items()
    )
    without = segmenters.make_run(tmp_path, trained, "model.weights=none")
    prepare_training(without, here, "mean_iou")
    backbone = {
        key.removeprefix("backbone."): value.contiguous()
        for key, value in built.model.state_dict().items()
        if key.startswith("backbone.")
    }
    save_file(backbone, tmp_path / "backbone.safetensors")
    prepare_training(
        segmenters.make_run(tmp_path, tmp_path / "backbone.safetensors"), here, "mean_iou"
    )
    assert solved == []


@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_mobilenet_v3_large"])
def test_the_auxiliary_head_is_probed_too(name: str, tmp_path: Path) -> None:
    weights = segmenters.write_weights(tmp_path / "five.safetensors", name, 5)
    run = segmenters.make_run(tmp_path, weights, f"model.name={name}")
    groups = build_model(run, Path(), 2).pixel_classifiers
    assert [[layer.out_channels for layer in group] for group in groups] == [[2], [2]]
    assert groups[0][0] is not groups[1][0]


# -- the parts


@dataclass(frozen=True)
class Scenes:
    """Feature maps of half the size of their masks; some pixels are ignored and would mislead."""

    maps: Tensor
    masks: Tensor
    views: int | None = 1
    lengths: Tensor | None = None
    digest: str = "scenes"

    @staticmethod
    def make(count: int, seed: int) -> "Scenes":
        generator = torch.Generator().manual_seed(seed)
        maps = torch.randn(count, 6, 8, 10, generator=generator)
        enlarged = F.interpolate(maps, size=(16, 20), mode="bilinear", align_corners=False)
        weight = torch.randn(3, 6, generator=torch.Generator().manual_seed(9))
        logits = torch.einsum("kc,nchw->nkhw", weight, enlarged)
        noise = torch.randn(logits.shape, generator=generator)
        masks = (logits + 0.5 * noise).argmax(1).to(torch.uint8)
        masks[:, :4] = IGNORED
        maps[:, :, :1] = 50.0  # below ignored pixels alone, but for the border of their row
        return Scenes(maps, masks)

    def __len__(self) -> int:
        return len(self.masks)

    def take(self, index: Tensor, view: int) -> Batch:
        return Batch(self.maps[index], self.masks[index])


class TwoConvolutions(nn.Module):
    """A head whose output is the sum of two convolutions over parts of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 3, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.first(x[:, :2]) + self.second(x[:, 2:])
        return F.interpolate(logits, size=(16, 20), mode="bilinear", align_corners=False)


def cross_entropy(net: nn.Module, batch: Batch) -> Tensor:
    assert isinstance(batch.y, Tensor)
    return F.cross_entropy(net(batch.x), batch.y.long())


def solve(head: TwoConvolutions, train: Scenes, valid: Scenes) -> LayerExamples:
    """Solves both convolutions; returns the training examples."""
    group = (head.first, head.second)
    examples = [
        pixel_probe.collect_pixel_examples(head, (group,), source, nullcontext)[0]
        for source in (train, valid)
    ]
    pixel_probe.solve_convolutions(group, cross_entropy, *examples)
    return examples[0]


def test_solved_convolutions_are_as_good_as_scikit_learns_logistic_regression() -> None:
    from sklearn.linear_model import LogisticRegression

    torch.manual_seed(0)
    head = TwoConvolutions()
    train = solve(head, Scenes.make(8, 1), Scenes.make(4, 2))
    assert len(train) == 8 * min(12 * 20, pixel_probe.PIXELS_PER_IMAGE)
    assert int(train.targets.max()) == 2  # no ignored pixel
    theirs = LogisticRegression(max_iter=2000).fit(train.inputs, train.targets)
    test = Scenes.make(6, 3)
    with torch.no_grad():
        logits = head(test.maps)
    counted = test.masks != IGNORED
    truth = test.masks[counted].long()
    ours_loss = float(F.cross_entropy(logits.permute(0, 2, 3, 1)[counted], truth))
    everywhere = torch.arange(16 * 20).expand(len(test), -1)
    features = pixel_probe.features_at(test.maps, everywhere, (16, 20))
    features = features.reshape(len(test), 16, 20, 6)[counted]
    probabilities = torch.from_numpy(theirs.predict_proba(features))
    their_loss = float(F.nll_loss(probabilities.log(), truth))
    assert ours_loss == pytest.approx(their_loss, abs=0.01) and ours_loss < 0.6


@dataclass(frozen=True)
class NamedScenes:
    """Scenes whose maps travel under names, one for each of two heads."""

    scenes: Scenes
    views: int | None = 1
    lengths: Tensor | None = None
    digest: str = "named"

    def __len__(self) -> int:
        return len(self.scenes)

    def take(self, index: Tensor, view: int) -> Batch:
        maps, masks = self.scenes.take(index, view)
        assert isinstance(maps, Tensor)
        sides = {
            HEIGHT_NAME: maps.new_zeros(len(index), 16),
            WIDTH_NAME: maps.new_zeros(len(index), 20),
        }
        return Batch({"deep": maps, "early": 2 * maps, **sides}, masks)


def test_both_outputs_of_a_head_are_collected_in_one_pass_in_eval_mode() -> None:
    layers = (nn.Conv2d(6, 3, 1), nn.Conv2d(6, 3, 1))
    bodies = [nn.Sequential(nn.Dropout(0.9), layer) for layer in layers]
    head = SegmentationHeads(bodies[0], bodies[1], ("deep", "early"), None)
    groups = [(layer,) for layer in layers]
    source = NamedScenes(Scenes.make(3, 1))
    main, auxiliary = pixel_probe.collect_pixel_examples(head, groups, source, nullcontext)
    assert len(main) > 0 and torch.equal(2 * main.inputs, auxiliary.inputs)
    assert torch.equal(main.targets, auxiliary.targets)  # type: ignore[arg-type]
    assert not head.training


def test_features_at_pixels_are_those_of_enlarged_maps() -> None:
    maps = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    enlarged = F.interpolate(maps, size=(18, 13), mode="bilinear", align_corners=False)
    pixels = torch.arange(18 * 13).expand(2, -1)
    got = pixel_probe.features_at(maps, pixels, (18, 13))
    torch.testing.assert_close(got, enlarged.flatten(2).transpose(1, 2))


def test_the_sample_of_an_image_does_not_depend_on_its_neighbours() -> None:
    masks = torch.zeros(3, 10, 10, dtype=torch.uint8)
    masks[1, :, 1:] = IGNORED
    index = torch.tensor([4, 7, 9])
    together = pixel_probe.sample_pixels(masks, index, 8)
    alone = torch.cat(
        [pixel_probe.sample_pixels(masks[i : i + 1], index[i : i + 1], 8) for i in range(3)]
    )
    assert torch.equal(together, alone)
    assert not torch.equal(together[0], together[2])
    assert set((together[1] % 10).tolist()) == {0}  # the ten pixels that count come first
