"""ONNX with a free batch size, input `image` (or the token leaves by name) and output `output` (or the leaves by name)."""

import contextlib
import io
import logging
from collections.abc import Callable
from pathlib import Path

import torch

from tuner.core.export_module import ExportModule, dynamic_shapes, quiet_export
from tuner.core.input_spec import TensorTree, tree_to_dict

FILE = "model.onnx"
INPUT_NAME, OUTPUT_NAME = "image", "output"  # names where there is only one


def save(model: ExportModule, example: TensorTree, path: Path) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with torch.no_grad():
        given = tree_to_dict(model(example))
    with (
        quiet_export(),
        contextlib.redirect_stdout(io.StringIO()),
    ):  # the exporter prints its progress
        program = torch.onnx.export(
            model,
            kwargs={
                "x": example
            },  # by name: a dict that ends the positional arguments would be taken for keywords
            dynamo=True,
            verbose=False,
            input_names=[name or INPUT_NAME for name in tree_to_dict(example)],
            output_names=[name or OUTPUT_NAME for name in given],
            dynamic_shapes={"x": dynamic_shapes(model, example)},
        )
    assert program is not None
    program.save(path, external_data=False)


def load(path: Path, blank: Callable[[], ExportModule]) -> Callable[[TensorTree], TensorTree]:
    """A function of what the export takes, carried out by onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def call(x: TensorTree) -> TensorTree:
        outputs = session.run(
            None,
            {
                name or INPUT_NAME: leaf.contiguous().numpy()
                for name, leaf in tree_to_dict(x).items()
            },
        )
        found = {
            name: torch.from_numpy(output) for name, output in zip(names, outputs, strict=True)
        }
        return found[OUTPUT_NAME] if names == [OUTPUT_NAME] else found

    return call
