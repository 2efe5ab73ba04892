"""The stages of timm's models: what the cutter must know of the library."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tuner.core.types import split_sequential
from tuner.models._cutter import cut_model, eval_mode
from tuner.models._forward_pass import TRACE_ERRORS, UncutModel
from tuner.models._timm import import_timm

SMALL_SIDE = 64  # pixels of the example for models that take any size
DEFAULT_SIDE = 224


def stages_of(
    model: nn.Module, config: dict[str, Any], side: int
) -> tuple[dict[str, nn.Module], str | None]:
    """The stages of one of timm's models.

    A model whose forward pass cannot be cut is split between features and head by timm's own
    methods, or stays whole.

    Args:
        model: The model.
        config: timm's configuration of it.
        side: Of an image that the model takes, in pixels.

    Returns:
        The stages by name, and None; or the reason in words why there are no more of them.
    """
    best: tuple[dict[str, nn.Module], str | None] = {}, None
    for example_side, sized in example_sides(config, side):
        try:
            stages, reason = cut_model(
                model,
                random_image(model, example_side),
                heads=classifier_names(config),
                opaque_functions=import_timm().layers.get_notrace_functions(),
                sized=sized,
            )
        except UncutModel as error:
            stages, reason = {}, str(error)
        if reason is None:
            return stages, None
        if len(stages) > len(best[0]) or best[1] is None:
            best = stages, reason
    if best[0]:
        return best
    return split_features_and_head(model, random_image(model, side)), best[1]


def example_sides(config: dict[str, Any], side: int) -> list[tuple[int, bool]]:
    """The sides of images to try the model with, in pixels, in this order; and whether the stages
    may take images of this side alone.
    """
    small = [] if config.get("fixed_input_size") else [(SMALL_SIDE, False)]
    return [*small, (side, False), (side, True)]


def classifier_names(config: dict[str, Any]) -> tuple[str, ...]:
    """The paths of a model's classifiers. Distilled models have two."""
    names = config.get("classifier") or "head"
    return (names,) if isinstance(names, str) else tuple(names)


def random_image(model: nn.Module, side: int) -> Tensor:
    """One image of random numbers, (1, 3, side, side), on the device of the model."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, side, side, generator=generator, device="cpu")
    return image.to(next(model.parameters()).device)


class MethodStage(nn.Module):
    """One method of a model as a module that holds the model's own children, and no others."""

    def __init__(self, model: nn.Module, method: str, children: list[str], *, loose: bool) -> None:
        """`loose`: the parameters and buffers that are in no child belong to the stage too."""
        super().__init__()
        self.model_holder = (model,)  # in a tuple, so that the whole model does not become a child
        self.method = method
        for name in children:
            self.add_module(name, getattr(model, name))
        if loose:
            for name, parameter in model.named_parameters(recurse=False):
                self.register_parameter(name, parameter)
            for name, buffer in model.named_buffers(recurse=False):
                self.register_buffer(name, buffer)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = getattr(self.model_holder[0], self.method)(x)
        return y


@torch.no_grad()
def split_features_and_head(model: nn.Module, image: Tensor) -> dict[str, nn.Module]:
    """Features and head by timm's own methods; one stage where the model has none.

    The head's children are those that only the method `forward_head` calls.
    """
    called: set[str] = set()
    hooks = [
        child.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, child in _named_inner_modules(model)
    ]
    try:
        with eval_mode(model):
            y = model.forward_features(image)  # type: ignore[operator]
            called_by_features = set(called)
            called.clear()
            model.forward_head(y)  # type: ignore[operator]
    except TRACE_ERRORS:
        return dict(split_sequential(model).stages)
    finally:
        for hook in hooks:
            hook.remove()
    children = [name for name, _ in model.named_children()]
    head = [name for name in children if name in called - called_by_features]
    if not isinstance(y, Tensor) or not any(
        True for name in head for _ in getattr(model, name).parameters()
    ):
        return dict(split_sequential(model).stages)
    features = [name for name in children if name not in head]
    return {
        "features": MethodStage(model, "forward_features", features, loose=True),
        "head": MethodStage(model, "forward_head", head, loose=False),
    }


def _named_inner_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module inside, with the name of the model's child that contains it."""
    for name, child in model.named_children():
        for module in child.modules():
            yield name, module
