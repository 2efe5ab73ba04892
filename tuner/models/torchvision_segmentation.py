"""torchvision's FCN, DeepLabV3 and LRASPP, cut at the stem, the layers of the backbone, and the heads.

Long et al., Fully Convolutional Networks for Semantic Segmentation, CVPR 2015; Chen et al., Rethinking Atrous Convolution for Semantic
Image Segmentation, 2017; Howard et al., Searching for MobileNetV3, ICCV 2019.
"""

from pathlib import Path
from typing import Annotated, Any

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights

from tuner.core.input_spec import ImageInputSpec, TensorTree
from tuner.core.types import StagedModel
from tuner.core.weights import (
    StateDict,
    fetch_weights,
    is_path,
    load_matching_state,
    read_state_dict,
)
from tuner.errors import SpaceError, suggest_names
from tuner.models._feature_maps import HEIGHT_NAME, WIDTH_NAME, FeatureMapStage

TASKS = ("segmentation",)
NAMES = (
    "fcn_resnet50",
    "fcn_resnet101",
    "deeplabv3_resnet50",
    "deeplabv3_resnet101",
    "deeplabv3_mobilenet_v3_large",
    "lraspp_mobilenet_v3_large",
)
# torchvision's references/segmentation/train.py: SGD, lr 0.01, momentum 0.9, weight decay 1e-4, batch 8, 30 epochs, lr falling to 0 as
# (1 - step / steps) ** 0.9, to which linear is next
RECIPES = {
    "segmentation": {
        "optimizer": "sgd",
        "lr": 0.01,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "batch_size": 8,
        "epochs": 30,
        "schedule": "linear",
    }
}
BACKBONES = ("resnet50", "resnet101", "mobilenet_v3_large")
CLASS_CONVOLUTIONS = (
    "classifier.4",
    "aux_classifier.4",
    "classifier.low_classifier",
    "classifier.high_classifier",
)  # convolutions to the classes


def input_spec(name: str, *, weights: str = "default") -> ImageInputSpec:
    """520 pixels as torchvision's weights were trained with, letterboxed so that every pixel of an image is on the canvas."""
    t = get_model_weights(name).DEFAULT.transforms()
    mean, std = (tuple(float(v) for v in values) for values in (t.mean, t.std))
    return ImageInputSpec(t.resize_size[0], t.resize_size[0], "bilinear", mean, std, "letterbox")  # type: ignore[arg-type]


def build(
    home: Path,
    name: str,
    task: str,
    outputs: int,
    *,
    weights: Annotated[
        str,
        Field(
            description="default: the published weights; none: fresh parameters; or a path to a .safetensors or .pth file"
        ),
    ] = "default",
) -> StagedModel:
    """Model `name` with `outputs` classes: depth 1 freezes the stem, then one layer of the backbone more each.

    `weights`: default or a name of torchvision's, of which other classes than theirs renew the last convolutions alone; backbone, or a
    name of its classifier's, for the backbone alone; none; or a path to either kind. Raises SpaceError on an unknown name, DataError on
    weights that are missing or do not fit.
    """
    extra = {} if name.startswith("lraspp") else {"aux_loss": True}
    model = get_model(name, weights=None, weights_backbone=None, num_classes=outputs, **extra)
    notes = () if weights == "none" else _load_state(model, *_read_state(home, name, weights))
    return StagedModel(
        model, _make_stages(model), notes, native_forward=_native_forward, can_probe=False
    )


def _native_forward(model: nn.Module, x: TensorTree) -> TensorTree:
    """As the last stage gives it: logits, and while training also the auxiliary head's."""
    outputs: dict[str, Tensor] = model(x)
    return dict(outputs) if model.training else outputs["out"]


class SegmentationHeads(nn.Module):
    """Classifier and auxiliary classifier with the upsampling to the input's size. In eval mode the auxiliary one is not computed."""

    def __init__(
        self,
        classifier: nn.Module,
        auxiliary: nn.Module | None,
        reads: tuple[str, ...],
        named: tuple[str, ...] | None,
    ) -> None:
        """`reads`: the leaves that the two take; `named`: the classifier takes all of them, as a dict under these names."""
        super().__init__()
        self.classifier, self.auxiliary, self.reads, self.named = (
            classifier,
            auxiliary,
            reads,
            named,
        )

    def forward(self, x: dict[str, Tensor]) -> TensorTree:
        size = (x[HEIGHT_NAME].shape[1], x[WIDTH_NAME].shape[1])
        given = (
            x[self.reads[0]]
            if self.named is None
            else {name: x[leaf] for name, leaf in zip(self.named, self.reads, strict=True)}
        )
        out = F.interpolate(self.classifier(given), size=size, mode="bilinear", align_corners=False)
        if not self.training:
            return out
        if self.auxiliary is None:
            return {"out": out}
        return {
            "out": out,
            "aux": F.interpolate(
                self.auxiliary(x[self.reads[1]]), size=size, mode="bilinear", align_corners=False
            ),
        }


