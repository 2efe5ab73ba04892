"""U-Net, U-Net++ and FPN with any encoder of segmentation_models_pytorch, such as unet/resnet18 or fpn/tu-<name of timm's>.

Cut at the encoder's stages, the decoder and the head (extra `segmentation`). Ronneberger et al., U-Net, MICCAI 2015; Zhou et al.,
UNet++, DLMIA 2018; Kirillov et al., Panoptic Feature Pyramid Networks, CVPR 2019; Iakubovskii, Segmentation Models Pytorch, 2019,
https://github.com/qubvel-org/segmentation_models.pytorch.
"""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

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
from tuner.models._hub import WEIGHTS_FILE, hub_url
from tuner.models._smp_stages import stages_of
from tuner.models._timm import convert_state, download_timm_weights, import_timm, timm_config

TASKS = ("segmentation",)
NAMES = ("unet/*", "unetplusplus/*", "fpn/*")
# smp's examples/binary_segmentation_intro.ipynb and camvid_segmentation_multiclass.ipynb: Adam, lr 2e-4, cosine, batches of 16 and 32,
# 10 and 50 epochs, Dice loss (task.loss)
RECIPES = {
    "segmentation": {
        "optimizer": "adamw",
        "lr": 2e-4,
        "schedule": "cosine",
        "batch_size": 16,
        "epochs": 10,
    }
}
HALF_RGB = (0.5, 0.5, 0.5)
DPN_NORMALISATION = (0.4862745, 0.4588235, 0.4078431), (0.2348247, 0.2348247, 0.2348247)
OTHER_NORMALISATIONS = {
    "inception": (HALF_RGB, HALF_RGB),
    "xception": (HALF_RGB, HALF_RGB),
    "dpn": DPN_NORMALISATION,
}  # encoders whose weights want other than ImageNet's mean and std
SIZE, MULTIPLE = 256, 32  # encoders halve the image five times


def input_spec(name: str, *, weights: str = "default") -> ImageInputSpec:
    """256 pixels, letterboxed so that every pixel of an image is on the canvas; mean and standard deviation are the encoder's."""
    encoder, size, multiple = name.partition("/")[2], SIZE, MULTIPLE
    mean, std = next(
        (stated for begin, stated in OTHER_NORMALISATIONS.items() if encoder.startswith(begin)),
        (IMAGENET_SPEC.mean, IMAGENET_SPEC.std),
    )
    if encoder.startswith("tu-"):
        timm = import_timm()
        config = timm_config(timm, _timm_name(encoder))
        stated = timm.data.resolve_data_config(pretrained_cfg=config, model=None)
        if config.get("fixed_input_size"):
            size = multiple = stated["input_size"][-1]
        mean, std = (tuple(float(v) for v in stated[key]) for key in ("mean", "std"))  # type: ignore[assignment]
    return ImageInputSpec(size, size, "bilinear", mean, std, "letterbox", multiple)


def build(
    home: Path,
    name: str,
    task: str,
    outputs: int,
    *,
    weights: Annotated[
        str,
        Field(
            description="of the encoder: default, or a name that smp has; none: fresh parameters; or a path to a .safetensors or .pth file"
        ),
    ] = "default",
) -> StagedModel:
    """Architecture/encoder `name` with `outputs` classes: depth 1 freezes the encoder's stem, then a stage more each, then the decoder.

    `weights`: default or a name of smp's for the encoder, none, or a path to an encoder's weights under smp's or timm's names, or to a
    whole model's. Raises SpaceError on names that smp and timm do not have, DataError on weights that are missing or do not fit.
    """
    smp = _import_smp()
    architecture, _, encoder = name.partition("/")
    _check_encoder(smp, encoder)
    made = {"unet": smp.Unet, "unetplusplus": smp.UnetPlusPlus, "fpn": smp.FPN}[architecture]
    try:
        with _silence_warnings():
            model = made(encoder_name=encoder, encoder_weights=None, classes=outputs)
    except (
        ValueError,
        RuntimeError,
        KeyError,
        AttributeError,
        TypeError,
    ) as error:  # as smp says that the two do not go together
        raise SpaceError(
            f"model.name: {name!r}: smp cannot build it ({str(error).splitlines()[0]}); try another encoder"
        ) from None
    notes: tuple[str, ...] = ()
    if weights != "none":
        state, where = _read_state(smp, home, encoder, weights)
        notes = _load_state(model, state, encoder, where)
    return StagedModel(
        model, stages_of(model, used_maps=4 if architecture == "fpn" else 5), notes, can_probe=False
    )


