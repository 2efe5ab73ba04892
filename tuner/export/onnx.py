"""ONNX with a free batch size.

The input is called `image`, or each of several inputs by its name in the tensor tree; the output
is called `output`, or each of several outputs by its name.
"""

import contextlib
import io
import logging
from collections.abc import Callable
from pathlib import Path

import torch

from tuner.core.export_module import ExportModule, dynamic_shapes, quiet_export
from tuner.core.input_spec import TensorTree, tree_to_dict

FILE = "model.onnx"
INPUT_NAME, OUTPUT_NAME = "image", "output"  # if there is only one


def save(model: ExportModule, example: TensorTree, path: Path) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with torch.no_grad():
        outputs = tree_to_dict(model(example))
    # the exporter prints its progress
    with quiet_export(), contextlib.redirect_stdout(io.StringIO()):
        program = torch.onnx.export(
            model,
            # by name: torch takes a dict at the end of the positional arguments for keywords
            kwargs={"x": example},
            dynamo=True,
            verbose=False,
            input_names=[name or INPUT_NAME for name in tree_to_dict(example)],
            output_names=[name or OUTPUT_NAME for name in outputs],
            dynamic_shapes={"x": dynamic_shapes(model, example)},
        )
    assert program is not None
    program.save(path, external_data=False)


def load(path: Path, blank: Callable[[], ExportModule]) -> Callable[[TensorTree], TensorTree]:
    """The export as a function, run by onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def call(x: TensorTree) -> TensorTree:
        inputs = {
            name or INPUT_NAME: tensor.contiguous().numpy()
            for name, tensor in tree_to_dict(x).items()
        }
        arrays = session.run(None, inputs)
        outputs = {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}
        return outputs[OUTPUT_NAME] if names == [OUTPUT_NAME] else outputs

    return call
