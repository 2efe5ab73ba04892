"""Cuts a model that takes one tensor into stages, whatever library it is from.

1. The structure of the modules shows the units (`_model_units`).
2. torch.fx reads off the forward pass, with each unit as one call.
3. Between two units the pass is cut where the fewest numbers cross: behind a pooling, before a
   dropout. What crosses must be tensors of one row for each example.
4. The stages are run on an example, and compared with the model. Only then they are believed.

A model whose forward pass cannot be read is cut between its features and its head, where the
library has methods for them (`forward_features`, `forward_head`), or not at all. Then a reason says
why.
"""

import contextlib
import copy
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tuner.core.input_spec import TensorTree
from tuner.errors import limit_listing
from tuner.models._forward_pass import BATCH, ForwardPass, UncutModel, read_forward_pass
from tuner.models._graph_stage import Call, GraphStage
from tuner.models._model_units import ModelUnits, find_units, weight_count

MAX_CROSSING = 4  # tensors between two stages
CANNOT_CROSS = "other things than tensors of one row for each example"


def cut_model(
    model: nn.Module,
    example: Tensor,
    *,
    heads: Collection[str] = (),
    opaque_functions: Sequence[Callable[..., Any]] = (),
    sized: bool = False,
) -> tuple[dict[str, nn.Module], str | None]:
    """The stages of a model by name: the stem, the units of its trunk, and the head.

    Args:
        model: The model. Its modules are used, not copied.
        example: One input, (1, channels, height, width), on the device of the model.
        heads: The paths of the model's classifiers; see `find_units`.
        opaque_functions: Functions that are called as a whole, because they look at numbers.
        sized: Whether the stages may take images of the example's size alone. So more models can
            be cut, whose forward passes look at sizes.

    Returns:
        At least two stages; and None, or in words why there are not more of them.

    Raises:
        UncutModel: The model cannot be cut.
    """
    units = find_units(model, heads)
    forward_pass = read_forward_pass(model, units, opaque_functions, example if sized else None)
    with eval_mode(model):
        values = forward_pass.infer_shapes((BATCH, *example.shape[1:]), example.device)
    stages, joined = _make_stages(forward_pass, units, values)
    if len(stages) < 2:
        raise UncutModel(f"between its units pass {CANNOT_CROSS}")
    compare_stages(model, stages, example)
    if not joined:
        return stages, None
    listed = ", ".join(limit_listing(joined, 4))
    return stages, f"before these units it is not cut: {listed}; {CANNOT_CROSS} pass there"


