"""Reads off the forward pass of a model as a list of steps, by torch.fx.

Each part of the model is one call, so that a part's own code stays as it is.
"""

import contextlib
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from tuner.models._graph_stage import Step, Value, run_step
from tuner.models._model_parts import ModelParts

# what reading a forward pass raises where it depends on numbers, or on the type of a tensor
TRACE_ERRORS = (
    fx.proxy.TraceError,
    RuntimeError,
    TypeError,
    ValueError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
)


class UncutModel(Exception):
    """A model cannot be cut; the message is the reason in words."""


@dataclass(frozen=True)
class ForwardPass:
    """A model's forward pass as steps. The input has the name `x`; the last step is the output.

    `dropouts` are modules that the model has not: it calls a function instead.
    """

    model: nn.Module
    steps: tuple[Step, ...]
    dropouts: Mapping[str, nn.Module] = field(default_factory=dict)

    def find(self, path: str) -> Any:
        """The module, parameter or buffer at a path."""
        return self.dropouts.get(path) or operator.attrgetter(path)(self.model)

    def infer_shapes(self, shape: Sequence[int], device: torch.device) -> dict[str, Any]:
        """The result of every step for an input of this shape, by name: tensors without numbers.

        Raises UncutModel where the steps do not take such an input.
        """
        # a meta model has no numbers already
        on_meta = device.type == "meta"
        mode = contextlib.nullcontext() if on_meta else FakeTensorMode(allow_non_fake_inputs=True)
        try:
            with mode, torch.no_grad():
                values: dict[str, Any] = {"x": torch.zeros(tuple(shape), device=device)}
                for step in self.steps:
                    values[step.name] = run_step(step, values, self.find)
        except TRACE_ERRORS as error:
            raise UncutModel(f"what was read of its forward pass fails ({_first_line(error)})")  # noqa: B904
        return values


def read_forward_pass(
    model: nn.Module, parts: ModelParts, functions: Sequence[Callable[..., Any]]
) -> ForwardPass:
    """The forward pass of a model.

    Args:
        model: The model.
        parts: The parts that are called as a whole.
        functions: Functions that are called as a whole.

    Raises:
        UncutModel: It cannot be read, or is another one while the model trains.
    """
    evaluating, training = (_trace(model, parts, functions, mode) for mode in (False, True))
    if list(map(repr, evaluating.steps)) != list(map(repr, training.steps)):
        raise UncutModel("its forward pass is another one while it trains")
    return evaluating


def _trace(
    model: nn.Module,
    parts: ModelParts,
    functions: Sequence[Callable[..., Any]],
    training: bool,
) -> ForwardPass:
    modes = {each: each.training for each in model.modules()}
    model.train(training)
    try:
        graph = _PartTracer(parts.holders(), functions).trace(_Caller(model))
    except TRACE_ERRORS as error:
        raise UncutModel(f"its forward pass cannot be read ({_first_line(error)})") from None
    finally:
        for each, mode in modes.items():
            each.training = mode
    nodes = [node for node in graph.nodes if node.op != "placeholder"]
    dropouts: dict[str, nn.Module] = {}
    return ForwardPass(model, tuple(_to_step(node, dropouts) for node in nodes), dropouts)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


class _Caller(nn.Module):
    """Calls a model with one argument, so that its other arguments have their defaults."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Any) -> Any:
        return self.model(x)


class _PartTracer(fx.Tracer):
    """Enters only the modules around the parts; every other module is one call."""

    proxy_buffer_attributes = True

    def __init__(self, holders: Collection[str], functions: Sequence[Callable[..., Any]]) -> None:
        super().__init__(autowrap_functions=tuple(functions))
        self.holders = holders

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name.removeprefix("model").removeprefix(".") not in self.holders


def _to_step(node: fx.Node, dropouts: dict[str, nn.Module]) -> Step:
    """A node of fx as a step. A call of the function dropout becomes a module in `dropouts`.

    So the mode of the stage decides whether it drops, as the mode of the model does in its own
    forward pass.
    """
    args, kwargs = fx.node.map_arg(
        (node.args, dict(node.kwargs)),
        lambda n: Value(n.name),  # type: ignore[arg-type, return-value]
    )
    if node.op == "output":
        return Step("output", "function", _same, args)
    if node.op in ("call_module", "get_attr"):
        path = str(node.target).removeprefix("model.")
        if node.op == "get_attr":
            return Step(node.name, "parameter", path)
        return Step(node.name, "module", path, args, kwargs)
    if node.op == "call_method":
        return Step(node.name, "method", str(node.target), args, kwargs)
    assert callable(node.target)
    if node.target is F.dropout:
        rate = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
        dropouts[node.name] = nn.Dropout(float(rate))
        return Step(node.name, "module", node.name, (kwargs.get("input") or args[0],))
    return Step(node.name, "function", node.target, args, kwargs)


def _same(value: Any) -> Any:
    return value
