"""ONNX with a free batch size.

The input is called `image`, or each of several inputs by its name in the tensor tree; the output
is called `output`, or each of several outputs by its name.
"""

from collections.abc import Callable
from pathlib import Path

from tuner.core.export_module import ExportModule
from tuner.core.input_spec import TensorTree
from tuner.export._onnx_files import open_onnx, write_onnx

FILE = "model.onnx"


def save(model: ExportModule, example: TensorTree, path: Path) -> None:
    write_onnx(model, example, path)


def load(path: Path, blank: Callable[[], ExportModule]) -> Callable[[TensorTree], TensorTree]:
    """The export as a function, run by onnxruntime on the CPU."""
    return open_onnx(path)