def _import_smp() -> Any:
    try:
        with _silence_warnings():
            import segmentation_models_pytorch
    except ImportError:
        raise SpaceError(
            f"model.name: unet/…, unetplusplus/… and fpn/… need segmentation_models_pytorch: {pip_install('segmentation')}"
        ) from None
    return segmentation_models_pytorch


@contextlib.contextmanager
def _silence_warnings() -> Iterator[None]:
    """smp's and timm's words about their own names are no business of who uses them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _timm_name(encoder: str) -> str:
    """As `config_of` and `download` take timm's names."""
    return f"timm/{encoder.removeprefix('tu-')}"


def _check_encoder(smp: Any, encoder: str) -> None:
    """Raises SpaceError on an encoder that neither smp nor timm has."""
    if encoder.startswith("tu-"):
        timm_config(import_timm(), _timm_name(encoder))
    elif encoder not in smp.encoders.encoders:
        words = list(smp.encoders.encoders)
        hint = (
            "; timm's are called tu-<name>"
            if encoder in import_timm().list_models()
            else nearest_hint(encoder, words)
        )
        raise SpaceError(
            f"model.name: encoder {encoder!r} is not known to smp {smp.__version__}{hint} (smp has {', '.join(words[:12])}, …)"
        )


# -- weights


def _read_state(smp: Any, home: Path, encoder: str, weights: str) -> tuple[StateDict, str]:
    """The weights that are meant, and how a message calls them."""
    if is_path(weights):
        return read_state_dict(Path(weights)), f"weights: {weights}"
    if encoder.startswith("tu-"):
        path = download_timm_weights(
            home, _timm_name(encoder), weights, timm_config(import_timm(), _timm_name(encoder))
        )
        return read_state_dict(path), f"weights: {path.name}"
    settings = smp.encoders.encoders[encoder]["pretrained_settings"]
    wanted = (
        ("imagenet" if "imagenet" in settings else next(iter(settings), ""))
        if weights == "default"
        else weights
    )
    if wanted not in settings:
        raise SpaceError(
            f"model.weights: {weights!r} is not known for {encoder}{suggest_names(weights, ['default', 'none', *settings])}; or a path"
        )
    hub, revision = (str(settings[wanted][key]) for key in ("repo_id", "revision"))
    path = fetch_weights(
        home,
        hub_url(hub, WEIGHTS_FILE, revision),
        name=f"{hub.replace('/', '-')}.{revision[:8]}.safetensors",
    )
    return read_state_dict(path), f"weights: {path.name}"


def _load_state(model: Any, state: StateDict, encoder: str, where: str) -> tuple[str, ...]:
    """Loads a whole model's weights, or an encoder's, whose own head is left out."""
    if any(name.startswith("decoder.") for name in state):
        return load_matching_state(model, state, head="segmentation_head", source_name=where)
    inner = model.encoder.model if encoder.startswith("tu-") else model.encoder
    own = inner.state_dict()
    if encoder.startswith("tu-") and not set(own) <= set(state):
        whole = import_timm().create_model(_timm_name(encoder).partition("/")[2], pretrained=False)
        state = convert_state(whole, state)
    flat = {
        _flat_name(name) if name not in own and _flat_name(name) in own else name: value
        for name, value in state.items()
    }
    load_matching_state(
        inner,
        {name: value for name, value in flat.items() if name in own},
        head="-",
        source_name=where,
    )
    return ("decoder and head: new, the weights are the encoder's",)


def _flat_name(name: str) -> str:
    """As timm calls a stage of a model taken apart for its features: stages.0.x is stages_0.x."""
    return name.replace(".", "_", 1)
