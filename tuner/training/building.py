"""What a run names, built: its data, its task, its model."""

import copy
import hashlib
import inspect
from pathlib import Path

import torch
from torch import Tensor, nn

from tuner.config import plugins
from tuner.config.run import Part, Run
from tuner.core.input_spec import IMAGENET, Wanted
from tuner.core.types import Batch, Data, Source, Staged, Task, cut
from tuner.errors import SpaceError
from tuner.training import activation_cache
from tuner.training.devices import Place

FRESH = 0  # seed of parameters that no weights are given for
MODELS = 4  # kept ready in a process


def task_of(run: Run, classes: tuple[str, ...]) -> Task:
    task: Task = plugins.attribute("task", run.task.name)(classes, run.recipe, **run.task.options)
    return task


_loaded: dict[str, Data] = {}


def load(run: Run, home: Path) -> Data:
    """The run's data; kept for the next run of this process that names the same, one a fold."""
    wanted = wants(run.model, home)
    options = {k: v for k, v in run.data.options.items() if k != "fold"}
    name, fold = (
        f"{run.task.name} {run.data.name} {options} {wanted} {home}",
        run.data.options.get("fold", 0),
    )
    if not any(known.startswith(name) for known in _loaded):
        _loaded.clear()  # one data set per process is what a study needs
    key = f"{name} {fold}"
    if key not in _loaded:
        arguments = plugins.keys("data", run.data.name).arguments(run.data.options)
        _loaded[key] = plugins.attribute("data", run.data.name)(
            home, wanted, run.task.name, **arguments
        )
    return _loaded[key]


def wants(model: Part, home: Path | None = None) -> Wanted:
    """How the model's weights want their examples; ImageNet's way for a model of the user's own.

    What a family must fetch to know, such as a tokenizer, it keeps in `home`; without one nothing is fetched.
    """
    if ":" in model.name:
        return IMAGENET
    module = plugins.module("model", model.name)
    known = inspect.signature(module.wants).parameters
    options = {"home": home, **model.options}
    found: Wanted = module.wants(model.name, **{k: v for k, v in options.items() if k in known})
    return found


def built(run: Run, place: Place, outputs: int) -> tuple[Staged, tuple[str, ...]]:
    """The run's model, and a name for what each stage gives there, as `cache.names_of` has them.

    A model is built and named once per process and copied for each run: that is a trial's start, and workers wait for it.
    """
    key = f"{run.task.name} {run.model.tree()} {outputs} {place.home} {place.precision} {place.device.type}"
    if key not in _built:
        if len(_built) >= MODELS:
            _built.clear()
        staged = build(run, place.home, outputs)
        _built[key] = (
            staged,
            activation_cache.names_of(
                list(staged.stages.values()), f"3 {place.precision} {place.device.type}"
            ),
        )
    staged, names = _built[key]
    return copy.deepcopy(staged), names


_built: dict[str, tuple[Staged, tuple[str, ...]]] = {}


def build(run: Run, home: Path, outputs: int) -> Staged:
    """The run's model. Fresh parameters are drawn alike in every run: trials differ by what they train with."""
    torch.manual_seed(FRESH)
    name, options = run.model.name, dict(run.model.options)
    make = plugins.attribute("model", name)
    if ":" not in name:
        staged: Staged = make(home, name, run.task.name, outputs, **options)
        return staged
    try:
        made = make(outputs, **options)
    except Exception as error:  # whatever the user's factory raises is theirs to read
        raise SpaceError(
            f"model.name: {name}: calling it with the number of classes failed ({type(error).__name__}: {error})"
        ) from error
    if isinstance(made, Staged):
        return made
    if not isinstance(made, nn.Module):
        raise SpaceError(
            f"model.name: {name} returned {type(made).__name__}; expected an nn.Module or a tuner.core.types.Staged"
        )
    return cut(made)


class Ready:
    """A source on the device, as the model wants it."""

    def __init__(self, source: Source, wanted: Wanted, place: Place) -> None:
        self.source, self.wanted, self.device = source, wanted, place.device
        self.views, self.lengths = source.views, source.lengths
        self.digest = hashlib.sha256(
            f"{source.digest} {wanted.normalisation()}".encode()
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
        return Batch(self.wanted.ready(x, self.device), truth)
