"""What a run names, built: its data, its task, its model."""

import copy
import hashlib
import inspect
from pathlib import Path

import torch
from torch import Tensor, nn

from tuner.config import plugins
from tuner.config.run import PluginConfig, Run
from tuner.core.input_spec import IMAGENET_SPEC, InputSpec
from tuner.core.types import Batch, Dataset, Source, StagedModel, Task, split_sequential
from tuner.errors import SpaceError
from tuner.training import activation_cache
from tuner.training.devices import DeviceContext

FRESH_SEED = 0  # seed of parameters that no weights are given for
MAX_CACHED_MODELS = 4  # kept ready in a process


def build_task(run: Run, classes: tuple[str, ...]) -> Task:
    task: Task = plugins.load_plugin("task", run.task.name)(classes, run.recipe, **run.task.options)
    return task


_loaded_datasets: dict[str, Dataset] = {}


def load_dataset(run: Run, home: Path) -> Dataset:
    """The run's data; kept for the next run of this process that names the same, one a fold."""
    wanted = input_spec_of(run.model, home)
    options = {k: v for k, v in run.data.options.items() if k != "fold"}
    name, fold = (
        f"{run.task.name} {run.data.name} {options} {wanted} {home}",
        run.data.options.get("fold", 0),
    )
    if not any(known.startswith(name) for known in _loaded_datasets):
        _loaded_datasets.clear()  # one data set per process is what a study needs
    key = f"{name} {fold}"
    if key not in _loaded_datasets:
        arguments = plugins.read_keys("data", run.data.name).to_arguments(run.data.options)
        _loaded_datasets[key] = plugins.load_plugin("data", run.data.name)(
            home, wanted, run.task.name, **arguments
        )
    return _loaded_datasets[key]


def input_spec_of(model: PluginConfig, home: Path | None = None) -> InputSpec:
    """How the model's weights need their examples: what `input_spec` in the family's file returns.

    A model of the user's own may have `input_spec` beside it. It is called without a model name, and
    without it the model gets its examples as models of ImageNet do. What a family must download to
    know its input spec, such as a tokenizer, it keeps in `home`; without `home` nothing is downloaded.
    """
    if ":" in model.name:
        describe = plugins.read_own_attribute("model", model.name, "input_spec", None)
        names: tuple[str, ...] = ()
    else:
        describe, names = plugins.import_plugin("model", model.name).input_spec, (model.name,)
    if describe is None:
        return IMAGENET_SPEC
    known = inspect.signature(describe).parameters
    options = {"home": home, **model.options}
    input_spec: InputSpec = describe(*names, **{k: v for k, v in options.items() if k in known})
    return input_spec


def copy_cached_model(
    run: Run, device_context: DeviceContext, output_count: int
) -> tuple[StagedModel, tuple[str, ...]]:
    """The run's model, and a name for what each stage gives there, as `cache.names_of` has them.

    A model is built and named once per process and copied for each run: that is a trial's start, and workers wait for it.
    """
    key = f"{run.task.name} {run.model.to_dict()} {output_count} {device_context.home} {device_context.precision} {device_context.device.type}"
    if key not in _cached_models:
        if len(_cached_models) >= MAX_CACHED_MODELS:
            _cached_models.clear()
        staged = build_model(run, device_context.home, output_count)
        _cached_models[key] = (
            staged,
            activation_cache.stage_digests(
                list(staged.stages.values()),
                f"3 {device_context.precision} {device_context.device.type}",
            ),
        )
    staged, names = _cached_models[key]
    return copy.deepcopy(staged), names


_cached_models: dict[str, tuple[StagedModel, tuple[str, ...]]] = {}


def build_model(run: Run, home: Path, output_count: int) -> StagedModel:
    """The run's model. Fresh parameters are drawn alike in every run: trials differ by what they train with."""
    torch.manual_seed(FRESH_SEED)
    name, options = run.model.name, dict(run.model.options)
    make = plugins.load_plugin("model", name)
    if ":" not in name:
        staged: StagedModel = make(home, name, run.task.name, output_count, **options)
        return staged
    try:
        made = make(output_count, **options)
    except Exception as error:  # whatever the user's factory raises is theirs to read
        raise SpaceError(
            f"model.name: {name}: calling it with the number of classes failed ({type(error).__name__}: {error})"
        ) from error
    if isinstance(made, StagedModel):
        return made
    if not isinstance(made, nn.Module):
        raise SpaceError(
            f"model.name: {name} returned {type(made).__name__}; expected an nn.Module or a tuner.api.StagedModel"
        )
    return split_sequential(made)


class DeviceSource:
    """A source on the device, as the model wants it."""

    def __init__(
        self, source: Source, input_spec: InputSpec, device_context: DeviceContext
    ) -> None:
        self.source, self.input_spec, self.device = source, input_spec, device_context.device
        self.views, self.lengths = source.views, source.lengths
        self.digest = hashlib.sha256(
            f"{source.digest} {input_spec.normalisation()}".encode()
        ).hexdigest()

    def __len__(self) -> int:
        return len(self.source)

    def take(self, index: Tensor, view: int) -> Batch:
        x, y = self.source.take(index, view)
        truth = (
            y.to(self.device)
            if isinstance(y, Tensor)
            else {name: leaf.to(self.device) for name, leaf in y.items()}
        )
        return Batch(self.input_spec.to_model_input(x, self.device), truth)
