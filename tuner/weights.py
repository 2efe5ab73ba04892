"""Pretrained weights: found or downloaded, checked against a pinned SHA-256, never unpickled with code, fitted to a model."""

import json
import pickle
import urllib.error
from pathlib import Path
from urllib.parse import urlparse

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights
from torchvision.models._api import WeightsEnum

from tuner.core import Preprocess
from tuner.errors import DataError, SpaceError, suggest
from tuner.files import atomic_path, sha256

State = dict[str, Tensor]


def torchvision_model(home: Path, name: str, outputs: int, weights: str, *, head: str) -> tuple[nn.Module, tuple[str, ...]]:
    """torchvision's `name` with a new head of `outputs`, its weights, and what was noted.

    Raises SpaceError on an unknown weights name, DataError when weights are missing, damaged or of another model.
    """
    model: nn.Module = get_model(name, weights=None, num_classes=outputs)
    if weights == "none":
        return model, ()
    if is_path(weights):
        return model, adopt(model, read(Path(weights)), head=head, where=f"weights {weights}")
    entry = _entry(name, weights)
    state = {k: v for k, v in read(fetch(home, entry.url)).items() if not k.startswith(f"{head}.")}
    return model, adopt(model, state, head=head, where=f"weights {entry}")


def torchvision_preprocess(name: str, weights: str) -> Preprocess:
    """The inference transform that torchvision states for these weights; without any, that of the default ones."""
    entry = _entry(name, "default" if weights == "none" or is_path(weights) else weights)
    t = entry.transforms()
    mean, std = (tuple(float(v) for v in values) for values in (t.mean, t.std))
    return Preprocess(t.crop_size[0], t.resize_size[0], t.interpolation.value, mean, std)  # type: ignore[arg-type]


def is_path(weights: str) -> bool:
    return "/" in weights or Path(weights).suffix in (".safetensors", ".pth", ".pt", ".bin")


def _entry(name: str, weights: str) -> WeightsEnum:
    known = get_model_weights(name)
    if weights == "default":
        return known.DEFAULT
    if weights not in known.__members__:
        allowed = ["default", "none", *known.__members__]
        raise SpaceError(
            f"model.weights: {weights!r} is not known for {name}{suggest(weights, allowed)}; or give a path to a .safetensors or .pth file"
        )
    return known[weights]


def fetch(home: Path, url: str) -> Path:
    """The file behind `url`: from `home/weights`, from torch's hub folder, or downloaded; its SHA-256 pinned on first use.

    torchvision puts the hash's first 8 digits into the name and checks them at download only; the full hash is kept in
    `pins.json` and compared at each load. Raises DataError with URL, path and hash when there is no network.
    """
    file = Path(urlparse(url).path).name
    path = home / "weights" / file
    for place in (path, Path(torch.hub.get_dir()) / "checkpoints" / file):
        if place.is_file():
            return _pinned(home, place)
    path.parent.mkdir(parents=True, exist_ok=True)
    begin = file.rsplit("-", 1)[-1].split(".")[0]
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=begin if _is_hash(begin) else None, progress=False)
    except (urllib.error.URLError, OSError) as error:
        known = f" (its SHA-256 begins with {begin})" if _is_hash(begin) else ""
        raise DataError(f"weights: cannot download {url}: {error}; fetch it elsewhere{known} and place it at {path}") from None
    except RuntimeError as error:
        raise DataError(f"weights: {url}: {error}; the download is damaged or was replaced, nothing was kept") from None
    return _pinned(home, path)


def _is_hash(text: str) -> bool:
    return len(text) >= 8 and all(c in "0123456789abcdef" for c in text)


def _pinned(home: Path, path: Path) -> Path:
    pins = home / "weights" / "pins.json"
    known: dict[str, str] = json.loads(pins.read_text()) if pins.is_file() else {}
    digest = sha256(path)
    begin = path.stem.rsplit("-", 1)[-1]
    want = known.get(path.name) or (begin if _is_hash(begin) else digest)
    if not digest.startswith(want):
        raise DataError(f"weights: {path} has SHA-256 {digest}, expected {want}; delete the file so that it is fetched again")
    if path.name not in known:
        pins.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(pins) as temporary:
            temporary.write_text(json.dumps({**known, path.name: digest}, indent=2))
    return path


def read(path: Path) -> State:
    """A state dict from .safetensors, or from a pickle that holds tensors only. Raises DataError."""
    if not path.is_file():
        raise DataError(f"weights: {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise DataError(f"weights: {path} is damaged or not a safetensors file ({error}){_looks_like(path)}") from None
    except pickle.UnpicklingError as error:
        raise DataError(
            f"weights: {path} refused: it is damaged or would run code when loaded "
            f"({str(error).splitlines()[0]}){_looks_like(path)}; save the state dict as safetensors"
        ) from None
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise DataError(f"weights: {path} is damaged or truncated ({str(error).splitlines()[0]}){_looks_like(path)}") from None
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise DataError(f"weights: {path} holds no state dict (a mapping of names to tensors)")
    return {str(k).removeprefix("module."): v for k, v in state.items()}


def _looks_like(path: Path) -> str:
    begin = path.read_bytes()[:512].lstrip().lower()
    if begin.startswith((b"<!doctype", b"<html")):
        return "; it is an HTML page, so the download link led to a web page"
    if path.stat().st_size == 0:
        return "; it is empty"
    return ""


def adopt(model: nn.Module, state: State, *, head: str, where: str) -> tuple[str, ...]:
    """Load `state` into `model`; a head of another shape stays as initialised, and the returned notes say so.

    Raises DataError listing every missing, unknown or misshapen name.
    """
    state = {k: v.float() if v.is_floating_point() else v for k, v in state.items() if not k.startswith("tuner.")}
    own = model.state_dict()
    in_head = {k for k in own if k.startswith(f"{head}.")}
    new_head = any(k not in state or state[k].shape != own[k].shape for k in in_head)
    taken = {k: v for k, v in state.items() if not (new_head and k.startswith(f"{head}."))}
    problems = [f"{where}: {k} is missing" for k in own if k not in taken and k not in in_head and "num_batches" not in k]
    for name, value in taken.items():
        if name not in own:
            problems.append(f"{where}: {name} is not part of the model")
        elif value.shape != own[name].shape:
            problems.append(f"{where}: {name} has shape {tuple(value.shape)}, model wants {tuple(own[name].shape)}")
        elif value.is_floating_point() and not bool(torch.isfinite(value).all()):
            problems.append(f"{where}: {name} holds NaN or infinite values")
    if problems:
        more = [f"{where}: … and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise DataError(*problems[:10], *more, f"{where}: these are another model's weights, or damaged")
    model.load_state_dict(taken, strict=False)
    return (f"{head}: new, the weights have none for these classes",) if new_head else ()
