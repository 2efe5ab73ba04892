"""Where models of segmentation_models_pytorch (smp) can be cut: encoder stages, decoder, head.

smp's encoders have no common structure. So an encoder is cut by its shape, which is recognised by
the names of its children, and the cut is then checked by running it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tuner.core.input_spec import TensorTree
from tuner.models._feature_maps import FeatureMapStage
from tuner.models._forward_pass import UncutModel

EXAMPLE_SIDE = 64  # pixels of the random image by which a cut is checked
ALL_MAPS = 5  # of a whole encoder: f1 has half the side of the image, f5 is the deepest


@dataclass(frozen=True)
class Group:
    """Consecutive modules of an encoder, which become one stage."""

    name: str  # of the stage
    modules: list[nn.Module]
    gives_feature_map: bool  # their output is one of the encoder's feature maps


class DecoderStage(nn.Module):
    """A decoder that takes feature maps by name, the shallowest first.

    The decoder asks the larger maps before them for their size alone.
    """

    def __init__(
        self, decoder: nn.Module, taps: tuple[str, ...], size_factors: tuple[int, ...]
    ) -> None:
        """Make the stage.

        Args:
            decoder: smp's decoder.
            taps: The names of the feature maps that it takes.
            size_factors: How many times larger than the first tap each map before it is: the image
                itself, and a map of half its size where the encoder gives none.
        """
        super().__init__()
        self.decoder, self.taps, self.size_factors = decoder, taps, size_factors

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        maps = [x[name] for name in self.taps]
        n, _, height, width = maps[0].shape
        without_channels = [
            maps[0].new_empty((n, 0, height * factor, width * factor))
            for factor in self.size_factors
        ]
        features: Tensor = self.decoder([*without_channels, *maps])
        return features


class WholeEncoderStage(nn.Module):
    """An encoder that is not cut."""

    def __init__(self, encoder: nn.Module, taps: tuple[str, ...]) -> None:
        super().__init__()
        self.encoder, self.taps = encoder, taps

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.taps, self.encoder(x)[-len(self.taps) :], strict=True))


class ContiguousOutput(nn.Module):
    """Writes a feature map row by row in memory, as SegFormer's encoder does with its own.

    The next convolution may otherwise compute with another kernel, which rounds differently.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.contiguous()


def stages_of(
    model: Any, used_maps: int, *, takes_sizes: bool
) -> tuple[dict[str, nn.Module], str | None]:
    """The stages of one of smp's models: encoder stages, decoder, head.

    Args:
        model: The model of smp.
        used_maps: How many feature maps the decoder uses, counted from the deepest.
        takes_sizes: Whether the decoder asks the larger maps for their sizes, or counts them.

    Returns:
        The stages by name, and None; or the reason in words why the encoder is one stage.
    """
    encoder = model.encoder
    deepest = len(encoder.out_channels) - 1  # PSPNet's encoders end at an eighth of the image
    # encoders that begin at a quarter of the image state 0 channels for the half
    map_count = sum(1 for channels in encoder.out_channels[1:] if channels)
    first = deepest + 1 - min(used_maps, map_count)
    taps = tuple(f"f{number}" for number in range(first, deepest + 1))
    size_factors = tuple(2**number for number in range(first, 0, -1)) if takes_sizes else ()
    reason = None
    try:
        encoder_stages = _split_encoder(encoder, deepest, map_count, taps)
    except UncutModel as error:
        encoder_stages, reason = {"encoder": WholeEncoderStage(encoder, taps)}, str(error)
    return {
        **encoder_stages,
        "decoder": DecoderStage(model.decoder, taps, size_factors),
        "head": nn.Sequential(model.segmentation_head),
    }, reason


