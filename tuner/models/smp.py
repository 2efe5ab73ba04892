"""The decoders of segmentation_models_pytorch (smp) with any encoder that it has or timm has.

U-Net, U-Net++, MA-Net, LinkNet, FPN, PAN, PSPNet, UPerNet, DeepLabV3, DeepLabV3+, SegFormer and
DPT. A name is architecture/encoder, such as unet/resnet18, segformer/mit_b0, fpn/tu-<a name of
timm's> or dpt/tu-<a ViT of timm's>. Cut at the encoder's stages, the decoder and the head. Needs
the extra `segmentation`.

Published weights are those of the encoder, so the decoder is new. Then the last convolution has no
pretrained features to be probed on, and begins as smp draws it.

Ronneberger et al., U-Net, MICCAI 2015; Zhou et al., UNet++, DLMIA 2018; Fan et al., MA-Net, IEEE
Access 2020; Chaurasia and Culurciello, LinkNet, VCIP 2017; Kirillov et al., Panoptic Feature
Pyramid Networks, CVPR 2019; Li et al., PAN, BMVC 2018; Zhao et al., PSPNet, CVPR 2017; Xiao et al.,
UPerNet, ECCV 2018; Chen et al., DeepLabV3, 2017, and DeepLabV3+, ECCV 2018; Xie et al., SegFormer,
NeurIPS 2021; Ranftl et al., DPT, ICCV 2021; Iakubovskii, Segmentation Models Pytorch, 2019,
https://github.com/qubvel-org/segmentation_models.pytorch.
"""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from tuner.config.requirements import pip_install
from tuner.core.input_spec import IMAGENET_SPEC, ImageInputSpec
from tuner.core.types import StagedModel
from tuner.core.weights import (
    StateDict,
    fetch_weights,
    is_path,
    load_matching_state,
    read_state_dict,
)
from tuner.errors import SpaceError, nearest_hint, suggest_names
from tuner.models._forward_pass import TRACE_ERRORS, UncutModel
from tuner.models._hub import WEIGHTS_FILE, hub_url
from tuner.models._smp_stages import stages_of
from tuner.models._smp_vit_stages import vit_stages
from tuner.models._timm import convert_state, download_timm_weights, import_timm, timm_config

TASKS = ("segmentation",)


@dataclass(frozen=True)
class Architecture:
    """A decoder of smp's.

    `builder` is the name of its model in smp. `used_maps`: how many feature maps it uses, counted
    from the deepest. `takes_sizes`: whether it asks the larger ones for their sizes, or counts
    them. `dilates`: its encoder's last stages keep their size and are dilated. `least_size` of an
    image in pixels.
    """

    builder: str
    used_maps: int = 5
    takes_sizes: bool = True
    dilates: bool = False
    least_size: int = 32


ARCHITECTURES = {
    "unet": Architecture("Unet"),
    "unetplusplus": Architecture("UnetPlusPlus"),
    "manet": Architecture("MAnet"),
    "linknet": Architecture("Linknet"),
    "fpn": Architecture("FPN", used_maps=4, takes_sizes=False),
    # it halves a sixteenth of the image three times more
    "pan": Architecture("PAN", used_maps=4, dilates=True, least_size=128),
    "pspnet": Architecture("PSPNet", used_maps=1, takes_sizes=False),
    "upernet": Architecture("UPerNet", used_maps=4),
    "deeplabv3": Architecture("DeepLabV3", used_maps=1, takes_sizes=False, dilates=True),
    "deeplabv3plus": Architecture("DeepLabV3Plus", used_maps=4, dilates=True),
    "segformer": Architecture("Segformer"),
    "dpt": Architecture("DPT"),  # its encoder is a ViT: `_smp_vit_stages` cuts it
}
NAMES = (
    "unet/*",
    "unetplusplus/*",
    "manet/*",
    "linknet/*",
    "fpn/*",
    "pan/*",
    "pspnet/*",
    "upernet/*",
    "deeplabv3/*",
    "deeplabv3plus/*",
    "segformer/*",
    "dpt/*",
)
# smp's examples/binary_segmentation_intro.ipynb and camvid_segmentation_multiclass.ipynb: Adam,
# lr 2e-4, cosine, batches of 16 and 32, 10 and 50 epochs, Dice loss (task.loss). Here the encoder
# begins with about that rate and the new decoder with 1e-3, in batches of 8, which is better on
# photographs of people (benchmarks/README.md)
RECIPES = {
    "segmentation": {
        "optimizer": "adam",
        "lr": 1e-3,
        "backbone_lr": 0.3,
        "schedule": "cosine",
        "batch_size": 8,
        "epochs": 10,
    }
}
HALF_RGB = (0.5, 0.5, 0.5)
DPN_NORMALISATION = (0.4862745, 0.4588235, 0.4078431), (0.2348247, 0.2348247, 0.2348247)
# encoders whose weights need another mean and standard deviation than ImageNet's
OTHER_NORMALISATIONS = {
    "inception": (HALF_RGB, HALF_RGB),
    "xception": (HALF_RGB, HALF_RGB),
    "dpn": DPN_NORMALISATION,
}
SIZE, MULTIPLE = 256, 32  # encoders halve the image five times
DPT_ADVICE = (
    "take a ViT of timm with patches of 8, 16 or 32, such as dpt/tu-vit_small_patch16_224, and a "
    "multiple of 32 as data.size"
)


