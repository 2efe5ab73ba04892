"""Pretrained weights: found or downloaded, checked against a pinned SHA-256, never unpickled with code, fitted to a model."""

import json
import pickle
import struct
import warnings
import zipfile
from pathlib import Path
from urllib.parse import urlparse

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights
from torchvision.models._api import WeightsEnum

from tuner.core.input_spec import ImageInputSpec
from tuner.errors import DataError, SpaceError, limit_listing, suggest_names
from tuner.files.atomic import atomic_path, disk_errors, file_lock, file_sha256, remove_leftovers
from tuner.files.downloads import download

StateDict = dict[str, Tensor]

# what torch.load raises on damaged files, beside UnpicklingError
LOAD_ERRORS = (
    RuntimeError,
    EOFError,
    ValueError,
    OSError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    ImportError,
    struct.error,
    zipfile.BadZipFile,
)


def torchvision_model(
    home: Path, name: str, outputs: int, weights: str, *, head: str
) -> tuple[nn.Module, tuple[str, ...]]:
    """torchvision's `name` with a new head of `outputs`, its weights, and what was noted.

    Raises SpaceError on an unknown weights name, DataError when weights are missing, damaged or of another model.
    """
    model: nn.Module = get_model(name, weights=None, num_classes=outputs)
    if weights == "none":
        return model, ()
    if is_path(weights):
        return model, load_matching_state(
            model, read_state_dict(Path(weights)), head=head, source_name=f"weights: {weights}"
        )
    entry = _torchvision_entry(name, weights)
    state = {
        k: v
        for k, v in read_state_dict(fetch_weights(home, entry.url)).items()
        if not k.startswith(f"{head}.")
    }
    return model, load_matching_state(model, state, head=head, source_name=f"weights: {entry}")


def torchvision_preprocess(name: str, weights: str) -> ImageInputSpec:
    """The inference transform that torchvision states for these weights; without any, that of the default ones."""
    entry = _torchvision_entry(
        name, "default" if weights == "none" or is_path(weights) else weights
    )
    t = entry.transforms()
    mean, std = (tuple(float(v) for v in values) for values in (t.mean, t.std))
    return ImageInputSpec(t.crop_size[0], t.resize_size[0], t.interpolation.value, mean, std)  # type: ignore[arg-type]


def is_path(weights: str) -> bool:
    return "/" in weights or Path(weights).suffix in (".safetensors", ".pth", ".pt", ".bin")


def _torchvision_entry(name: str, weights: str) -> WeightsEnum:
    known = get_model_weights(name)
    if weights == "default":
        return known.DEFAULT
    if weights not in known.__members__:
        allowed = ["default", "none", *(entry.name for entry in known)]
        raise SpaceError(
            f"model.weights: {weights!r} is not known for {name}{suggest_names(weights, allowed)}; or give a path to a .safetensors or .pth file"
        )
    return known[weights]


def fetch_weights(home: Path, url: str, name: str | None = None) -> Path:
    """The file behind `url`, kept under `name` or its own: from `home/weights`, from torch's hub folder, or downloaded; its SHA-256 pinned on first use.

    torchvision puts the hash's first 8 digits into the name and checks them at download only; the full hash is kept in
    `pins.json` and compared at each load. Raises DataError with URL, path and hash when there is no network.
    """
    file = name or Path(urlparse(url).path).name
    path = home / "weights" / file
    for place in (path, Path(torch.hub.get_dir()) / "checkpoints" / file):
        if place.is_file():
            return _check_pin(home, place)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(path.with_name(f".{file}.lock")):
            if not path.is_file():  # another worker may have fetched it meanwhile
                download(url, path, "weights", digest_prefix=_hash_in_name(path))
    return _check_pin(home, path)


def _hash_in_name(path: Path) -> str:
    """The beginning of the SHA-256 that torchvision puts into a file's name; '' where there is none."""
    end = path.stem.rsplit("-", 1)[-1]
    return end if len(end) >= 8 and all(c in "0123456789abcdef" for c in end) else ""


