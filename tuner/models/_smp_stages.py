"""Where models of segmentation_models_pytorch can be cut: their encoders by shape, checked by running them; decoder; head."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tuner.core.input_spec import TensorTree
from tuner.models._feature_maps import FeatureMapStage

EXAMPLE_SIDE = 64  # pixels of the example that tells whether a cut is one

EncoderGroup = tuple[str, list[nn.Module], bool]
"""A stage of an encoder: its name, its modules in a row, and whether what they give is one of the encoder's feature maps."""


class DecoderStage(nn.Module):
    """A decoder that takes feature maps by name, shallowest first. Of the larger ones before them it asks the size alone."""

    def __init__(self, decoder: nn.Module, taps: tuple[str, ...], larger: tuple[int, ...]) -> None:
        """`larger`: how many times the size of the first tap the maps before it have: the image, and what stands in for others."""
        super().__init__()
        self.decoder, self.taps, self.size_factors = decoder, taps, larger

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        maps = [x[name] for name in self.taps]
        n, _, height, width = maps[0].shape
        found: Tensor = self.decoder(
            [
                *(maps[0].new_empty((n, 0, height * by, width * by)) for by in self.size_factors),
                *maps,
            ]
        )
        return found


class WholeEncoderStage(nn.Module):
    """An encoder that is not cut."""

    def __init__(self, encoder: nn.Module, taps: tuple[str, ...]) -> None:
        super().__init__()
        self.encoder, self.taps = encoder, taps

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.taps, self.encoder(x)[-len(self.taps) :], strict=True))


def stages_of(model: Any, only: int) -> dict[str, nn.Module]:
    """Encoder stages, decoder, head. `only`: the feature maps that the decoder uses, counted from the deepest."""
    encoder = model.encoder
    real = [
        channels for channels in encoder.out_channels[1:] if channels
    ]  # encoders that begin at a quarter say 0 for the half
    taps = tuple(f"f{number}" for number in range(6 - min(only, len(real)), 6))
    larger = {4: (4, 2), 5: (2,)}[len(real)] if only == 5 else ()
    found = _split_encoder(encoder, len(real), taps) or {
        "encoder": WholeEncoderStage(encoder, taps)
    }
    return {
        **found,
        "decoder": DecoderStage(model.decoder, taps, larger),
        "head": nn.Sequential(model.segmentation_head),
    }


def _split_encoder(encoder: Any, real: int, taps: tuple[str, ...]) -> dict[str, nn.Module] | None:
    """The encoder's stages; None where it has no shape that is known here, or does more than its modules tell."""
    groups = _group_modules(encoder, real)
    if groups is None or sum(tapped for *_, tapped in groups) != real or not groups[-1][-1]:
        return None
    stages: dict[str, nn.Module] = {}
    before, number = "", 5 - real
    for name, modules, tapped in groups:
        number += tapped
        leaf = f"f{number}" if tapped else name
        stages[name] = FeatureMapStage(nn.Sequential(*modules), before, leaf, keeps=before in taps)
        before = leaf
    return stages if _stages_agree(encoder, stages, taps) else None


def _group_modules(encoder: Any, real: int) -> list[EncoderGroup] | None:
    inner = getattr(encoder, "model", encoder)
    parts = dict(inner.named_children())
    if getattr(encoder, "_is_channel_last", False):
        return None
    if "layer0" in parts or ("layer1" in parts and "conv1" in parts and inner is encoder):
        stem = (
            ["layer0"]
            if "layer0" in parts
            else ["conv1", "bn1", "relu" if "relu" in parts else "act1"]
        )
        pool = "layer0_pool" if "layer0" in parts else "maxpool"
        return _group_by_names(
            parts,
            [
                ("stem", stem),
                ("layer1", [pool, "layer1"]),
                *((f"layer{i}", [f"layer{i}"]) for i in (2, 3, 4)),
            ],
        )
    if "stage0" in parts:
        return _group_by_names(parts, [(f"stage{i}", [f"stage{i}"]) for i in range(5)])
    if "conv_stem" in parts and "blocks" in parts and getattr(inner, "feature_hooks", 0) is None:
        tapped = inner._stage_out_idx
        stem = [parts[name] for name in ("conv_stem", "bn1", "act1") if name in parts]
        return [
            ("stem", stem, 0 in tapped),
            *(
                (f"blocks{i}", [block], i + 1 in tapped)
                for i, block in enumerate(parts["blocks"].children())
            ),
        ]
    if "features" in parts and getattr(encoder, "_out_indexes", None):
        ends = list(encoder._out_indexes)
        return _group_by_ends(list(parts["features"].children()), ends, skipped=len(ends) - real)
    returned = getattr(inner, "return_layers", None)
    return (
        _group_by_ends(
            list(parts.values()),
            [list(parts).index(name) for name in returned],
            len(returned) - real,
        )
        if returned
        else None
    )


def _group_by_names(
    parts: dict[str, nn.Module], stages: Iterable[tuple[str, list[str]]]
) -> list[EncoderGroup] | None:
    stages = list(stages)
    if not {name for _, names in stages for name in names} <= parts.keys():
        return None
    return [(name, [parts[inner] for inner in names], True) for name, names in stages]


def _group_by_ends(modules: list[nn.Module], ends: list[int], skipped: int) -> list[EncoderGroup]:
    """Modules in a row, in groups that end where a feature map is taken; the first `skipped` are as large as the image and not used."""
    begins = [0, *(end + 1 for end in ends[:-1])]
    groups = [
        (f"stage{i}" if i else "stem", modules[begin : end + 1], i >= skipped)
        for i, (begin, end) in enumerate(zip(begins, ends, strict=True))
    ]
    return (
        [*groups, ("rest", modules[ends[-1] + 1 :], False)]
        if ends[-1] + 1 < len(modules)
        else groups
    )


@torch.no_grad()
def _stages_agree(encoder: Any, stages: dict[str, nn.Module], taps: tuple[str, ...]) -> bool:
    """Whether the stages in a row give the encoder's own feature maps, and hold all that it holds."""
    own = sorted(id(value) for value in encoder.state_dict(keep_vars=True).values())
    if own != sorted(
        id(value)
        for stage in stages.values()
        for value in stage.state_dict(keep_vars=True).values()
    ):
        return False
    device = next(encoder.parameters()).device
    image = torch.rand(
        1, 3, EXAMPLE_SIDE, EXAMPLE_SIDE, generator=torch.Generator().manual_seed(0), device="cpu"
    ).to(device)
    encoder.eval()
    try:
        x: TensorTree = image
        for stage in stages.values():
            x = stage(x)
        expected = encoder(image)[-len(taps) :]
    except (RuntimeError, ValueError, TypeError, AssertionError):
        return False
    finally:
        encoder.train()
    assert isinstance(x, dict)
    return all(
        x[name].shape == value.shape and (value.is_meta or torch.equal(x[name], value))
        for name, value in zip(taps, expected, strict=True)
    )