def input_spec(name: str, *, weights: str = "default") -> ImageInputSpec:
    """256 pixels a side, with the mean and standard deviation of the encoder.

    Images are letterboxed, so that every pixel of an image is on the canvas.
    """
    kind, _, encoder = name.partition("/")
    size, multiple = SIZE, MULTIPLE
    mean, std = next(
        (values for begin, values in OTHER_NORMALISATIONS.items() if encoder.startswith(begin)),
        (IMAGENET_SPEC.mean, IMAGENET_SPEC.std),
    )
    if encoder.startswith("tu-"):
        timm = import_timm()
        config = timm_config(timm, _timm_name(encoder))
        data_config = timm.data.resolve_data_config(pretrained_cfg=config, model=None)
        own_size = data_config["input_size"][-1]
        if kind == "dpt":  # timm resamples the positions of a ViT for other sizes
            size = own_size // MULTIPLE * MULTIPLE
        elif config.get("fixed_input_size"):
            size = multiple = own_size
        mean, std = (tuple(float(v) for v in data_config[key]) for key in ("mean", "std"))  # type: ignore[assignment]
    least_size = ARCHITECTURES[kind].least_size
    return ImageInputSpec(
        size, size, "bilinear", mean, std, "letterbox", multiple, None, least_size
    )


def build(
    home: Path,
    name: str,
    task: str,
    outputs: int,
    size: int | None = None,
    *,
    weights: Annotated[
        str,
        Field(
            description="of the encoder: default, or a name that smp has; none: fresh parameters; "
            "or a path to a .safetensors or .pth file"
        ),
    ] = "default",
) -> StagedModel:
    """Architecture/encoder `name` with `outputs` classes.

    Depth 1 freezes the encoder's stem, each depth after it one stage of the encoder more, and the
    last depth the decoder too. Of a ViT each depth freezes one block more, and the model is for
    images of `size` pixels; None: of the size that its weights were trained with.

    `weights`: default or a name of smp's, for the encoder; none; or a path to the weights of an
    encoder under smp's or timm's names, or to those of a whole model.

    Raises:
        SpaceError: smp and timm do not have the name, or smp cannot build the model.
        DataError: The weights are missing or do not fit.
    """
    smp = _import_smp()
    encoder = name.partition("/")[2]
    _check_encoder(smp, encoder)
    spec = input_spec(name)
    side = size or spec.size
    if spec.multiple == spec.size != side:  # an encoder of a fixed size
        raise SpaceError(
            f"data.size: {side}, but {name} is made for {spec.size} pixels; leave data.size out or "
            f"write {spec.size}"
        )
    model = _build_model(smp, name, outputs, side)
    notes: tuple[str, ...] = ()
    if weights != "none":
        state, source_name = _read_state(smp, home, encoder, weights)
        notes = _load_state(model, state, encoder, source_name)
    stages, uncut_reason = _cut(model, name, side)
    return StagedModel(model, stages, notes, can_probe=False, uncut_reason=uncut_reason)


def _build_model(smp: Any, name: str, outputs: int, side: int) -> Any:
    """smp's model with fresh parameters; DPT for images of `side` pixels.

    Raises:
        SpaceError: smp cannot build it.
    """
    kind, _, encoder = name.partition("/")
    architecture = ARCHITECTURES[kind]
    own = {"img_size": side} if kind == "dpt" else {}
    try:
        with _silence_warnings(), _device_with_numbers(encoder) as device:
            model = getattr(smp, architecture.builder)(
                encoder_name=encoder, encoder_weights=None, classes=outputs, **own
            )
        return model.to(device)
    except TRACE_ERRORS as error:
        # smp and timm raise any of these where architecture and encoder do not fit together
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        advice = "try another encoder"
        if kind == "dpt":
            advice = f"{DPT_ADVICE}, or the encoder with another decoder, such as upernet/{encoder}"
        elif architecture.dilates:
            advice = (
                f"{kind} dilates the last stages of its encoder, which not every encoder can: "
                f"take {kind}/resnet34 or {kind}/mit_b0, or a decoder that does not, such as "
                f"fpn/{encoder}"
            )
        raise SpaceError(f"model.name: {name!r}: smp cannot build it ({said}); {advice}") from None