def _check_pin(home: Path, path: Path) -> Path:
    """`path`, once its SHA-256 is what it was at first use. Raises DataError."""
    pins = home / "weights" / "pins.json"
    digest = file_sha256(path)
    with disk_errors(pins):
        pins.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(pins.with_name(".pins.lock")):
            known = _read_pins(pins)
            want = known.get(path.name, _hash_in_name(path))
            if not digest.startswith(want):
                raise DataError(
                    f"weights: {path} has SHA-256 {digest}, expected {want}; delete the file so that it is fetched again, "
                    f"or, where the new one is wanted, its line in {pins}"
                )
            if path.name not in known:
                remove_leftovers(pins.parent)
                with atomic_path(pins, crash_prefix="pins") as temporary:
                    temporary.write_text(json.dumps({**known, path.name: digest}, indent=2))
    return path


def _read_pins(path: Path) -> dict[str, str]:
    try:
        return (
            {str(name): str(digest) for name, digest in json.loads(path.read_text()).items()}
            if path.is_file()
            else {}
        )
    except (ValueError, AttributeError):
        raise DataError(
            f"weights: {path} is damaged; delete it, and each file is pinned again at its next use"
        ) from None


def read_state_dict(path: Path) -> StateDict:
    """A state dict from .safetensors, or from a pickle that holds tensors only. Raises DataError."""
    path = path.expanduser()
    if not path.is_file():
        raise DataError(
            f"weights: {path} {'is a folder' if path.is_dir() else 'does not exist'}; give a .safetensors or .pth file"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with (
            warnings.catch_warnings()
        ):  # torch's advice on formats is of no use to who only has the file
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise DataError(
            f"weights: {path} is damaged or not a safetensors file ({error}){_damage_hint(path)}"
        ) from None
    except pickle.UnpicklingError as error:
        raise DataError(
            f"weights: {path} refused: it is damaged or would run code when loaded "
            f"({str(error).splitlines()[0]}){_damage_hint(path)}; save the state dict as safetensors"
        ) from None
    except LOAD_ERRORS as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"weights: {path} is damaged or truncated ({reason}){_damage_hint(path)}"
        ) from None
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(v, Tensor) for v in state.values())
    ):
        raise DataError(f"weights: {path} holds no state dict (a mapping of names to tensors)")
    return {str(k).removeprefix("module."): v for k, v in state.items()}


def _damage_hint(path: Path) -> str:
    begin = path.read_bytes()[:512].lstrip().lower()
    if begin.startswith((b"<!doctype", b"<html")):
        return "; it is an HTML page, so the download link led to a web page"
    if path.stat().st_size == 0:
        return "; it is empty"
    return ""


def load_matching_state(
    model: nn.Module, state: StateDict, *, head: str, source_name: str
) -> tuple[str, ...]:
    """Load `state` into `model`; a head of another shape stays as initialised, and the returned notes say so.

    Raises DataError listing every missing, unknown or misshapen name.
    """
    state = {
        k: v for k, v in state.items() if not k.startswith("tuner.")
    }  # what an export holds beside its weights
    own = model.state_dict()
    in_head = {k for k in own if k.startswith(f"{head}.")}
    new_head = any(k not in state or state[k].shape != own[k].shape for k in in_head)
    taken = {k: v for k, v in state.items() if not (new_head and k.startswith(f"{head}."))}
    problems = [
        f"{source_name}: {k} is missing"
        for k in own
        if k not in taken and k not in in_head and "num_batches" not in k
    ]
    for name, value in taken.items():
        if name not in own:
            problems.append(f"{source_name}: {name} is not part of the model")
        elif value.shape != own[name].shape:
            problems.append(
                f"{source_name}: {name} has shape {_shape(value)}, model wants {_shape(own[name])}"
            )
        elif value.is_floating_point() and not bool(torch.isfinite(value).all()):
            problems.append(f"{source_name}: {name} holds NaN or infinite values")
    if problems:
        raise DataError(
            *limit_listing(problems),
            f"{source_name}: these are another model's weights, or damaged",
        )
    model.load_state_dict(taken, strict=False)
    return (f"{head}: new, the weights have none for these classes",) if new_head else ()


def _shape(value: Tensor) -> str:
    return f"({','.join(map(str, value.shape))})"
