"""U-Net, U-Net++ and FPN with any encoder of segmentation_models_pytorch, such as unet/resnet18 or fpn/tu-<name of timm's>.

Cut at the encoder's stages, the decoder and the head (extra `segmentation`). Ronneberger et al., U-Net, MICCAI 2015; Zhou et al.,
UNet++, DLMIA 2018; Kirillov et al., Panoptic Feature Pyramid Networks, CVPR 2019; Iakubovskii, Segmentation Models Pytorch, 2019,
https://github.com/qubvel-org/segmentation_models.pytorch.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from tuner.config.requirements import pip_install
from tuner.core.input_spec import IMAGENET, Preprocess
from tuner.core.types import Staged
from tuner.core.weights import State, adopt, fetch, is_path, read
from tuner.errors import SpaceError, nearest, suggest
from tuner.models._smp_stages import stages_of
from tuner.models._timm import config_of, download, fitted, package

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
HALF = (0.5, 0.5, 0.5)
DPN = (0.4862745, 0.4588235, 0.4078431), (0.2348247, 0.2348247, 0.2348247)
OTHERS = {
    "inception": (HALF, HALF),
    "xception": (HALF, HALF),
    "dpn": DPN,
}  # encoders whose weights want other than ImageNet's mean and std
SIZE, MULTIPLE = 256, 32  # encoders halve the image five times


def wants(name: str, *, weights: str = "default") -> Preprocess:
    """256 pixels, letterboxed so that every pixel of an image is on the canvas; mean and standard deviation are the encoder's."""
    encoder, size, multiple = name.partition("/")[2], SIZE, MULTIPLE
    mean, std = next(
        (stated for begin, stated in OTHERS.items() if encoder.startswith(begin)),
        (IMAGENET.mean, IMAGENET.std),
    )
    if encoder.startswith("tu-"):
        timm = package()
        config = config_of(timm, _of_timm(encoder))
        stated = timm.data.resolve_data_config(pretrained_cfg=config, model=None)
        if config.get("fixed_input_size"):
            size = multiple = stated["input_size"][-1]
        mean, std = (tuple(float(v) for v in stated[key]) for key in ("mean", "std"))  # type: ignore[assignment]
    return Preprocess(size, size, "bilinear", mean, std, "letterbox", multiple)


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
) -> Staged:
    """Architecture/encoder `name` with `outputs` classes: depth 1 freezes the encoder's stem, then a stage more each, then the decoder.

    `weights`: default or a name of smp's for the encoder, none, or a path to an encoder's weights under smp's or timm's names, or to a
    whole model's. Raises SpaceError on names that smp and timm do not have, DataError on weights that are missing or do not fit.
    """
    smp = _smp()
    architecture, _, encoder = name.partition("/")
    _known(smp, encoder)
    made = {"unet": smp.Unet, "unetplusplus": smp.UnetPlusPlus, "fpn": smp.FPN}[architecture]
    try:
        with _quietly():
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
        state, where = _state(smp, home, encoder, weights)
        notes = _adopted(model, state, encoder, where)
    return Staged(
        model, stages_of(model, only=4 if architecture == "fpn" else 5), notes, probe=False
    )


def _smp() -> Any:
    try:
        with _quietly():
            import segmentation_models_pytorch
    except ImportError:
        raise SpaceError(
            f"model.name: unet/…, unetplusplus/… and fpn/… need segmentation_models_pytorch: {pip_install('segmentation')}"
        ) from None
    return segmentation_models_pytorch


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """smp's and timm's words about their own names are no business of who uses them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _of_timm(encoder: str) -> str:
    """As `config_of` and `download` take timm's names."""
    return f"timm/{encoder.removeprefix('tu-')}"


def _known(smp: Any, encoder: str) -> None:
    """Raises SpaceError on an encoder that neither smp nor timm has."""
    if encoder.startswith("tu-"):
        config_of(package(), _of_timm(encoder))
    elif encoder not in smp.encoders.encoders:
        words = list(smp.encoders.encoders)
        hint = (
            "; timm's are called tu-<name>"
            if encoder in package().list_models()
            else nearest(encoder, words)
        )
        raise SpaceError(
            f"model.name: encoder {encoder!r} is not known to smp {smp.__version__}{hint} (smp has {', '.join(words[:12])}, …)"
        )


# -- weights


def _state(smp: Any, home: Path, encoder: str, weights: str) -> tuple[State, str]:
    """The weights that are meant, and how a message calls them."""
    if is_path(weights):
        return read(Path(weights)), f"weights: {weights}"
    if encoder.startswith("tu-"):
        path = download(home, _of_timm(encoder), weights, config_of(package(), _of_timm(encoder)))
        return read(path), f"weights: {path.name}"
    settings = smp.encoders.encoders[encoder]["pretrained_settings"]
    wanted = (
        ("imagenet" if "imagenet" in settings else next(iter(settings), ""))
        if weights == "default"
        else weights
    )
    if wanted not in settings:
        raise SpaceError(
            f"model.weights: {weights!r} is not known for {encoder}{suggest(weights, ['default', 'none', *settings])}; or a path"
        )
    hub, revision = (str(settings[wanted][key]) for key in ("repo_id", "revision"))
    base = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    path = fetch(
        home,
        f"{base}/{hub}/resolve/{revision}/model.safetensors",
        name=f"{hub.replace('/', '-')}.{revision[:8]}.safetensors",
    )
    return read(path), f"weights: {path.name}"


def _adopted(model: Any, state: State, encoder: str, where: str) -> tuple[str, ...]:
    """Loads a whole model's weights, or an encoder's, whose own head is left out."""
    if any(name.startswith("decoder.") for name in state):
        return adopt(model, state, head="segmentation_head", where=where)
    inner = model.encoder.model if encoder.startswith("tu-") else model.encoder
    own = inner.state_dict()
    if encoder.startswith("tu-") and not set(own) <= set(state):
        whole = package().create_model(_of_timm(encoder).partition("/")[2], pretrained=False)
        state = fitted(whole, state)
    flat = {
        _flat(name) if name not in own and _flat(name) in own else name: value
        for name, value in state.items()
    }
    adopt(
        inner, {name: value for name, value in flat.items() if name in own}, head="-", where=where
    )
    return ("decoder and head: new, the weights are the encoder's",)


def _flat(name: str) -> str:
    """As timm calls a stage of a model taken apart for its features: stages.0.x is stages_0.x."""
    return name.replace(".", "_", 1)