@contextlib.contextmanager
def _device_with_numbers(encoder: str) -> Iterator[torch.device]:
    """Gives the default device. MiT is built on the CPU: it reads a number that meta has not."""
    device = torch.get_default_device()
    with torch.device("cpu" if encoder.startswith("mit_") else device):
        yield device


def _cut(model: Any, name: str, side: int) -> tuple[dict[str, nn.Module], str | None]:
    """The stages, and in words why the encoder is one stage, where it is."""
    kind = name.partition("/")[0]
    if kind != "dpt":
        architecture = ARCHITECTURES[kind]
        return stages_of(model, architecture.used_maps, takes_sizes=architecture.takes_sizes)
    try:
        return vit_stages(model, side), None
    except UncutModel as error:
        raise SpaceError(f"model.name: {name!r}: {error}; {DPT_ADVICE}") from None


def _import_smp() -> Any:
    try:
        with _silence_warnings():
            import segmentation_models_pytorch
    except ImportError:
        raise SpaceError(
            f"model.name: {'/…, '.join(ARCHITECTURES)}/… need segmentation_models_pytorch: "
            f"{pip_install('segmentation')}"
        ) from None
    return segmentation_models_pytorch


@contextlib.contextmanager
def _silence_warnings() -> Iterator[None]:
    """Hide warnings of smp and timm about their own names: they do not concern the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _timm_name(encoder: str) -> str:
    """The encoder's name as `timm_config` and `download_timm_weights` take it."""
    return f"timm/{encoder.removeprefix('tu-')}"


def _check_encoder(smp: Any, encoder: str) -> None:
    """Check the name of an encoder.

    Raises:
        SpaceError: Neither smp nor timm has it.
    """
    if encoder.startswith("tu-"):
        timm_config(import_timm(), _timm_name(encoder))
    elif encoder not in smp.encoders.encoders:
        known_names = list(smp.encoders.encoders)
        hint = (
            "; timm's are called tu-<name>"
            if encoder in import_timm().list_models()
            else nearest_hint(encoder, known_names)
        )
        raise SpaceError(
            f"model.name: encoder {encoder!r} is not known to smp {smp.__version__}{hint} (smp "
            f"has {', '.join(known_names[:12])}, …)"
        )


# -- weights


def _read_state(smp: Any, home: Path, encoder: str, weights: str) -> tuple[StateDict, str]:
    """The weights that `weights` names, and the name that messages use for them."""
    if is_path(weights):
        return read_state_dict(Path(weights)), f"weights: {weights}"
    if encoder.startswith("tu-"):
        path = download_timm_weights(
            home, _timm_name(encoder), weights, timm_config(import_timm(), _timm_name(encoder))
        )
        return read_state_dict(path), f"weights: {path.name}"
    settings = smp.encoders.encoders[encoder]["pretrained_settings"]
    entry = weights
    if weights == "default":
        entry = "imagenet" if "imagenet" in settings else next(iter(settings), "")
    if entry not in settings:
        raise SpaceError(
            f"model.weights: {weights!r} is not known for "
            f"{encoder}{suggest_names(weights, ['default', 'none', *settings])}; or a path"
        )
    hub, revision = (str(settings[entry][key]) for key in ("repo_id", "revision"))
    path = fetch_weights(
        home,
        hub_url(hub, WEIGHTS_FILE, revision),
        name=f"{hub.replace('/', '-')}.{revision[:8]}.safetensors",
    )
    return read_state_dict(path), f"weights: {path.name}"


def _load_state(model: Any, state: StateDict, encoder: str, source_name: str) -> tuple[str, ...]:
    """Load the weights of a whole model, or of an encoder without its own head."""
    if any(name.startswith("decoder.") for name in state):
        return load_matching_state(model, state, head="segmentation_head", source_name=source_name)
    inner = model.encoder.model if encoder.startswith("tu-") else model.encoder
    own_state = inner.state_dict()
    if model.name.startswith("dpt-"):  # a whole ViT, perhaps for another size of images
        state = convert_state(inner, state)
    elif encoder.startswith("tu-") and not set(own_state) <= set(state):
        whole = import_timm().create_model(_timm_name(encoder).partition("/")[2], pretrained=False)
        state = convert_state(whole, state)
    flat = {
        _flat_name(name) if name not in own_state and _flat_name(name) in own_state else name: value
        for name, value in state.items()
    }
    load_matching_state(
        inner,
        {name: value for name, value in flat.items() if name in own_state},
        head="head",  # of a ViT: the classifier that DPT never calls
        source_name=source_name,
    )
    return ("decoder and head: new, the weights are the encoder's",)


def _flat_name(name: str) -> str:
    """A weight's name in a model that timm took apart for its features.

    It is stages_0.x for stages.0.x.
    """
    return name.replace(".", "_", 1)
