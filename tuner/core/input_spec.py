"""What a model's weights want of an example, and how it gets there: pixels normalised, texts as token ids."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tuner.config.run import RgbTriple

TensorTree = Tensor | dict[str, Tensor]
"""What flows between stages: a tensor or a flat dict of tensors, every leaf batch-first."""


def tree_to_dict(tree: TensorTree) -> dict[str, Tensor]:
    """The tree as a dict; a bare tensor is the leaf named ''."""
    return tree if isinstance(tree, dict) else {"": tree}


class InputSpec(Protocol):
    """How the examples of a data set become what a model's weights want. Its repr names it: equal repr, equal function."""

    @property
    def max_length(self) -> int | None:
        """The most tokens an example can have; None for images."""

    def to_model_input(self, x: TensorTree, device: torch.device) -> TensorTree:
        """What a source gives, as the first stage takes it, on `device`."""

    def to_export_input(self, x: TensorTree) -> TensorTree:
        """What a source gives, as an export takes it."""

    def dummy_input(self, side: int | None = None) -> TensorTree:
        """One made-up example as the first stage takes it; images `side` pixels square."""

    def normalisation(self) -> tuple[RgbTriple, RgbTriple] | None:
        """Mean and standard deviation that an export holds inside; None where nothing is normalised."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON keeps it; `wanted_of` reads it back."""

    def describe_input(self) -> dict[str, Any]:
        """An export's input: what the manifest tells who ships the model."""

    def export_files(self) -> dict[str, Path]:
        """Files that travel with an export, by their name there."""


@dataclass(frozen=True)
class ImageInputSpec:
    """How an image becomes a model's input: brought to `size` x `size` pixels, RGB in 0..1, (x - mean) / std.

    `fit`: crop resizes the shorter side to `resize` and takes the centre; letterbox resizes the longer side to `size` and pads.
    `multiple`: what the model wants `size` to be a multiple of.
    """

    size: int
    resize: int
    interpolation: str
    mean: RgbTriple
    std: RgbTriple
    fit: str = "crop"
    multiple: int = 1

    @property
    def max_length(self) -> int | None:
        return None

    def to_model_input(self, x: TensorTree, device: torch.device) -> TensorTree:
        """uint8 pixels as normalised float32, channels-last; anything else as it is."""
        if not isinstance(x, Tensor) or x.dtype != torch.uint8:
            return x
        mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return (
            x.to(device)
            .contiguous(memory_format=torch.channels_last)
            .float()
            .div_(255)
            .sub_(mean)
            .div_(std)
        )

    def to_export_input(self, x: TensorTree) -> TensorTree:
        assert isinstance(x, Tensor)
        return x.float() / 255

    def dummy_input(self, side: int | None = None) -> TensorTree:
        return torch.zeros(1, 3, side or self.size, side or self.size)

    def normalisation(self) -> tuple[RgbTriple, RgbTriple] | None:
        return self.mean, self.std

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "image", **asdict(self)}

    def describe_input(self) -> dict[str, Any]:
        return {
            "shape": ["batch", 3, self.size, self.size],
            "dtype": "float32",
            "range": "RGB in 0..1; normalised inside the model",
        }

    def export_files(self) -> dict[str, Path]:
        return {}


IMAGENET_SPEC = ImageInputSpec(224, 256, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class TextInputSpec:
    """How a text becomes a model's input: token ids by the tokenizer in a folder, cut and padded to `length`.

    Sources give dicts of int64 (n, length), `input_ids` and `attention_mask` among them, as `leaves` lists them.
    """

    tokenizer_folder: str  # holds tokenizer.json and its kin
    length: int
    input_names: tuple[str, ...] = ("input_ids", "attention_mask")

    @property
    def max_length(self) -> int | None:
        return self.length

    def to_model_input(self, x: TensorTree, device: torch.device) -> TensorTree:
        assert isinstance(x, dict)
        return {name: leaf.to(device) for name, leaf in x.items()}

    def to_export_input(self, x: TensorTree) -> TensorTree:
        return x

    def dummy_input(self, side: int | None = None) -> TensorTree:
        return {name: torch.ones(1, self.length, dtype=torch.int64) for name in self.input_names}

    def normalisation(self) -> tuple[RgbTriple, RgbTriple] | None:
        return None

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "tokens", "length": self.length, "leaves": list(self.input_names)}

    def describe_input(self) -> dict[str, Any]:
        return {
            "leaves": list(self.input_names),
            "shape": ["batch", f"at most {self.length} tokens"],
            "dtype": "int64",
        }

    def export_files(self) -> dict[str, Path]:
        return {
            f"{TOKENIZER_FOLDER}/{path.name}": path
            for path in sorted(Path(self.tokenizer_folder).iterdir())
            if path.name in TOKENIZER_FILES
        }


TOKENIZER_FOLDER = "tokenizer"  # an export's folder for it
TOKENIZER_FILES = {
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "config.json",
}


def input_spec_from_dict(tree: Mapping[str, Any], folder: Path) -> InputSpec:
    """What `Wanted.tree` gave, beside an export in `folder`."""
    if tree["kind"] == "tokens":
        return TextInputSpec(str(folder / TOKENIZER_FOLDER), tree["length"], tuple(tree["leaves"]))
    fields: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in tree.items() if k != "kind"
    }
    return ImageInputSpec(**fields)
