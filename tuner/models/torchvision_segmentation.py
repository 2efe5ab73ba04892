"""torchvision's FCN, DeepLabV3 and LRASPP.

Cut at the stem, the layers of the backbone, and the heads.

Long et al., Fully Convolutional Networks for Semantic Segmentation, CVPR 2015; Chen et al.,
Rethinking Atrous Convolution for Semantic Image Segmentation, 2017; Howard et al., Searching for
MobileNetV3, ICCV 2019.
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
# torchvision's references/segmentation/train.py: SGD, lr 0.01, momentum 0.9, weight decay 1e-4,
# batch 8, 30 epochs, lr falling to 0 as (1 - step / steps) ** 0.9, and ten times the rate for the
# auxiliary classifier
RECIPES = {
    "segmentation": {
        "optimizer": "sgd",
        "lr": 0.01,
        "auxiliary_lr": 10.0,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "batch_size": 8,
        "epochs": 30,
        "schedule": "polynomial",
    }
}
BACKBONES = ("resnet50", "resnet101", "mobilenet_v3_large")
# the convolutions whose outputs are the classes: those of a group add up to one output
CLASS_CONVOLUTION_GROUPS = (
    ("classifier.4",),
    ("aux_classifier.4",),
    ("classifier.low_classifier", "classifier.high_classifier"),
)
CLASS_CONVOLUTIONS = tuple(name for group in CLASS_CONVOLUTION_GROUPS for name in group)


def input_spec(name: str, *, weights: str = "default") -> ImageInputSpec:
    """520 pixels a side, with which torchvision's weights were trained.

    Images are letterboxed, so that every pixel of an image is on the canvas.
    """
    transforms = get_model_weights(name).DEFAULT.transforms()
    size = transforms.resize_size[0]
    mean, std = (tuple(float(v) for v in values) for values in (transforms.mean, transforms.std))
    return ImageInputSpec(size, size, "bilinear", mean, std, "letterbox")  # type: ignore[arg-type]


def build(
    home: Path,
    name: str,
    task: str,
    outputs: int,
    *,
    weights: Annotated[
        str,
        Field(
            description="default: the published weights; none: fresh parameters; or a path to a "
            ".safetensors or .pth file"
        ),
    ] = "default",
) -> StagedModel:
    """Model `name` with `outputs` classes.

    Depth 1 freezes the stem, each depth after it one layer of the backbone more.

    `weights`: default or a name of torchvision's; backbone or the name of a classifier's weights,
    for the backbone alone; none; or a path to weights of either kind. Where weights of a whole
    model have other classes, only the last convolutions are new. These are 1x1 convolutions over
    pretrained features, and begin as their linear probe. With the weights of a backbone alone the
    layers before them are new too, so there is nothing to probe.

    Raises:
        SpaceError: The name is unknown.
        DataError: The weights are missing or do not fit.
    """
    extra = {} if name.startswith("lraspp") else {"aux_loss": True}
    model = get_model(name, weights=None, weights_backbone=None, num_classes=outputs, **extra)
    new: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    if weights != "none":
        new, notes = _load_state(model, *_read_state(home, name, weights))
    groups = [group for group in CLASS_CONVOLUTION_GROUPS if set(group) <= set(new)]
    return StagedModel(
        model,
        _make_stages(model),
        notes,
        native_forward=_native_forward,
        can_probe=bool(groups),
        pixel_classifiers=tuple(
            tuple(model.get_submodule(name) for name in group) for group in groups
        ),
    )


def _native_forward(model: nn.Module, x: TensorTree) -> TensorTree:
    """The output in the form of the last stage: logits; in training also the auxiliary ones."""
    outputs: dict[str, Tensor] = model(x)
    return dict(outputs) if model.training else outputs["out"]


class SegmentationHeads(nn.Module):
    """Classifier and auxiliary classifier, with the upsampling to the size of the image.

    In eval mode the auxiliary classifier is not computed.
    """

    def __init__(
        self,
        classifier: nn.Module,
        auxiliary: nn.Module | None,
        input_names: tuple[str, ...],
        argument_names: tuple[str, ...] | None,
    ) -> None:
        """Make the stage.

        Args:
            classifier: The classifier.
            auxiliary: The auxiliary classifier, or None.
            input_names: The feature map of the classifier, and that of the auxiliary classifier.
            argument_names: None; or the classifier takes all feature maps of `input_names`, as a
                dict with these names.
        """
        super().__init__()
        self.classifier, self.auxiliary = classifier, auxiliary
        self.input_names, self.argument_names = input_names, argument_names

    def forward(self, x: dict[str, Tensor]) -> TensorTree:
        size = (x[HEIGHT_NAME].shape[1], x[WIDTH_NAME].shape[1])
        maps = [x[name] for name in self.input_names]
        if self.argument_names is None:
            logits = self.classifier(maps[0])
        else:
            logits = self.classifier(dict(zip(self.argument_names, maps, strict=True)))
        out = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        if not self.training:
            return out
        if self.auxiliary is None:
            return {"out": out}
        auxiliary_logits = self.auxiliary(maps[1])
        aux = F.interpolate(auxiliary_logits, size=size, mode="bilinear", align_corners=False)
        return {"out": out, "aux": aux}


def _make_stages(model: Any) -> dict[str, nn.Module]:
    """Groups of the backbone's modules, which end where a feature map is taken, and the heads."""
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
    input_name = ""
    for number, group in enumerate(groups):
        keeps_input = bool(input_name) and groups[number - 1][-1] in taps
        body = nn.Sequential(*(parts[name] for name in group))
        output_name = f"c{number + 1}"
        stages[f"layer{number}" if number else "stem"] = FeatureMapStage(
            body, input_name, output_name, keeps_input=keeps_input, writes_size=number == 0
        )
        input_name = output_name
    map_names = {
        taps[group[-1]]: f"c{number + 1}"
        for number, group in enumerate(groups)
        if group[-1] in taps
    }
    if "low" in map_names:
        stages["heads"] = SegmentationHeads(
            model.classifier, None, (map_names["low"], map_names["high"]), ("low", "high")
        )
    else:
        stages["heads"] = SegmentationHeads(
            model.classifier, model.aux_classifier, (map_names["out"], map_names["aux"]), None
        )
    return stages


