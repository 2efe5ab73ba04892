"""ONNX in 8-bit integers: a quarter of the size, and faster on CPUs that have such instructions.

Static quantization (Jacob et al., Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference, CVPR 2018): the ranges of all activations are measured on
CALIBRATION_EXAMPLES validation examples and then fixed; weights have a scale for each channel. Its
outputs differ from the model's, so it is published where the validation score holds.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tuner.core.export_module import ExportModule
from tuner.core.input_spec import TensorTree, tree_to_dict
from tuner.export._onnx_files import arrays_of, open_onnx, write_onnx
from tuner.files import removal

FILE = "model_int8.onnx"
LOSSY = True
CALIBRATION_EXAMPLES = 128  # validation examples that `save` gets


class CalibrationReader:
    """Gives the calibration one example after another, as onnxruntime asks for them."""

    def __init__(self, examples: TensorTree) -> None:
        self.examples, self.next = examples, 0
        self.count = len(next(iter(tree_to_dict(examples).values())))

    def get_next(self) -> dict[str, Any] | None:
        if self.next == self.count:
            return None
        rows = slice(self.next, self.next + 1)
        self.next += 1
        return {name: array[rows] for name, array in arrays_of(self.examples).items()}


def save(model: ExportModule, example: TensorTree, path: Path) -> None:
    """Quantizes the model; `example` are the examples on which ranges are measured."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    logging.getLogger().setLevel(logging.ERROR)  # it recommends what is done here already
    with removal.scratch() as folder:
        as_float, prepared = folder / "float.onnx", folder / "prepared.onnx"
        write_onnx(model, example, as_float)
        quant_pre_process(str(as_float), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(path),
            CalibrationReader(example),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )


def load(path: Path, blank: Callable[[], ExportModule]) -> Callable[[TensorTree], TensorTree]:
    """The export as a function, run by onnxruntime on the CPU."""
    return open_onnx(path)
