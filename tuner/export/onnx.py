"""ONNX with a free batch size, input `image` (or the token leaves by name) and output `output` (or the leaves by name)."""

import contextlib
import io
import logging
from collections.abc import Callable
from pathlib import Path

import torch

from tuner.core.export_module import Portable, free, tracing
from tuner.core.input_spec import Tree, leaves

FILE = "model.onnx"
INPUT, OUTPUT = "image", "output"  # names where there is only one


def save(model: Portable, example: Tree, path: Path) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with torch.no_grad():
        given = leaves(model(example))
    with tracing(), contextlib.redirect_stdout(io.StringIO()):  # the exporter prints its progress
        program = torch.onnx.export(
            model,
            kwargs={
                "x": example
            },  # by name: a dict that ends the positional arguments would be taken for keywords
            dynamo=True,
            verbose=False,
            input_names=[name or INPUT for name in leaves(example)],
            output_names=[name or OUTPUT for name in given],
            dynamic_shapes={"x": free(model, example)},
        )
    assert program is not None
    program.save(path, external_data=False)


def load(path: Path, blank: Callable[[], Portable]) -> Callable[[Tree], Tree]:
    """A function of what the export takes, carried out by onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def call(x: Tree) -> Tree:
        outputs = session.run(
            None, {name or INPUT: leaf.contiguous().numpy() for name, leaf in leaves(x).items()}
        )
        found = {
            name: torch.from_numpy(output) for name, output in zip(names, outputs, strict=True)
        }
        return found[OUTPUT] if names == [OUTPUT] else found

    return call
