"""What the tests of detectors share: pictures with known objects, the least of a task, and a training over them."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tuner.config.run import Engine, Recipe
from tuner.core.detectors import NO_OBJECT, with_targets
from tuner.core.input_spec import Preprocess, Tree, Wanted
from tuner.core.types import Batch, Data, Source, Staged, Task, Told
from tuner.training import activation_cache
from tuner.training.building import Ready
from tuner.training.devices import Place, place
from tuner.training.training_loop import Bench, fit

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


def truth(side: int = SIDE) -> dict[str, Tensor]:
    return {"boxes": BOXES * side / SIDE, "labels": LABELS}


def pixels(side: int = SIDE) -> Tensor:
    """uint8 (4, 3, side, side)."""
    return torch.randint(
        0, 256, (4, 3, side, side), generator=torch.Generator().manual_seed(3), dtype=torch.uint8
    )


def ready(wanted: Preprocess, side: int = SIDE) -> Tensor:
    """The pictures as a model takes them."""
    x = wanted.ready(pixels(side), torch.device("cpu"))
    assert isinstance(x, Tensor)
    return x.contiguous()


class Pictures:
    """The four pictures as a source."""

    views: int | None = 1
    lengths: Tensor | None = None

    def __init__(self, side: int) -> None:
        self.side, self.digest = side, f"four pictures {side}"

    def __len__(self) -> int:
        return len(LABELS)

    def take(self, index: Tensor, view: int) -> Batch:
        return Batch(
            pixels(self.side)[index], {name: leaf[index] for name, leaf in truth(self.side).items()}
        )


class Detecting(Task):
    """The loss as detectors state it; the score is the mean of the predictions' scores, so that it follows every weight."""

    metrics = ("mean",)
    output = "objects"

    def loss(self, net: nn.Module, batch: Batch) -> Tensor:
        total = sum(net(with_targets(batch.x, batch.y)).values())
        assert isinstance(total, Tensor)
        return total

    def predict(self, net: nn.Module, x: Tree) -> Tree:
        found: Tree = net(x)
        return found

    def score(self, pairs: Iterable[tuple[Any, Any]]) -> dict[str, float]:
        return {"mean": float(torch.cat([predicted["scores"] for predicted, _ in pairs]).mean())}

    def show(self, pairs: Sequence[tuple[Any, Any]], data: Data) -> dict[str, bytes]:
        return {}

    def difference(self, expected: Tree, got: Tree) -> float:
        return 0.0

    def tell(
        self, function: Callable[[Tree], Tree], x: Tree, originals: Sequence[Any], wanted: Wanted
    ) -> list[Told]:
        return []


def bench(
    staged: Staged, wanted: Preprocess, depth: int, home: Path, mode: str, side: int = SIDE
) -> Bench:
    """The pictures seen through the first `depth` stages; `mode` is the cache's."""
    where: Place = place(Engine.model_validate({"device": "cpu", "cache": mode}), home)
    prefix, net = staged.split(depth)
    names = activation_cache.names_of(list(staged.stages.values()), "test")
    frozen = activation_cache.Prefix(list(prefix.children()), names[:depth], where.device)
    source: Source = activation_cache.through(
        frozen, Ready(Pictures(side), wanted, where), where.limits
    )
    return Bench(Detecting(), staged, net, None, source, source, source, where, "mean")  # type: ignore[arg-type]


def trained(b: Bench, lr: float) -> list[tuple[float, float]]:
    """Loss and score of each of two epochs."""
    recipe = Recipe(lr=lr, epochs=2, batch_size=2)
    return [(epoch.loss, epoch.scores["mean"]) for epoch in fit(b, recipe, seed=1)]


def lively(staged: Staged) -> Staged:
    """Numbers everywhere, so that there are objects to be found and no layer can be left out unseen."""
    generator = torch.Generator().manual_seed(0)
    for value in staged.model.state_dict().values():
        if value.dim() > 1:
            bound = math.sqrt(3 / value[0].numel())
            value.uniform_(-bound, bound, generator=generator)
        elif value.is_floating_point():
            value.uniform_(0.5, 1.5, generator=generator)
    return staged
