"""The Hugging Face hub: its address, and model folders in its layout.

A model folder holds a configuration, weights and a tokenizer. It is the user's own, part of an
export, or downloaded from the hub. No code from such a folder is ever run: weights are read from
safetensors only, and a configuration that points to code is refused.
"""

import json
import os
from pathlib import Path
from typing import Any

from tuner.core.input_spec import TOKENIZER_FOLDER
from tuner.core.weights import fetch_weights
from tuner.errors import DataError, SpaceError, nearest_path_hint
from tuner.files import removal
from tuner.files.atomic import disk_errors, file_lock, lock_path
from tuner.preprocessing.tokenization import without_transformers

HUB_REPOSITORIES = {
    "bert": "google-bert/bert-base-uncased",
    "distilbert": "distilbert/distilbert-base-uncased",
    "roberta": "FacebookAI/roberta-base",
    "gpt2": "openai-community/gpt2",
}
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
SHARD_INDEX_FILE = "model.safetensors.index.json"
# a fast tokenizer can be made from any of these sets of files
VOCABULARY_FILES = (("tokenizer.json",), ("vocab.txt",), ("vocab.json", "merges.txt"))
OPTIONAL_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def import_transformers() -> Any:
    """The package transformers.

    Raises:
        SpaceError: It is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise without_transformers() from None
    return transformers


def check_own_folder(folder: str, name: str) -> Path:
    """The path of the user's own folder.

    Args:
        folder: As the user writes it.
        name: The model's name in the space file.

    Raises:
        DataError: The folder does not exist or has no configuration, or this is damaged.
        SpaceError: It holds another kind of model than the name states, or asks for code.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        if root.is_file():
            raise DataError(f"model.folder: {folder} is a file; give the folder that it lies in")
        hint = nearest_path_hint(root, folders_only=True)
        raise DataError(f"model.folder: {folder} does not exist{hint}")
    if not (root / CONFIG_FILE).is_file():
        raise DataError(
            f"model.folder: {folder} has no {CONFIG_FILE}; it needs {CONFIG_FILE}, {WEIGHTS_FILE} "
            "and tokenizer.json, as save_pretrained writes"
        )
    kind = read_config(root).get("model_type")
    if name in HUB_REPOSITORIES and kind != name:
        raise SpaceError(
            f"model.name: {name}, but {folder} holds a model of type {kind}; write model.name: "
            f"{kind if kind in HUB_REPOSITORIES else 'hf/own'}"
        )
    return root


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json.

    Raises:
        DataError: It is damaged.
        SpaceError: It asks for code to be run.
    """
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"model.folder: {path} is damaged ({error})") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise DataError(f"model.folder: {path} states no model_type, so nobody knows what to build")
    if "auto_map" in config:
        raise SpaceError(
            f"model.folder: {path} asks for code of its own to be run (auto_map), which is never "
            "done; use a model without"
        )
    kernels = [
        key for key, value in config.items() if "implementation" in key and "/" in str(value)
    ]
    if kernels:
        raise SpaceError(
            f"model.folder: {path} asks for code from elsewhere ({kernels[0]}: "
            f"{config[kernels[0]]}), which is never run"
        )
    return config


def export_tokenizer_folder(home: Path) -> Path | None:
    """The tokenizer's folder of an export, which also holds the model's configuration.

    None where `home` is not an export.
    """
    return home / TOKENIZER_FOLDER if (home / TOKENIZER_FOLDER / CONFIG_FILE).is_file() else None


def hub_url(repository: str, file: str, revision: str = "main") -> str:
    """The address of a file on the hub, or on the mirror of it that `HF_ENDPOINT` names."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    return f"{endpoint}/{repository}/resolve/{revision}/{file}"


def hub_folder(home: Path, repository: str) -> Path:
    """Where the downloaded files of a repository of the hub lie."""
    return home / "hub" / repository.replace("/", "--")


def fetch_hub_folder(home: Path, repository: str, *, weights: bool, tokenizer: bool = True) -> Path:
    """Download files of a repository of the hub, unless they are there, and return their folder.

    Args:
        home: The folder of caches and downloads.
        repository: Owner and name.
        weights: Download the weights too.
        tokenizer: Download the tokenizer too.

    Raises:
        DataError: There is no network, or the repository lacks a file.
    """
    folder = hub_folder(home, repository)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with file_lock(lock_path(folder)):
            _fetch_file(home, repository, folder, CONFIG_FILE)
            if tokenizer:
                for file in OPTIONAL_FILES:
                    _try_fetch_file(home, repository, folder, file)
                if not any(
                    all(_try_fetch_file(home, repository, folder, file) for file in files)
                    for files in VOCABULARY_FILES
                ):
                    raise DataError(
                        f"model.name: {repository} has no tokenizer.json or vocabulary on the "
                        "hub; give a model.folder"
                    )
            if weights and not _try_fetch_file(home, repository, folder, WEIGHTS_FILE):
                _fetch_shards(home, repository, folder)
    return folder


def _fetch_shards(home: Path, repository: str, folder: Path) -> None:
    if not _try_fetch_file(home, repository, folder, SHARD_INDEX_FILE):
        raise DataError(
            f"model.name: {repository} has no {WEIGHTS_FILE} on the hub, and other formats may "
            "run code; convert it to safetensors"
        )
    try:
        index = json.loads((folder / SHARD_INDEX_FILE).read_text())
        names = sorted({str(name) for name in index["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(
            f"model.name: {repository}: {SHARD_INDEX_FILE} is damaged; delete "
            f"{folder / SHARD_INDEX_FILE} and what it points to"
        ) from None
    for name in names:
        if "/" in name or not name.endswith(".safetensors"):
            raise DataError(
                f"model.name: {repository}: {SHARD_INDEX_FILE} names {name!r}, which is no "
                "safetensors file beside it"
            )
        _fetch_file(home, repository, folder, name)


def _fetch_file(home: Path, repository: str, folder: Path, file: str) -> None:
    """Download a file, pin its SHA-256, and link the file into the folder."""
    path = fetch_weights(home, hub_url(repository, file), name=f"{folder.name}--{file}")
    link = folder / file
    if not link.exists():
        removal.remove_dangling(link)
        link.symlink_to(os.path.relpath(path, folder))


def _try_fetch_file(home: Path, repository: str, folder: Path, file: str) -> bool:
    """Download a file if the repository has it, and return whether it has.

    An empty file `.no-…` notes that the repository has none, so that it is asked only once.
    """
    absent = folder / f".no-{file}"
    if absent.exists():
        return False
    try:
        _fetch_file(home, repository, folder, file)
    except DataError as error:
        if "HTTP Error 404" not in str(error):
            raise
        absent.touch()
        return False
    return True
