"""Opens exported models: the model as a module without its weights, or an export as a function."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tuner.config import plugins
from tuner.config.run import PluginConfig
from tuner.core.export_module import ExportModule
from tuner.core.input_spec import (
    ImageInputSpec,
    TensorTree,
    begin_copy_to_cpu,
    input_spec_from_dict,
    tree_to_dict,
)
from tuner.core.target_scale import TargetScale
from tuner.errors import SpaceError, StorageError
from tuner.manifest import PublishedExport
from tuner.training.building import build_model

CPU = torch.device("cpu")
FORMAT_OF_ANY_DEVICE = "safetensors"


def load_exporter(name: str) -> Any:
    """What has FILE, save and load: a module of export/, or an object of the user's own."""
    if ":" in name:
        return plugins.load_plugin("export", name)
    return plugins.import_plugin("export", name)


def model_without_weights(published: PublishedExport) -> ExportModule:
    """The exported model, built from its manifest with fresh parameters."""
    manifest = published.manifest
    input_spec = input_spec_from_dict(manifest["preprocess"], published.folder)
    run = published.run.without_weights()
    if isinstance(input_spec, ImageInputSpec):  # the weights, which are gone, may have stated it
        data = PluginConfig(run.data.name, {**run.data.options, "size": input_spec.size})
        run = replace(run, data=data)
    staged_model = build_model(run, published.folder, len(manifest["classes"]))
    # an export of an earlier version has no temperature and no target scale
    scale = manifest.get("target_scale")
    target_scale = None if scale is None else TargetScale.from_dict(scale)
    return ExportModule(staged_model, input_spec, manifest.get("temperature"), target_scale)


def open_weights(published: PublishedExport) -> ExportModule:
    """The exported model with its weights, in eval mode on the CPU."""
    model = model_without_weights(published)
    entry = published.manifest["exports"][FORMAT_OF_ANY_DEVICE]
    load_exporter(FORMAT_OF_ANY_DEVICE).restore(published.folder / entry["file"], model)
    return model.eval()


def select_prediction_device(name: str, export_format: str) -> torch.device:
    """The device on which a format of an export computes.

    Args:
        name: cpu, cuda, or auto: a GPU where there is one and the format can use it.
        export_format: The format. safetensors alone is a module that can be on any device.

    Raises:
        SpaceError: There is no such device, or the format cannot use it.
        StorageError: There is no GPU.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise SpaceError(f"--device {name!r}: use auto, cpu or cuda")
    can_use_gpu = export_format == FORMAT_OF_ANY_DEVICE
    if name == "cuda" and not can_use_gpu:
        raise SpaceError(
            f"--device cuda: {export_format} runs on the CPU; use --format {FORMAT_OF_ANY_DEVICE}"
        )
    if name == "cuda" and not torch.cuda.is_available():
        raise StorageError(
            f"--device cuda: torch {torch.__version__} sees no GPU here; use auto or cpu"
        )
    use_gpu = name != "cpu" and can_use_gpu and torch.cuda.is_available()
    return torch.device("cuda" if use_gpu else "cpu")


def open_export(
    published: PublishedExport, name: str, device: torch.device = CPU
) -> Callable[[TensorTree], TensorTree]:
    """Opens one format of an export.

    Args:
        published: The export.
        name: The format, such as "onnx".
        device: Where it computes. Its inputs and outputs are on the CPU.

    Returns:
        A function from any number of examples, as `InputSpec.to_export_input` gives them, to the
        model's output. Every tensor is batch-first.
    """
    entry = published.manifest["exports"][name]
    function: Callable[[TensorTree], TensorTree] = load_exporter(name).load(
        published.folder / entry["file"], lambda: model_without_weights(published)
    )
    if isinstance(function, ExportModule):
        function = compute_on(device, function)
    return function if entry.get("batched", True) else apply_one_by_one(function)


def compute_on(device: torch.device, module: ExportModule) -> Callable[[TensorTree], TensorTree]:
    """A function of examples on the CPU that computes on `device`."""
    if device.type == "cpu":
        return module
    on_device = module.to(device)

    def apply(x: TensorTree) -> TensorTree:
        if isinstance(x, Tensor):
            return begin_copy_to_cpu(on_device(x.to(device)))()
        inputs = {name: tensor.to(device) for name, tensor in x.items()}
        return begin_copy_to_cpu(on_device(inputs))()

    return apply


def apply_one_by_one(
    function: Callable[[TensorTree], TensorTree],
) -> Callable[[TensorTree], TensorTree]:
    """Makes a function of any number of examples out of a function of one example."""

    def apply_to_all(x: TensorTree) -> TensorTree:
        count = len(next(iter(tree_to_dict(x).values())))
        outputs = [tree_to_dict(function(slice_rows(x, slice(i, i + 1)))) for i in range(count)]
        joined = {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]}
        return joined[""] if set(joined) == {""} else joined

    return apply_to_all


def slice_rows(x: TensorTree, rows: slice) -> TensorTree:
    """Some examples of a batch."""
    return {name: tensor[rows] for name, tensor in x.items()} if isinstance(x, dict) else x[rows]
