"""Input specs: how an example must look for a model's weights; images are normalised, texts are
token ids.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tuner.config.data_options import RgbTriple
from tuner.core.device_transfers import HostCopy, copies_asynchronously, send

TensorTree = Tensor | dict[str, Tensor]
"""What flows between stages: a tensor, or a flat dict of tensors by name.

Every tensor is batch-first.
"""


def tree_to_dict(tree: TensorTree) -> dict[str, Tensor]:
    """The tree as a dict; a bare tensor has the name ''."""
    return tree if isinstance(tree, dict) else {"": tree}


def relative_difference(expected: TensorTree, got: TensorTree) -> float:
    """The largest difference between two trees of equal names and shapes.

    It is relative to the largest absolute value that is expected, or to 1 where that is less.
    """
    pairs = [
        (value.float(), tree_to_dict(got)[name].float())
        for name, value in tree_to_dict(expected).items()
    ]
    return max(
        (
            float((a - b).abs().max()) / max(1.0, float(a.abs().max()))
            for a, b in pairs
            if a.numel()
        ),
        default=0.0,
    )


def begin_copy_to_cpu(tree: TensorTree) -> Callable[[], TensorTree]:
    """Begins to copy a tree to the CPU. The function that is returned waits for it and gives it.

    Tensors that are on the CPU already are not copied.
    """
    named = tree_to_dict(tree)
    copy = HostCopy({name: v for name, v in named.items() if copies_asynchronously(v.device)})
    others = {name: v.cpu() for name, v in named.items() if name not in copy.tensors}
    names, is_dict = list(named), isinstance(tree, dict)  # not the tree: it is on the device

    def wait() -> TensorTree:
        # not in page-locked memory, of which a machine has not much
        on_cpu = others | {name: value.clone() for name, value in copy.wait().items()}
        return {name: on_cpu[name] for name in names} if is_dict else on_cpu[""]

    return wait


class InputSpec(Protocol):
    """How the examples of a dataset become what a model's weights need.

    Equal reprs mean equal functions: keys of caches are made from the repr.
    """

    @property
    def max_length(self) -> int | None:
        """The most tokens an example can have; None for images."""

    def to_model_input(self, x: TensorTree, device: torch.device) -> TensorTree:
        """The inputs that a dataset's source gives, in the form that the first stage takes, on
        `device`.
        """

    def to_export_input(self, x: TensorTree) -> TensorTree:
        """The inputs that a dataset's source gives, in the form that an export takes."""

    def dummy_input(self, side: int | None = None) -> TensorTree:
        """One made-up example in the form that the first stage takes; an image has `side` x `side`
        pixels.
        """

    def normalisation(self) -> tuple[RgbTriple, RgbTriple] | None:
        """Mean and standard deviation of RGB that an export has inside; None for texts."""

    def to_dict(self) -> dict[str, Any]:
        """The spec as values for JSON; `input_spec_from_dict` reads it back."""

    def describe_input(self) -> dict[str, Any]:
        """The input of an export, as the manifest describes it."""

    def export_files(self) -> dict[str, Path]:
        """Files that an export needs beside the model: path by name in the export."""


@dataclass(frozen=True)
class ImageInputSpec:
    """How an image becomes a model's input: `size` x `size` pixels, RGB in 0..1, (x - mean) / std.

    Args:
        size: The side of the canvas in pixels.
        resize: The length of the image's shorter side in pixels before it is cropped.
        interpolation: bilinear or bicubic.
        mean: Of red, green and blue, in 0..1.
        std: Of red, green and blue, in 0..1.
        fit: crop resizes the shorter side to `resize` and takes the centre; letterbox resizes the
            longer side to `size` and pads; stretch resizes both sides to `size`.
        multiple: `size` must be a multiple of it.
        grey_bits: The bits of grey values in images that have more than 8, which become 8: those
            that the largest value of the dataset has. None: of each image alone.
        least_size: The least `size` that the model takes.
    """

    size: int
    resize: int
    interpolation: str
    mean: RgbTriple
    std: RgbTriple
    fit: str = "crop"
    multiple: int = 1
    grey_bits: int | None = None
    least_size: int = 1

    @property
    def max_length(self) -> int | None:
        return None

    def to_model_input(self, x: TensorTree, device: torch.device) -> TensorTree:
        """uint8 pixels (n, 3, size, size) as normalised float32, channels-last; anything else
        unchanged.
        """
        if not isinstance(x, Tensor) or x.dtype != torch.uint8:
            return x
        mean, std = (_channel_values(values, device) for values in (self.mean, self.std))
        pixels = send(x, device).contiguous(memory_format=torch.channels_last)
        return pixels.float().div_(255).sub_(mean).div_(std)

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


@functools.lru_cache(maxsize=64)
def _channel_values(values: RgbTriple, device: torch.device) -> Tensor:
    """A number for each channel, float32 (1, 3, 1, 1), made once: a copy for each batch would make
    the CPU wait for the GPU.
    """
    return torch.tensor(values, device=device).view(1, 3, 1, 1)


IMAGENET_SPEC = ImageInputSpec(224, 256, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class TextInputSpec:
    """How a text becomes a model's input: token ids, truncated and padded to `length` tokens.

    Sources give a dict of int64 (n, length) with the names `input_names`, which include `input_ids`
    and `attention_mask`.
    """

    tokenizer_folder: str  # has tokenizer.json and the other TOKENIZER_FILES
    length: int
    input_names: tuple[str, ...] = ("input_ids", "attention_mask")

    @property
    def max_length(self) -> int | None:
        return self.length

    def to_model_input(self, x: TensorTree, device: torch.device) -> TensorTree:
        assert isinstance(x, dict)
        return {name: send(tensor, device) for name, tensor in x.items()}

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


TOKENIZER_FOLDER = "tokenizer"  # in an export
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


def input_spec_from_dict(values: Mapping[str, Any], folder: Path) -> InputSpec:
    """The input spec that `InputSpec.to_dict` gave.

    Args:
        values: What `to_dict` gave, read from JSON.
        folder: The folder of the export, which has the tokenizer.
    """
    if values["kind"] == "tokens":
        tokenizer_folder = str(folder / TOKENIZER_FOLDER)
        return TextInputSpec(tokenizer_folder, values["length"], tuple(values["leaves"]))
    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in values.items()
        if key != "kind"
    }
    return ImageInputSpec(**fields)
