"""Builds what a run names: its task, its data and its model; data and models are kept for the next
run of the process.
"""

import copy
import hashlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tuner.config import plugins
from tuner.config.run import PluginConfig, Run
from tuner.core.device_transfers import copies_asynchronously, send
from tuner.core.input_spec import (
    IMAGENET_SPEC,
    ImageInputSpec,
    InputSpec,
    TensorTree,
    TextInputSpec,
)
from tuner.core.subset import Subset
from tuner.core.types import (
    Batch,
    Dataset,
    ResidentSource,
    Source,
    StagedModel,
    Task,
    split_sequential,
)
from tuner.errors import SpaceError, TunerError
from tuner.preprocessing.image_dataset import augment_on
from tuner.preprocessing.tokenization import trim_padding
from tuner.training.devices import DeviceContext
from tuner.training.frozen_prefix import stage_digests

FRESH_SEED = 0  # of parameters for which there are no weights
MAX_CACHED_MODELS = 4  # in a process


def build_task(
    run: Run,
    classes: tuple[str, ...],
    class_counts: Tensor | None = None,
    train_targets: Callable[[], Tensor] | None = None,
) -> Task:
    """The run's task for these classes.

    A task gets the last two where its `build` has arguments of these names.

    Args:
        run: The run that names the task.
        classes: The names of the classes, labels or targets.
        class_counts: int64 (classes,), how many training examples each class has.
        train_targets: Gives the targets of all training examples, float (n, targets).
    """
    build = plugins.load_plugin("task", run.task.name)
    options, arguments = dict(run.task.options), inspect.signature(build).parameters
    if class_counts is not None and "class_counts" in arguments:
        options["class_counts"] = class_counts
    if train_targets is not None and "train_targets" in arguments:
        options["train_targets"] = train_targets()
    task: Task = build(classes, run.recipe, **options)
    return task


def check_metric(run: Run, classes: tuple[str, ...], metric: str) -> None:
    """Raises SpaceError where a built-in task does not define its metric for these classes."""
    defined = build_task(run, classes).metrics
    if metric in plugins.list_metrics(run.task.name) and metric not in defined:
        raise SpaceError(
            f"search.metric: {metric} says nothing with {len(classes)} classes; choose one of "
            f"{', '.join(defined)}"
        )


_loaded_datasets: dict[str, Dataset] = {}


def load_dataset(run: Run, home: Path) -> Dataset:
    """The run's data. All folds of one dataset stay loaded for the next run of this process.

    Raises:
        DataError: The data cannot be used.
        SpaceError: The data section does not fit the data.
    """
    input_spec = input_spec_of(run.model, home)
    options = {key: value for key, value in run.data.options.items() if key != "fold"}
    dataset_key = f"{run.task.name} {run.data.name} {options} {input_spec} {home}"
    if not any(key.startswith(dataset_key) for key in _loaded_datasets):
        _loaded_datasets.clear()  # a study needs one dataset per process
    key = f"{dataset_key} {run.data.options.get('fold', 0)}"
    if key not in _loaded_datasets:
        arguments = plugins.read_keys("data", run.data.name).to_arguments(run.data.options)
        load = plugins.load_plugin("data", run.data.name)
        _loaded_datasets[key] = load(home, input_spec, run.task.name, **arguments)
    return _loaded_datasets[key]


def input_spec_of(model: PluginConfig, home: Path | None = None) -> InputSpec:
    """The input spec of the model's weights, as `input_spec` in the family's file returns it.

    The file of a user's own model may have an `input_spec` too. It is called without a model name.
    A model of the user's own without it gets IMAGENET_SPEC. A family may have to download a file to
    know its input spec, such as a tokenizer. The file is kept in `home`; without a `home` nothing
    is downloaded.
    """
    options = {"home": home, **model.options}
    if ":" in model.name:
        return _own_input_spec(model.name, options)
    module = plugins.import_plugin("model", model.name)
    input_spec: InputSpec = _call_with_known(module.input_spec, options, model.name)
    return input_spec


def _own_input_spec(name: str, options: Mapping[str, Any]) -> InputSpec:
    """Raises SpaceError where the user's `input_spec` fails or returns something else."""
    describe = plugins.read_own_attribute("model", name, "input_spec", None)
    if describe is None:
        return IMAGENET_SPEC
    where = f"model.name: {name}: input_spec in the same module"
    try:
        input_spec = _call_with_known(describe, options)
    except TunerError:
        raise  # it has its own words and its own exit code
    except Exception as error:  # whatever the user's function raises is theirs to read
        raise SpaceError(f"{where} failed ({type(error).__name__}: {error})") from error
    if not isinstance(input_spec, (ImageInputSpec, TextInputSpec)):
        raise SpaceError(
            f"{where} returned {type(input_spec).__name__}; "
            "expected a tuner.api.ImageInputSpec or TextInputSpec"
        )
    return input_spec