@contextlib.contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; at its end every module gets its earlier mode back."""
    modes = {each: each.training for each in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for each, mode in modes.items():
            each.training = mode


@torch.no_grad()
def compare_stages(
    model: nn.Module,
    stages: Mapping[str, nn.Module],
    example: TensorTree,
    forward: Callable[[nn.Module, TensorTree], TensorTree] | None = None,
) -> None:
    """Runs the stages in a row, and the model.

    Args:
        model: The model.
        stages: The stages by name.
        example: The input of the first stage.
        forward: Calls the model on it, where that is not model(x).

    Raises:
        UncutModel: The outputs differ, or a weight is in no stage or in two.
    """
    # the stages may have modules that the model has not: dropouts
    with eval_mode(nn.ModuleList([model, *stages.values()])):
        y: Any = example
        for stage in stages.values():
            y = stage(y)
        expected = forward(model, example) if forward else model(example)
    is_equal = (
        isinstance(expected, Tensor)
        and y.shape == expected.shape
        and (y.is_meta or torch.equal(y, expected))
    )
    if not is_equal:
        raise UncutModel("its units in a row do not compute what it computes")
    for kind in (nn.Module.parameters, nn.Module.buffers):
        own = sorted(id(value) for value in kind(model))
        inside = sorted(id(value) for stage in stages.values() for value in kind(stage))
        if own != inside:
            raise UncutModel("two of its units share weights")


# -- the places of the cuts


@dataclass(frozen=True)
class _Stretch:
    """The calls from the first to the last call of a unit, or of units that cannot be told apart.

    `weights` are the ids of its parameters.
    """

    name: str
    first: int
    last: int
    weights: frozenset[int]

    def overlaps(self, later: "_Stretch") -> bool:
        """Whether calls interleave, or weights are shared: then there is no cut between the two."""
        return later.first <= self.last or bool(self.weights & later.weights)

    def join(self, later: "_Stretch") -> "_Stretch":
        """Both as one."""
        last = max(self.last, later.last)
        return _Stretch(self.name, self.first, last, self.weights | later.weights)


def _make_stages(
    forward_pass: ForwardPass, units: ModelUnits, values: Mapping[str, Any]
) -> tuple[dict[str, nn.Module], list[str]]:
    """The stages between the best places of the cuts; and the units before which there is none."""
    flow = _Flow(forward_pass.calls, values)
    stretches = _find_stretches(forward_pass, units, flow)
    names, ends, joined = [stretches[0].name], [], []
    for before, after in itertools.pairwise(stretches):
        end = flow.best_cut(before.last, after.first, forward_pass)
        if end is None:
            if "x" not in flow.crossing(before.last):  # several layers that see the image are one
                joined.append(after.name)
        else:
            names.append(after.name)
            ends.append(end)
    bounds = [-1, *ends, len(forward_pass.calls) - 1]
    stages: dict[str, nn.Module] = {}
    owned: set[int] = set()
    for name, begin, end in zip(_shorten(names), bounds[:-1], bounds[1:], strict=True):
        calls = flow.calls_between(begin, end)
        inputs, outputs = flow.crossing(begin), flow.crossing(end)
        stages[name] = _make_stage(forward_pass, calls, inputs, outputs, owned)
    _add_unused(forward_pass.model, stages, owned)
    return stages, joined


def _find_stretches(forward_pass: ForwardPass, units: ModelUnits, flow: "_Flow") -> list[_Stretch]:
    """The stem, the units of the trunk and what has weights behind it, and the head, in order."""
    places: dict[str, list[int]] = {}
    for i, call in enumerate(forward_pass.calls):
        if call.kind != "module" or call.name not in flow.made_at:
            continue
        unit = units.unit_of(str(call.target).partition(":")[0])
        if unit is not None and (weight_count(_holder(forward_pass, unit)) or unit in units.heads):
            places.setdefault(unit, []).append(i)
    in_order = sorted(places, key=lambda unit: places[unit][0])
    start = next((i for i, unit in enumerate(in_order) if unit in units.trunk), 0)
    stretches: list[_Stretch] = []
    for number, unit in enumerate(in_order):
        name = "stem" if number < start else "head" if unit in units.heads else unit
        weights = frozenset(map(id, _holder(forward_pass, unit).parameters()))
        new = _Stretch(name, places[unit][0], places[unit][-1], weights)
        while stretches and (
            any(earlier.overlaps(new) for earlier in stretches)
            or stretches[-1].name == new.name  # two modules of the stem, or two classifiers
        ):
            new = stretches.pop().join(new)
        stretches.append(new)
    if not stretches:
        raise UncutModel("none of its modules has weights")
    return stretches


def _holder(forward_pass: ForwardPass, path: str) -> nn.Module:
    found = forward_pass.find(path)
    assert isinstance(found, nn.Module)
    return found


def _shorten(names: Sequence[str]) -> list[str]:
    """Paths as names of stages: blocks.0 as blocks0, a.b.layer1 as layer1 where this is unique."""
    short = []
    for name in names:
        *outer, last = name.split(".")
        short.append(f"{outer[-1]}{last}" if last.isdigit() and outer else last)
    if len(set(short)) < len(short):
        short = [name.replace(".", "_") for name in names]
    return [*short[:-1], "head"]


class _Flow:
    """Which results cross each place of a forward pass.

    A place is the index of the call before it. Results that do not depend on the input cross
    nothing: each stage computes those that it needs.
    """

    def __init__(self, calls: Sequence[Call], values: Mapping[str, Any]) -> None:
        self.calls, self.values = calls, values
        self.made_at = {"x": -1}
        self.last_use: dict[str, int] = {}
        for i, call in enumerate(calls):
            used = call.used_values()
            if any(name in self.made_at for name in used):
                self.made_at[call.name] = i
            self.last_use |= dict.fromkeys(used, i)

    def crossing(self, place: int) -> dict[str, int | None]:
        """The names of the results that cross a place, as GraphStage takes them."""
        if place == len(self.calls) - 1:
            return {self.calls[-1].name: None}
        names = [
            name
            for name, made in self.made_at.items()
            if made <= place < self.last_use.get(name, -1)
        ]
        return {name: _list_length(self.values[name]) for name in names}

    def best_cut(self, begin: int, end: int, forward_pass: ForwardPass) -> int | None:
        """The last of the places where the fewest numbers cross, from `begin` up to before `end`.

        It is never behind a dropout: what is frozen drops nothing. None where nothing else than
        tensors of one row for each example may cross, and something does.
        """
        best, fewest = None, float("inf")
        for place in range(begin, end):
            call = self.calls[place]
            if call.kind == "module" and place > begin:
                module = forward_pass.find(str(call.target))
                if isinstance(module, nn.Dropout | nn.Dropout2d):
                    break
            numbers = self._count_numbers(place)
            if numbers is not None and numbers <= fewest:
                best, fewest = place, numbers
        return best

    def _count_numbers(self, place: int) -> int | None:
        """The numbers that cross a place; None where it cannot be cut."""
        names = self.crossing(place)
        tensors: list[Any] = []
        for name, length in names.items():
            value = self.values[name]
            tensors += [value] if length is None else list(value)
        fits = all(isinstance(t, Tensor) and t.dim() and t.shape[0] == BATCH for t in tensors)
        if not fits or "x" in names or not 0 < len(tensors) <= MAX_CROSSING:
            return None
        return sum(int(tensor.numel()) for tensor in tensors)

    def calls_between(self, begin: int, end: int) -> list[Call]:
        """The calls after place `begin` up to `end`, and the constant ones that they need."""
        needed = {
            i
            for i, call in enumerate(self.calls)
            if begin < i <= end and (call.name in self.made_at or i == len(self.calls) - 1)
        }
        for i in range(end, -1, -1):
            if i not in needed:
                continue
            for name in self.calls[i].used_values():
                if name not in self.made_at:
                    needed.add(self._index(name))
        return [self.calls[i] for i in sorted(needed)]

    def _index(self, name: str) -> int:
        return next(i for i, call in enumerate(self.calls) if call.name == name)


def _list_length(value: Any) -> int | None:
    return len(value) if isinstance(value, list | tuple) else None


def _make_stage(
    forward_pass: ForwardPass,
    calls: Sequence[Call],
    inputs: dict[str, int | None],
    outputs: dict[str, int | None],
    owned: set[int],
) -> GraphStage:
    """A stage of `calls`.

    `owned` has the ids of the modules and weights of the stages before it, and gets its own.
    """
    own: dict[str, Any] = {}
    shared: dict[str, Any] = {}
    for call in calls:
        if call.kind not in ("module", "parameter"):
            continue
        path = str(call.target).partition(":")[0]
        value = forward_pass.find(path)
        ids = set(map(id, _weights(value)))
        if ids and ids <= owned and path not in own:
            shared[path] = value
        elif not ids and id(value) in owned and path not in own:
            # such as a dropout that is called twice: each stage has its own mode
            own[path] = copy.deepcopy(value)
        else:
            own.setdefault(path, value)
    for value in own.values():
        owned |= {id(value), *map(id, _weights(value))}
    return GraphStage(calls, inputs, outputs, own, shared)


def _weights(value: Any) -> list[Tensor]:
    """The parameters and buffers of a module, or the one that `value` is."""
    if isinstance(value, nn.Module):
        return [*value.parameters(), *value.buffers()]
    return [value]


def _add_unused(model: nn.Module, stages: Mapping[str, nn.Module], owned: set[int]) -> None:
    """Gives the first stage the weights that the forward pass never uses, so that all have one."""
    first = next(iter(stages.values()))
    for path, parameter in model.named_parameters():
        if id(parameter) not in owned:
            first.register_parameter(path.replace(".", "_"), parameter)
    for path, buffer in model.named_buffers():
        if id(buffer) not in owned:
            first.register_buffer(path.replace(".", "_"), buffer)
