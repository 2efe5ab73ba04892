"""Pretrained weights: downloaded, checked against a pinned SHA-256, read without running code,
loaded into a model.
"""

import json
import pickle
import struct
import warnings
import zipfile
from collections.abc import Sequence
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
    """torchvision's model `name` with its weights and a new head.

    Args:
        home: The folder of downloads.
        name: The name of the model in torchvision.
        outputs: The number of outputs of the new head.
        weights: none, default, the name of weights in torchvision, or a path.
        head: The name of the module that is the head; its weights are not loaded from torchvision.

    Returns:
        The model, and notes for the user.

    Raises:
        SpaceError: torchvision has no weights of that name.
        DataError: The weights are missing, damaged or of another model.
    """
    model: nn.Module = get_model(name, weights=None, num_classes=outputs)
    if weights == "none":
        return model, ()
    state, source = read_torchvision_state(home, name, weights)
    if not is_path(weights):
        state = {key: value for key, value in state.items() if not key.startswith(f"{head}.")}
    return model, load_matching_state(model, state, head=head, source_name=f"weights: {source}")


def read_torchvision_state(home: Path, name: str, weights: str) -> tuple[StateDict, str]:
    """The weights of torchvision's model `name`, and what errors call them.

    Args:
        home: The folder of downloads.
        name: The name of the model in torchvision.
        weights: default, the name of weights in torchvision, or a path.

    Raises:
        SpaceError: torchvision has no weights of that name.
        DataError: The weights are missing or damaged.
    """
    if is_path(weights):
        return read_state_dict(Path(weights)), weights
    entry = _torchvision_entry(name, weights)
    return read_state_dict(fetch_weights(home, entry.url)), str(entry)


def torchvision_preprocess(name: str, weights: str) -> ImageInputSpec:
    """The inference transform that torchvision publishes for these weights; without weights, for
    the default ones.
    """
    entry = _torchvision_entry(
        name, "default" if weights == "none" or is_path(weights) else weights
    )
    transforms = entry.transforms()
    mean, std = (
        tuple(float(value) for value in values) for values in (transforms.mean, transforms.std)
    )
    return ImageInputSpec(
        transforms.crop_size[0],
        transforms.resize_size[0],
        transforms.interpolation.value,
        mean,  # type: ignore[arg-type]
        std,  # type: ignore[arg-type]
    )


def is_path(weights: str) -> bool:
    """Whether `model.weights` is a path and not a name."""
    return "/" in weights or Path(weights).suffix in (".safetensors", ".pth", ".pt", ".bin")


def _torchvision_entry(name: str, weights: str) -> WeightsEnum:
    known = get_model_weights(name)
    if weights == "default":
        return known.DEFAULT
    if weights not in known.__members__:
        allowed = ["default", "none", *(entry.name for entry in known)]
        raise SpaceError(
            f"model.weights: {weights!r} is not known for {name}{suggest_names(weights, allowed)}; "
            "or give a path to a .safetensors or .pth file"
        )
    return known[weights]


def fetch_weights(home: Path, url: str, name: str | None = None) -> Path:
    """The file of `url`: from `home/weights`, from torch's hub folder, or downloaded.

    torchvision puts the first 8 digits of the SHA-256 into the file's name and checks them only
    after a download. Here the whole SHA-256 is written to `pins.json` at the first use, and
    compared at each later use.

    Args:
        home: The folder of downloads.
        url: Where the file is downloaded from.
        name: The file's name in `home/weights`; None: its name in `url`.

    Raises:
        DataError: There is no network (the message has URL, path and SHA-256), or the file is not
            the pinned one.
    """
    file = name or Path(urlparse(url).path).name
    path = home / "weights" / file
    for existing in (path, Path(torch.hub.get_dir()) / "checkpoints" / file):
        if existing.is_file():
            return _check_pin(home, existing)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(path.with_name(f".{file}.lock")):
            if not path.is_file():  # another worker may have fetched it meanwhile
                download(url, path, "weights", digest_prefix=_hash_in_name(path))
    return _check_pin(home, path)


def _hash_in_name(path: Path) -> str:
    """The first digits of the SHA-256, which torchvision puts into a file's name; '' where there
    are none.
    """
    end = path.stem.rsplit("-", 1)[-1]
    is_hash = len(end) >= 8 and all(character in "0123456789abcdef" for character in end)
    return end if is_hash else ""


