"""ONNX with a free batch size, input `image` and output `output`, for onnxruntime and whatever else reads ONNX."""

import contextlib
import io
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from tuner.core import Normalised

FILE = "model.onnx"


def save(model: Normalised, example: Tensor, path: Path) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):  # the exporter prints its progress
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            verbose=False,
            input_names=["image"],
            output_names=["output"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=65_536)},),
        )
    assert program is not None
    program.save(path, external_data=False)


def load(path: Path, blank: Callable[[], nn.Module]) -> Callable[[Tensor], Tensor]:
    """A function of RGB in 0..1, carried out by onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def call(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"image": x.contiguous().numpy()})[0])

    return call