def _split_encoder(
    encoder: Any, deepest: int, map_count: int, taps: tuple[str, ...]
) -> dict[str, nn.Module]:
    """The encoder's stages.

    Modules behind the deepest feature map are never called, and their weights belong to the first
    stage: so they are frozen first.

    Raises:
        UncutModel: Its shape is not known here, or it does more than its modules in a row.
    """
    groups = _group_modules(encoder, map_count)
    ends = [end for end, group in enumerate(groups, 1) if group.gives_feature_map]
    if len(ends) < map_count:
        raise UncutModel("the encoder takes feature maps from inside its blocks")
    used, unused = groups[: ends[map_count - 1]], groups[ends[map_count - 1] :]
    stages: dict[str, nn.Module] = {}
    input_name, map_number = "", deepest - map_count
    for group in used:
        map_number += group.gives_feature_map
        output_name = f"f{map_number}" if group.gives_feature_map else group.name
        stages[group.name] = FeatureMapStage(
            nn.Sequential(*group.modules), input_name, output_name, keeps_input=input_name in taps
        )
        input_name = output_name
    if unused:
        never_called = nn.ModuleList(module for group in unused for module in group.modules)
        stages[used[0].name].add_module("never_called", never_called)
    if not _stages_agree(encoder, stages, taps):
        raise UncutModel("the modules of the encoder in a row do not compute what it computes")
    return stages


# -- shapes of encoders


def _group_modules(encoder: Any, map_count: int) -> list[Group]:
    """The groups of the first shape that the encoder has.

    Raises:
        UncutModel: It has none of them.
    """
    if getattr(encoder, "_is_channel_last", False):
        raise UncutModel("the encoder computes channels-last and turns its feature maps at its end")
    for group_by_shape in SHAPES:
        groups = group_by_shape(encoder, map_count)
        if groups is not None:
            return groups
    raise UncutModel("the structure of the encoder is none of those that are known here")


def _inner_model(encoder: Any) -> Any:
    """timm's model inside smp's encoder; the encoder itself where it is smp's own."""
    return getattr(encoder, "model", encoder)


def _children(encoder: Any) -> dict[str, nn.Module]:
    return dict(_inner_model(encoder).named_children())


def _group_senet(encoder: Any, map_count: int) -> list[Group] | None:
    """SENet and its relatives: layer0 with the pooling beside it, then layer1 to layer4."""
    children = _children(encoder)
    if "layer0" not in children:
        return None
    return _group_layers(children, ["layer0"], "layer0_pool")


def _group_resnet(encoder: Any, map_count: int) -> list[Group] | None:
    """smp's own ResNets: convolution, norm, activation and pooling, then layer1 to layer4."""
    children = _children(encoder)
    if _inner_model(encoder) is not encoder or not {"conv1", "layer1"} <= children.keys():
        return None
    activation = "relu" if "relu" in children else "act1"
    return _group_layers(children, ["conv1", "bn1", activation], "maxpool")


def _group_numbered_stages(encoder: Any, map_count: int) -> list[Group] | None:
    """stage0 to stage4."""
    children = _children(encoder)
    if "stage0" not in children:
        return None
    return _group_by_names(children, {f"stage{i}": [f"stage{i}"] for i in range(5)})


def _group_mix_transformer(encoder: Any, map_count: int) -> list[Group] | None:
    """SegFormer's MiT: four times an embedding of patches, blocks and a norm."""
    children = _children(encoder)
    if "patch_embed1" not in children:
        return None
    parts = ("patch_embed", "block", "norm")
    groups = _group_by_names(
        children, {f"stage{i}": [f"{part}{i}" for part in parts] for i in (1, 2, 3, 4)}
    )
    return groups and [
        replace(group, modules=[*group.modules, ContiguousOutput()]) for group in groups
    ]


def _group_timm_blocks(encoder: Any, map_count: int) -> list[Group] | None:
    """timm's EfficientNets and MobileNets: a stem, then blocks, some of which are tapped."""
    children, inner = _children(encoder), _inner_model(encoder)
    if not {"conv_stem", "blocks"} <= children.keys():
        return None
    if getattr(inner, "feature_hooks", 0) is not None:  # then the maps come from inside a block
        return None
    tapped = inner._stage_out_idx
    stem = [children[name] for name in ("conv_stem", "bn1", "act1") if name in children]
    blocks = enumerate(children["blocks"].children())
    return [
        Group("stem", stem, 0 in tapped),
        *(Group(f"blocks{i}", [block], i + 1 in tapped) for i, block in blocks),
    ]