def _make_stages(model: Any) -> dict[str, nn.Module]:
    """The backbone's modules in groups that end where something is tapped."""
    parts = dict(model.backbone.named_children())
    taps: dict[str, str] = model.backbone.return_layers  # module -> out, aux, low, high
    if "layer1" in parts:
        groups = [["conv1", "bn1", "relu", "maxpool"], *([f"layer{i}"] for i in (1, 2, 3, 4))]
    else:
        ends = [
            0,
            *(i for i, block in enumerate(parts.values()) if getattr(block, "_is_cn", False)),
            len(parts) - 1,
        ]
        groups = [
            [str(i) for i in range(begin + 1, end + 1)]
            for begin, end in zip([-1, *ends[:-1]], ends, strict=True)
        ]
    stages: dict[str, nn.Module] = {}
    before = ""
    for number, group in enumerate(groups):
        keeps = bool(before) and groups[number - 1][-1] in taps
        body = nn.Sequential(*(parts[name] for name in group))
        leaf = f"c{number + 1}"
        stages[f"layer{number}" if number else "stem"] = FeatureMapStage(
            body, before, leaf, keeps=keeps, sizes=not number
        )
        before = leaf
    leaf_of = {
        taps[group[-1]]: f"c{number + 1}"
        for number, group in enumerate(groups)
        if group[-1] in taps
    }
    if "low" in leaf_of:
        stages["heads"] = SegmentationHeads(
            model.classifier, None, (leaf_of["low"], leaf_of["high"]), ("low", "high")
        )
    else:
        stages["heads"] = SegmentationHeads(
            model.classifier, model.aux_classifier, (leaf_of["out"], leaf_of["aux"]), None
        )
    return stages


def _read_state(home: Path, name: str, weights: str) -> tuple[StateDict, str]:
    """The weights that are meant, and how a message calls them."""
    if is_path(weights):
        return read_state_dict(Path(weights)), f"weights: {weights}"
    whole, backbone = (
        get_model_weights(name),
        get_model_weights(next(b for b in BACKBONES if name.endswith(b))),
    )
    # torchvision's segmenters begin with the first ImageNet weights: the second ones are too strongly regularised for it
    known = {
        "default": whole.DEFAULT,
        "backbone": backbone.IMAGENET1K_V1,
        **backbone.__members__,
        **whole.__members__,
    }
    if weights not in known:
        raise SpaceError(
            f"model.weights: {weights!r} is not known for {name}{suggest_names(weights, [*known, 'none'])}; or give a path"
        )
    return read_state_dict(fetch_weights(home, known[weights].url)), f"weights: {known[weights]}"


def _load_state(model: Any, state: StateDict, where: str) -> tuple[str, ...]:
    """Loads a whole segmenter's weights, or a classifier's into the backbone."""
    if not any(name.startswith("backbone.") for name in state):
        own = model.backbone.state_dict()
        bare = {name.removeprefix("features."): value for name, value in state.items()}
        load_matching_state(
            model.backbone,
            {k: v for k, v in bare.items() if k in own or not k.startswith(("fc.", "classifier."))},
            head="-",
            source_name=where,
        )
        return ("heads: new, the weights are the backbone's",)
    own = model.state_dict()
    state = {k: v for k, v in state.items() if k in own or not k.startswith("aux_classifier.")}
    new = [
        head
        for head in CLASS_CONVOLUTIONS
        if any(
            k.startswith(f"{head}.") and (k not in state or state[k].shape != v.shape)
            for k, v in own.items()
        )
    ]
    kept = {k: v for k, v in state.items() if not k.startswith(tuple(f"{head}." for head in new))}
    fresh = {k: v for k, v in own.items() if k.startswith(tuple(f"{head}." for head in new))}
    load_matching_state(model, kept | fresh, head="-", source_name=where)
    return (f"{' and '.join(new)}: new, the weights have none for these classes",) if new else ()
