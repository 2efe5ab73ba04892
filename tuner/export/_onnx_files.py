"""What the formats share that are made of an ONNX file: how one is written, and how one is run."""

import contextlib
import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tuner.core.export_module import ExportModule, dynamic_shapes, quiet_export
from tuner.core.input_spec import TensorTree, tree_to_dict

INPUT_NAME, OUTPUT_NAME = "image", "output"  # if there is only one


def write_onnx(model: ExportModule, example: TensorTree, path: Path) -> None:
    """Writes a model with a free batch size."""
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


def arrays_of(x: TensorTree) -> dict[str, Any]:
    """Examples as an ONNX session takes them: an array by the name of each input."""
    return {name or INPUT_NAME: t.contiguous().numpy() for name, t in tree_to_dict(x).items()}


def open_onnx(path: Path) -> Callable[[TensorTree], TensorTree]:
    """An ONNX file as a function, run by onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def call(x: TensorTree) -> TensorTree:
        arrays = session.run(None, arrays_of(x))
        outputs = {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}
        return outputs[OUTPUT_NAME] if names == [OUTPUT_NAME] else outputs

    return call