def _call_with_known(function: Callable[..., Any], options: Mapping[str, Any], *names: str) -> Any:
    """Calls a function with those options that it has as parameters."""
    known = inspect.signature(function).parameters
    return function(*names, **{key: value for key, value in options.items() if key in known})


def copy_cached_model(
    run: Run, device_context: DeviceContext, output_count: int
) -> tuple[StagedModel, tuple[str, ...]]:
    """The run's model, and the digest of each stage, as `stage_digests` gives them.

    A model is built and its digests are computed once per process; each run gets a copy. A trial
    begins with this, and workers wait for it.
    """
    computed_by = f"{device_context.precision} {device_context.device.type}"
    key = (
        f"{run.task.name} {run.model.to_dict()} {run.data.options.get('size')} {output_count} "
        f"{device_context.home} {computed_by} {run.recipe.adapters is not None}"
    )
    if key not in _cached_models:
        if len(_cached_models) >= MAX_CACHED_MODELS:
            _cached_models.clear()
        staged_model = build_model(run, device_context.home, output_count)
        stages = list(staged_model.stages.values())
        digests = stage_digests(stages, f"3 {computed_by}")
        _cached_models[key] = staged_model, digests
    staged_model, digests = _cached_models[key]
    return copy.deepcopy(staged_model), digests


_cached_models: dict[str, tuple[StagedModel, tuple[str, ...]]] = {}


def build_model(run: Run, home: Path, output_count: int) -> StagedModel:
    """The run's model. Fresh parameters are equal in every run, so that trials differ by their
    recipes only.

    Args:
        run: The run that names model and task.
        home: Where weights are kept and downloaded to.
        output_count: The number of the model's outputs, such as classes.

    Raises:
        SpaceError: The options do not fit the model, or a user's own factory fails.
        DataError: The weights are missing, damaged or of another model.
    """
    torch.manual_seed(FRESH_SEED)
    name, options = run.model.name, dict(run.model.options)
    build = plugins.load_plugin("model", name)
    if ":" not in name:
        size, known = run.data.options.get("size"), inspect.signature(build).parameters
        if size is not None and "size" in known:
            options["size"] = size  # some models are made for one size of images
        if run.recipe.adapters is not None and "own_precision" in known:
            options["own_precision"] = True  # what stays as it is needs no more digits
        staged_model: StagedModel = build(home, name, run.task.name, output_count, **options)
        return staged_model
    try:
        model = build(output_count, **options)
    except Exception as error:  # a user's own factory may raise anything, and the user must read it
        raise SpaceError(
            f"model.name: {name}: calling it with the number of classes failed "
            f"({type(error).__name__}: {error})"
        ) from error
    if isinstance(model, StagedModel):
        return model
    if not isinstance(model, nn.Module):
        raise SpaceError(
            f"model.name: {name} returned {type(model).__name__}; expected an nn.Module or a "
            "tuner.api.StagedModel"
        )
    return split_sequential(model)


class DeviceSource:
    """A source whose examples are on the device and have the form that the model takes.

    Images are augmented there too. `endless`: where the source has several views, this one takes
    another one in each epoch. `resident`: the memory of a GPU keeps images that fit.
    """

    def __init__(
        self,
        source: Source,
        input_spec: InputSpec,
        device_context: DeviceContext,
        *,
        endless: bool = False,
        resident: bool = False,
    ) -> None:
        self.input_spec, self.device = input_spec, device_context.device
        self.source = augment_on(source, device_context.device, resident=resident)
        self.views = None if endless and source.views != 1 else source.views
        self.lengths = source.lengths
        self.digest = hashlib.sha256(
            f"{source.digest} {input_spec.normalisation()}".encode()
        ).hexdigest()

    def __len__(self) -> int:
        return len(self.source)

    def take(self, index: Tensor, view: int) -> Batch:
        x, y = self.source.take(index, view)
        if copies_asynchronously(self.device):
            x = trim_padding(x)  # while the lengths can still be read without waiting for the GPU
        if isinstance(y, Tensor):
            targets: TensorTree = send(y, self.device)
        else:
            targets = {name: send(tensor, self.device) for name, tensor in y.items()}
        return Batch(self.input_spec.to_model_input(x, self.device), targets)

    def is_resident(self, view: int) -> bool:
        return isinstance(self.source, ResidentSource) and self.source.is_resident(view)


def put_on_device(source: Source, input_spec: InputSpec, device_context: DeviceContext) -> Source:
    """`source` as a DeviceSource. A subset stays one, of a whole that is on the device."""
    on_device = DeviceSource(source, input_spec, device_context)
    if not isinstance(source, Subset):
        return on_device
    whole = DeviceSource(source.whole, input_spec, device_context)
    return Subset(whole, source.rows, on_device.digest)
