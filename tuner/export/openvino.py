"""OpenVINO's intermediate representation, a folder of its own with two files (extra `openvino`).

For CPUs, GPUs and NPUs of Intel's. It is made from the ONNX file, keeps float32, and has the same
names of inputs and outputs.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tuner.config.requirements import pip_install
from tuner.core.export_module import ExportModule
from tuner.core.input_spec import TensorTree
from tuner.errors import SpaceError
from tuner.export._onnx_files import OUTPUT_NAME, arrays_of, write_onnx
from tuner.files import removal

FILE = "openvino/model.xml"  # the weights lie beside it, in model.bin


def import_openvino() -> Any:
    """Raises SpaceError where openvino is missing."""
    try:
        import openvino
    except ModuleNotFoundError:
        raise SpaceError(f"export: openvino needs a package: {pip_install('openvino')}") from None
    return openvino


def check() -> None:
    """Raises SpaceError where openvino is missing; called before a search begins."""
    import_openvino()


def save(model: ExportModule, example: TensorTree, path: Path) -> None:
    openvino = import_openvino()
    path.parent.mkdir(exist_ok=True)
    with removal.scratch() as folder:
        graph = folder / "model.onnx"
        write_onnx(model, example, graph)
        openvino.save_model(openvino.convert_model(graph), path, compress_to_fp16=False)


def load(path: Path, blank: Callable[[], ExportModule]) -> Callable[[TensorTree], TensorTree]:
    """The export as a function, run by OpenVINO on the CPU in float32."""
    core = import_openvino().Core()
    compiled = core.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    names = [next(iter(output.names)) for output in compiled.outputs]

    def call(x: TensorTree) -> TensorTree:
        result = compiled(arrays_of(x))
        outputs = {name: torch.from_numpy(result[name].copy()) for name in names}
        return outputs[OUTPUT_NAME] if names == [OUTPUT_NAME] else outputs

    return call
