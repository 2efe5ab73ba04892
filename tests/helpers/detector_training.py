"""What the tests of detectors share: pictures with known objects, the least of a task, and a training over them."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tuner.config.run import EngineSettings, Recipe
from tuner.core.detectors import NO_OBJECT, join_targets
from tuner.core.input_spec import ImageInputSpec, InputSpec, TensorTree
from tuner.core.types import Batch, Dataset, Prediction, Source, StagedModel, Task
from tuner.training import activation_cache, frozen_prefix
from tuner.training.batch_norm import pretrained_norms
from tuner.training.building import DeviceSource
from tuner.training.devices import DeviceContext, select_device
from tuner.training.training_loop import TrainingContext, fit

SIDE = 64
BOXES = torch.tensor(
    [
        [[4.0, 6, 36, 40], [20, 10, 60, 50]],
        [[10, 12, 50, 60], [0, 0, 0, 0]],
        [[0, 0, 0, 0], [0, 0, 0, 0]],
        [[30, 30, 62, 62], [2, 3, 20, 30]],
    ]
)
LABELS = torch.tensor(
    [[0, 2], [1, NO_OBJECT], [NO_OBJECT, NO_OBJECT], [2, 0]]
)  # the third picture has none


def make_targets(side: int = SIDE) -> dict[str, Tensor]:
    return {"boxes": BOXES * side / SIDE, "labels": LABELS}


def make_pixels(side: int = SIDE) -> Tensor:
    """uint8 (4, 3, side, side)."""
    return torch.randint(
        0, 256, (4, 3, side, side), generator=torch.Generator().manual_seed(3), dtype=torch.uint8
    )


def make_model_input(wanted: ImageInputSpec, side: int = SIDE) -> Tensor:
    """The pictures as a model takes them."""
    x = wanted.to_model_input(make_pixels(side), torch.device("cpu"))
    assert isinstance(x, Tensor)
    return x.contiguous()


class PictureSource:
    """The four pictures as a source."""

    views: int | None = 1
    lengths: Tensor | None = None

    def __init__(self, side: int) -> None:
        self.side, self.digest = side, f"four pictures {side}"

    def __len__(self) -> int:
        return len(LABELS)

    def take(self, index: Tensor, view: int) -> Batch:
        return Batch(
            make_pixels(self.side)[index],
            {name: leaf[index] for name, leaf in make_targets(self.side).items()},
        )


class MinimalDetection(Task):
    """The loss as detectors state it; the score is the mean of the predictions' scores, so that it follows every weight."""

    metrics = ("mean",)
    output_description = "objects"

    def loss(self, net: nn.Module, batch: Batch) -> Tensor:
        total = sum(net(join_targets(batch.x, batch.y)).values())
        assert isinstance(total, Tensor)
        return total

    def predict(self, net: nn.Module, x: TensorTree) -> TensorTree:
        found: TensorTree = net(x)
        return found

    def score(self, pairs: Iterable[tuple[Any, Any]]) -> dict[str, float]:
        return {"mean": float(torch.cat([predicted["scores"] for predicted, _ in pairs]).mean())}

    def make_artifacts(self, pairs: Sequence[tuple[Any, Any]], data: Dataset) -> dict[str, bytes]:
        return {}

    def output_difference(self, expected: TensorTree, got: TensorTree) -> float:
        return 0.0

    def describe_predictions(
        self,
        function: Callable[[TensorTree], TensorTree],
        x: TensorTree,
        originals: Sequence[Any],
        wanted: InputSpec,
    ) -> list[Prediction]:
        return []


def make_context(
    staged: StagedModel, wanted: ImageInputSpec, depth: int, home: Path, mode: str, side: int = SIDE
) -> TrainingContext:
    """The pictures seen through the first `depth` stages; `mode` is the cache's."""
    where: DeviceContext = select_device(
        EngineSettings.model_validate({"device": "cpu", "cache": mode}), home
    )
    prefix, net = staged.split(depth)
    names = frozen_prefix.stage_digests(list(staged.stages.values()), "test")
    frozen = frozen_prefix.FrozenPrefix(list(prefix.children()), names[:depth], where.device)
    source: Source = activation_cache.source_behind(
        frozen, DeviceSource(PictureSource(side), wanted, where), where.cache_limits
    )
    return TrainingContext(
        MinimalDetection(),
        staged,
        net,
        pretrained_norms(net),
        None,  # type: ignore[arg-type]
        source,
        source,
        source,
        where,
        "mean",
    )


def train_two_epochs(context: TrainingContext, lr: float) -> list[tuple[float, float]]:
    """Loss and score of each of two epochs."""
    recipe = Recipe(lr=lr, epochs=2, batch_size=2)
    return [
        (progress.epoch.loss, progress.epoch.scores["mean"])
        for progress in fit(context, recipe, seed=1)
    ]


def randomize_weights(staged: StagedModel) -> StagedModel:
    """Numbers everywhere, so that there are objects to be found and no layer can be left out unseen."""
    generator = torch.Generator().manual_seed(0)
    for value in staged.model.state_dict().values():
        if value.dim() > 1:
            bound = math.sqrt(3 / value[0].numel())
            value.uniform_(-bound, bound, generator=generator)
        elif value.is_floating_point():
            value.uniform_(0.5, 1.5, generator=generator)
    return staged