def _check_pin(home: Path, path: Path) -> Path:
    """Returns `path` if its SHA-256 is the one of the first use. Raises DataError otherwise."""
    pins = home / "weights" / "pins.json"
    digest = file_sha256(path)
    with disk_errors(pins):
        pins.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(pins.with_name(".pins.lock")):
            pinned_digests = _read_pins(pins)
            expected = pinned_digests.get(path.name, _hash_in_name(path))
            if not digest.startswith(expected):
                raise DataError(
                    f"weights: {path} has SHA-256 {digest}, expected {expected}; delete the file "
                    "so that it is fetched again, or, where the new one is wanted, its line in "
                    f"{pins}"
                )
            if path.name not in pinned_digests:
                remove_leftovers(pins.parent)
                with atomic_path(pins, crash_prefix="pins") as temporary:
                    pinned_digests[path.name] = digest
                    temporary.write_text(json.dumps(pinned_digests, indent=2))
    return path


def _read_pins(path: Path) -> dict[str, str]:
    """The SHA-256 of each file by its name. Raises DataError where the file of pins is damaged."""
    if not path.is_file():
        return {}
    try:
        return {str(name): str(digest) for name, digest in json.loads(path.read_text()).items()}
    except (ValueError, AttributeError):
        raise DataError(
            f"weights: {path} is damaged; delete it, and each file is pinned again at its next use"
        ) from None


def read_state_dict(path: Path) -> StateDict:
    """A state dict from .safetensors, or from a pickle that has only tensors in it.

    Raises:
        DataError: The file is missing or damaged, is no state dict, or would run code.
    """
    path = path.expanduser()
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"weights: {path} {problem}; give a .safetensors or .pth file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # torch warns about the file's format, which the user cannot change
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise DataError(
            f"weights: {path} is damaged or not a safetensors file ({error}){_damage_hint(path)}"
        ) from None
    except pickle.UnpicklingError as error:
        raise DataError(
            f"weights: {path} refused: it is damaged or would run code when loaded "
            f"({str(error).splitlines()[0]}){_damage_hint(path)}; "
            "save the state dict as safetensors"
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
        or not all(isinstance(value, Tensor) for value in state.values())
    ):
        raise DataError(f"weights: {path} holds no state dict (a mapping of names to tensors)")
    return {str(key).removeprefix("module."): value for key, value in state.items()}


def _damage_hint(path: Path) -> str:
    """What the file seems to be instead; '' where that is not known."""
    start = path.read_bytes()[:512].lstrip().lower()
    if start.startswith((b"<!doctype", b"<html")):
        return "; it is an HTML page, so the download link led to a web page"
    if path.stat().st_size == 0:
        return "; it is empty"
    return ""


def load_matching_state(
    model: nn.Module, state: StateDict, *, head: str | Sequence[str], source_name: str
) -> tuple[str, ...]:
    """Loads `state` into `model`. A head of another shape stays as it is.

    Args:
        model: The model. It is changed in place.
        state: The weights, by the model's native names.
        head: The name of the module that is the head, or the names of several.
        source_name: Where the weights are from; errors begin with it.

    Returns:
        Notes for the user: that the head is new, where it is.

    Raises:
        DataError: The weights do not fit the model. The error lists the first 10 names that are
            missing, unknown, of another shape or not finite.
    """
    # an export has its normalisation beside the weights
    state = {name: value for name, value in state.items() if not name.startswith("tuner.")}
    own = model.state_dict()
    heads = (head,) if isinstance(head, str) else tuple(head)
    head_starts = tuple(f"{name}." for name in heads)
    in_head = {name for name in own if name.startswith(head_starts)}
    is_head_new = any(name not in state or state[name].shape != own[name].shape for name in in_head)
    loaded = {
        name: value
        for name, value in state.items()
        if not (is_head_new and name.startswith(head_starts))
    }
    problems = [
        f"{source_name}: {name} is missing"
        for name in own
        if name not in loaded and name not in in_head and "num_batches" not in name
    ]
    for name, value in loaded.items():
        if name not in own:
            problems.append(f"{source_name}: {name} is not part of the model")
        elif value.shape != own[name].shape:
            problems.append(
                f"{source_name}: {name} has shape {_format_shape(value)}, "
                f"model wants {_format_shape(own[name])}"
            )
        elif value.is_floating_point() and not bool(torch.isfinite(value).all()):
            problems.append(f"{source_name}: {name} holds NaN or infinite values")
    if problems:
        raise DataError(
            *limit_listing(problems),
            f"{source_name}: these are another model's weights, or damaged",
        )
    model.load_state_dict(loaded, strict=False)
    if not is_head_new:
        return ()
    return (f"{', '.join(heads)}: new, the weights have none for these classes",)


def _format_shape(value: Tensor) -> str:
    return f"({','.join(map(str, value.shape))})"