def _read_state(home: Path, name: str, weights: str) -> tuple[StateDict, str]:
    """The weights that `weights` names, and the name that messages use for them."""
    if is_path(weights):
        return read_state_dict(Path(weights)), f"weights: {weights}"
    whole = get_model_weights(name)
    backbone = get_model_weights(next(b for b in BACKBONES if name.endswith(b)))
    # torchvision's segmenters begin with the first ImageNet weights: the second ones are too
    # strongly regularised for segmentation
    known = {
        "default": whole.DEFAULT,
        "backbone": backbone.IMAGENET1K_V1,
        **backbone.__members__,
        **whole.__members__,
    }
    if weights not in known:
        raise SpaceError(
            f"model.weights: {weights!r} is not known for "
            f"{name}{suggest_names(weights, [*known, 'none'])}; or give a path"
        )
    return read_state_dict(fetch_weights(home, known[weights].url)), f"weights: {known[weights]}"


def _load_state(
    model: Any, state: StateDict, source_name: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Load the weights of a whole segmenter, or those of a classifier into the backbone.

    Returns:
        The class convolutions that are new over loaded features; and what the user is told.
    """
    if not any(name.startswith("backbone.") for name in state):
        own = model.backbone.state_dict()
        renamed = {name.removeprefix("features."): value for name, value in state.items()}
        load_matching_state(
            model.backbone,
            {
                k: v
                for k, v in renamed.items()
                if k in own or not k.startswith(("fc.", "classifier."))
            },
            head="-",
            source_name=source_name,
        )
        return (), ("heads: new, the weights are the backbone's",)
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
    load_matching_state(model, kept | fresh, head="-", source_name=source_name)
    if not new:
        return (), ()
    return tuple(new), (f"{' and '.join(new)}: new, the weights have none for these classes",)
