"""ONNX with weights and computation in float16: half the size. Inputs and outputs stay float32.

It is for GPUs and phones that compute in float16; on most CPUs it is not faster. Its outputs differ
from the model's in the third digit, so it is published where the validation score holds.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tuner.core.export_module import ExportModule
from tuner.core.input_spec import TensorTree
from tuner.export._onnx_files import open_onnx, write_onnx

FILE = "model_fp16.onnx"
LOSSY = True


def save(model: ExportModule, example: TensorTree, path: Path) -> None:
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    write_onnx(model, example, path)
    halved: Any = convert_float_to_float16(
        onnx.load(path), keep_io_types=True, disable_shape_infer=True
    )
    onnx.save(halved, path)


def load(path: Path, blank: Callable[[], ExportModule]) -> Callable[[TensorTree], TensorTree]:
    """The export as a function, run by onnxruntime on the CPU."""
    return open_onnx(path)
