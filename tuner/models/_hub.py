"""A model's folder in the hub's layout: the user's own, an export's, or fetched from the hub; its configuration; its weights.

Nothing that lies in such a folder is ever run: safetensors only, and no configuration that points to code.
"""

import json
import os
from pathlib import Path
from typing import Any

from tuner.core.input_spec import TOKENIZER
from tuner.core.weights import fetch
from tuner.errors import DataError, SpaceError, nearest
from tuner.files import removal
from tuner.files.atomic import disk_errors, lock_of, locked
from tuner.preprocessing.tokenization import without_transformers

HUB = {
    "bert": "google-bert/bert-base-uncased",
    "distilbert": "distilbert/distilbert-base-uncased",
    "roberta": "FacebookAI/roberta-base",
    "gpt2": "openai-community/gpt2",
}
CONFIG, WEIGHTS, SHARDS = "config.json", "model.safetensors", "model.safetensors.index.json"
VOCABULARIES = (
    ("tokenizer.json",),
    ("vocab.txt",),
    ("vocab.json", "merges.txt"),
)  # any of these makes a fast tokenizer
OPTIONAL = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def library() -> Any:
    """The package transformers. Raises SpaceError where it is not installed."""
    try:
        import transformers
    except ImportError:
        raise without_transformers() from None
    return transformers


def own(folder: str, name: str) -> Path:
    """A folder of the user's. Raises DataError where it lacks something, or holds another kind of model than the name says."""
    root = Path(folder).expanduser()
    if not root.is_dir():
        beside = (
            [p.name for p in root.parent.iterdir() if p.is_dir()] if root.parent.is_dir() else []
        )
        what = (
            "is a file; give the folder that it lies in"
            if root.is_file()
            else f"does not exist{nearest(root.name, beside)}"
        )
        raise DataError(f"model.folder: {folder} {what}")
    if not (root / CONFIG).is_file():
        raise DataError(
            f"model.folder: {folder} has no {CONFIG}; it needs {CONFIG}, {WEIGHTS} and tokenizer.json, as save_pretrained writes"
        )
    kind = stated(root).get("model_type")
    if name in HUB and kind != name:
        raise SpaceError(
            f"model.name: {name}, but {folder} holds a model of type {kind}; write model.name: {kind if kind in HUB else 'hf/own'}"
        )
    return root


def stated(folder: Path) -> dict[str, Any]:
    """A folder's config.json. Raises DataError on a damaged one, SpaceError on one that wants code to be run."""
    path = folder / CONFIG
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"model.folder: {path} is damaged ({error})") from None
    if not isinstance(found, dict) or not isinstance(found.get("model_type"), str):
        raise DataError(f"model.folder: {path} states no model_type, so nobody knows what to build")
    if "auto_map" in found:
        raise SpaceError(
            f"model.folder: {path} asks for code of its own to be run (auto_map), which is never done; use a model without"
        )
    kernels = [key for key, value in found.items() if "implementation" in key and "/" in str(value)]
    if kernels:
        raise SpaceError(
            f"model.folder: {path} asks for code from elsewhere ({kernels[0]}: {found[kernels[0]]}), which is never run"
        )
    return found


def exported(home: Path) -> Path | None:
    """The tokenizer's folder of an export, which also holds the model's configuration; None where `home` is no export."""
    return home / TOKENIZER if (home / TOKENIZER / CONFIG).is_file() else None


def place(home: Path, repository: str) -> Path:
    return home / "hub" / repository.replace("/", "--")


def hub(home: Path, repository: str, *, weights: bool, tokenizer: bool = True) -> Path:
    """The folder of a repository of the hub's, with what is asked for in it. Raises DataError when there is no network."""
    folder = place(home, repository)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(lock_of(folder)):
            _need(home, repository, folder, CONFIG)
            if tokenizer:
                for file in OPTIONAL:
                    _have(home, repository, folder, file)
                if not any(
                    all(_have(home, repository, folder, file) for file in files)
                    for files in VOCABULARIES
                ):
                    raise DataError(
                        f"model.name: {repository} has no tokenizer.json or vocabulary on the hub; give a model.folder"
                    )
            if weights and not _have(home, repository, folder, WEIGHTS):
                _shards(home, repository, folder)
    return folder


def _shards(home: Path, repository: str, folder: Path) -> None:
    if not _have(home, repository, folder, SHARDS):
        raise DataError(
            f"model.name: {repository} has no {WEIGHTS} on the hub, and other formats may run code; convert it to safetensors"
        )
    try:
        names = sorted(
            {str(name) for name in json.loads((folder / SHARDS).read_text())["weight_map"].values()}
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(
            f"model.name: {repository}: {SHARDS} is damaged; delete {folder / SHARDS} and what it points to"
        ) from None
    for name in names:
        if "/" in name or not name.endswith(".safetensors"):
            raise DataError(
                f"model.name: {repository}: {SHARDS} names {name!r}, which is no safetensors file beside it"
            )
        _need(home, repository, folder, name)


def _need(home: Path, repository: str, folder: Path, file: str) -> None:
    """Fetches a file, its SHA-256 pinned, and links it into the folder."""
    base = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    path = fetch(home, f"{base}/{repository}/resolve/main/{file}", name=f"{folder.name}--{file}")
    link = folder / file
    if not link.exists():
        removal.remove_dangling(link)
        link.symlink_to(os.path.relpath(path, folder))


def _have(home: Path, repository: str, folder: Path, file: str) -> bool:
    """Whether the repository has a file, which is fetched then; that it has none is remembered."""
    absent = folder / f".no-{file}"
    if absent.exists():
        return False
    try:
        _need(home, repository, folder, file)
    except DataError as error:
        if "HTTP Error 404" not in str(error):
            raise
        absent.touch()
        return False
    return True
