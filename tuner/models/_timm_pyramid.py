"""torchvision's detectors over the feature maps of timm's convolutional classifiers."""

from pathlib import Path
from typing import Any

from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from tuner.core.input_spec import ImageInputSpec
from tuner.core.weights import is_path, load_matching_state, read_state_dict
from tuner.errors import SpaceError
from tuner.models._timm import convert_state, download_timm_weights, import_timm, timm_config
from tuner.models._timm_stages import classifier_names
from tuner.models._torchvision_weights import NOT_LOADED, freeze_batch_norm, letterbox_spec

DEFAULT_SIDE = 512  # of the canvas, in pixels
PYRAMID_CHANNELS = 256
NORM_GROUPS = 32  # as in the paper of GroupNorm


def backbone_spec(name: str) -> ImageInputSpec:
    """The normalisation that timm states for the backbone's weights."""
    timm = import_timm()
    data_config = timm.data.resolve_data_config(pretrained_cfg=timm_config(timm, name), model=None)
    mean, std = (tuple(float(v) for v in data_config[key]) for key in ("mean", "std"))
    return letterbox_spec(DEFAULT_SIDE, mean, std)  # type: ignore[arg-type]


def build_body(home: Path, name: str, weights: str, backbone: str, strides: list[int]) -> Any:
    """timm's classifier with its weights, as a row of layers with feature maps of these strides.

    `weights` are those of the whole detector, which come later.

    Raises:
        SpaceError: timm does not have the name or the weights, or its features are no pyramid.
        DataError: The weights are missing or do not fit.
    """
    timm = import_timm()
    config = timm_config(timm, name)
    if weights not in NOT_LOADED and not is_path(weights):
        raise SpaceError(
            f"model.weights: {weights!r}: {name} as a whole has none; write none, or a path, and "
            "see model.backbone"
        )
    classifier = timm.create_model(name.partition("timm/")[2], pretrained=False)
    if weights == "none":
        load_backbone_weights(home, name, classifier, config, backbone)
    body = feature_backbone(timm, classifier, name, strides)
    if weights != "none" or backbone != "none":
        freeze_all_batch_norm(timm, body)
    return body


def build_detector(kind: str, body: Any, outputs: int, regions: int, proposals: int) -> Any:
    """torchvision's detector with its own default anchors over the body's features.

    `kind`: fasterrcnn, maskrcnn, retinanet or fcos.
    """
    taps = {name: str(i) for i, name in enumerate(body.return_layers)}
    extra = (
        LastLevelMaxPool()
        if kind in ("fasterrcnn", "maskrcnn")
        else LastLevelP6P7(PYRAMID_CHANNELS, PYRAMID_CHANNELS)
    )
    channels = body.feature_info.channels()
    backbone = BackboneWithFPN(body, taps, channels, PYRAMID_CHANNELS, extra, group_norm)
    if kind == "fcos":
        return FCOS(backbone, outputs)
    if kind == "retinanet":
        return RetinaNet(backbone, outputs)
    sizes = tuple((side,) for side in (32, 64, 128, 256, 512)[: len(taps) + 1])
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    sampled = {"box_batch_size_per_image": regions, "rpn_post_nms_top_n_test": proposals}
    two_stages = MaskRCNN if kind == "maskrcnn" else FasterRCNN
    return two_stages(backbone, outputs + 1, rpn_anchor_generator=anchors, **sampled)


def group_norm(channels: int) -> nn.GroupNorm:
    """The normalisation after each convolution of the feature pyramid.

    The scale of a backbone's features is its own: their standard deviation is about 0.5 in a
    ResNet and 8 in EfficientNet-Lite0, whose blocks end without an activation. Heads whose rates
    are meant for a ResNet diverge on the latter. GroupNorm does not depend on the size of a batch
    (Wu and He, Group Normalization, ECCV 2018, with a feature pyramid in section 4.2).
    """
    return nn.GroupNorm(NORM_GROUPS, channels)


def feature_backbone(timm: Any, model: nn.Module, name: str, strides: list[int]) -> Any:
    """timm's classifier as a row of layers that returns the feature maps of these strides.

    Raises:
        SpaceError: The model does not have such feature maps.
    """
    feature_info = list(getattr(model, "feature_info", None) or [])
    channels_first = str(getattr(model, "output_fmt", "NCHW")) == "NCHW"
    indices = [
        i
        for i, info in enumerate(feature_info)
        if channels_first and info.get("reduction") in strides
    ]
    # a feature map may come from inside a layer that is itself a row of layers
    is_nested = any("." in str(feature_info[i]["module"]) for i in indices)
    try:
        body = timm.models.FeatureDictNet(model, indices, flatten_sequential=is_nested)
        body_strides = body.feature_info.reduction()
    except (AssertionError, KeyError, TypeError):
        body_strides = []
    if body_strides != strides:
        raise SpaceError(
            f"model.name: {name}: it has no features of strides {strides} in a row; take a "
            "convolutional model of timm's"
        )
    return body


def load_backbone_weights(
    home: Path, name: str, model: nn.Module, config: dict[str, Any], backbone: str
) -> None:
    """Load the classifier's weights.

    Raises:
        SpaceError: timm has no such weights.
        DataError: They are missing or do not fit.
    """
    if backbone in NOT_LOADED:
        return
    if is_path(backbone):
        path = Path(backbone)
    else:
        path = download_timm_weights(home, name, backbone, config)
    state = convert_state(model, read_state_dict(path))
    head = classifier_names(config)
    load_matching_state(model, state, head=head, source_name=f"backbone: {path}")


def freeze_all_batch_norm(timm: Any, body: nn.Module) -> None:
    """Freeze statistics, scale and shift of BatchNorm, as in torchvision's pretrained backbones."""
    timm.layers.freeze_batch_norm_2d(body)
    freeze_batch_norm(body)