def _group_features(encoder: Any, map_count: int) -> list[Group] | None:
    """smp's VGGs and MobileNets: one row of modules, `features`, tapped at stated indices."""
    children, ends = _children(encoder), list(getattr(encoder, "_out_indexes", None) or [])
    if "features" not in children or not ends:
        return None
    ends = ends[: len(ends) - (ALL_MAPS - encoder._depth)]
    return _group_by_ends(list(children["features"].children()), ends, map_count)


def _group_returned_layers(encoder: Any, map_count: int) -> list[Group] | None:
    """timm's models taken apart for their features: a row of modules, some of them returned."""
    children = _children(encoder)
    returned = getattr(_inner_model(encoder), "return_layers", None)
    if not returned:
        return None
    names = list(children)
    return _group_by_ends(
        list(children.values()), [names.index(name) for name in returned], map_count
    )


SHAPES: Sequence[Callable[[Any, int], list[Group] | None]] = (
    _group_senet,
    _group_resnet,
    _group_numbered_stages,
    _group_mix_transformer,
    _group_timm_blocks,
    _group_features,
    _group_returned_layers,
)
"""Each takes smp's encoder and the number of its feature maps.

Each returns the encoder's groups, or None for an encoder of another shape.
"""


def _group_layers(children: dict[str, nn.Module], stem: list[str], pool: str) -> list[Group] | None:
    """A stem, then layer1 with the pooling before it, then layer2 to layer4."""
    layers = {f"layer{i}": [f"layer{i}"] for i in (2, 3, 4)}
    return _group_by_names(children, {"stem": stem, "layer1": [pool, "layer1"], **layers})


def _group_by_names(
    children: dict[str, nn.Module], names: dict[str, list[str]]
) -> list[Group] | None:
    """Groups by the `names` of their children; None where a child is missing."""
    if any(name not in children for group_names in names.values() for name in group_names):
        return None
    return [
        Group(group, [children[name] for name in group_names], True)
        for group, group_names in names.items()
    ]


def _group_by_ends(modules: list[nn.Module], ends: list[int], map_count: int) -> list[Group]:
    """Groups of consecutive modules, each of which ends where a feature map is taken.

    Where there are more ends than feature maps, the first maps are as large as the image and the
    decoder does not use them.
    """
    skipped = len(ends) - map_count
    begins = [0, *(end + 1 for end in ends[:-1])]
    groups = [
        Group(f"stage{i}" if i else "stem", modules[begin : end + 1], i >= skipped)
        for i, (begin, end) in enumerate(zip(begins, ends, strict=True))
    ]
    unused_modules = modules[ends[-1] + 1 :]
    return [*groups, Group("rest", unused_modules, False)] if unused_modules else groups


# -- the check of a cut


@torch.no_grad()
def _stages_agree(encoder: Any, stages: dict[str, nn.Module], taps: tuple[str, ...]) -> bool:
    """Whether the stages in a row give the encoder's own feature maps and hold all its weights."""
    encoder_tensors = sorted(id(v) for v in encoder.state_dict(keep_vars=True).values())
    stage_tensors = sorted(
        id(v) for stage in stages.values() for v in stage.state_dict(keep_vars=True).values()
    )
    if encoder_tensors != stage_tensors:
        return False
    image = torch.rand(
        (1, 3, EXAMPLE_SIDE, EXAMPLE_SIDE),
        generator=torch.Generator().manual_seed(0),
        device="cpu",
    ).to(next(encoder.parameters()).device)
    encoder.eval()
    try:
        x: TensorTree = image
        for stage in stages.values():
            x = stage(x)
        expected_maps = encoder(image)[-len(taps) :]
    except (RuntimeError, ValueError, TypeError, AssertionError):
        return False
    finally:
        encoder.train()
    assert isinstance(x, dict)
    return all(
        x[name].shape == value.shape and (value.is_meta or torch.equal(x[name], value))
        for name, value in zip(taps, expected_maps, strict=True)
    )
