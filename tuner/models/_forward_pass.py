"""Reads off the forward pass of a model as a list of calls, by torch.fx.

Each unit of the model is one call, so that a unit's own code stays as it is.
"""

import contextlib
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from tuner.models._graph_stage import Call, Value, run_call
from tuner.models._model_units import ModelUnits

BATCH = 1009  # examples of a pass without numbers: a prime that is no size of a model
# methods beside `forward` that are one call too, because they look at sizes or make tensors: those
# of timm's rotary positions
OPAQUE_METHODS = ("get_embed",)
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


def fake_tensors(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Inside the block tensors have sizes and no numbers. Those of the meta device have none."""
    if device.type == "meta":
        return contextlib.nullcontext()
    return FakeTensorMode(allow_non_fake_inputs=True)


@dataclass(frozen=True)
class ForwardPass:
    """A model's forward pass as calls. The input has the name `x`; the last call is the output.

    `dropouts` are modules that the model has not: it calls a function instead.
    """

    model: nn.Module
    calls: tuple[Call, ...]
    dropouts: Mapping[str, nn.Module] = field(default_factory=dict)

    def find(self, path: str) -> Any:
        """The module, parameter or buffer at a path; a method after a colon."""
        return self.dropouts.get(path) or operator.attrgetter(path.replace(":", "."))(self.model)

    def infer_shapes(self, shape: Sequence[int], device: torch.device) -> dict[str, Any]:
        """The result of every call for an input of this shape, by name: tensors without numbers.

        Raises UncutModel where the calls do not take such an input.
        """
        try:
            with fake_tensors(device), torch.no_grad():
                values: dict[str, Any] = {"x": torch.zeros(tuple(shape), device=device)}
                for call in self.calls:
                    values[call.name] = run_call(call, values, self.find)
        except TRACE_ERRORS as error:
            reason = f"what was read of its forward pass fails ({_first_line(error)})"
            raise UncutModel(reason) from None
        return values


def read_forward_pass(
    model: nn.Module,
    units: ModelUnits,
    functions: Sequence[Callable[..., Any]],
    example: Tensor | None = None,
) -> ForwardPass:
    """The forward pass of a model.

    Args:
        model: The model.
        units: The units that are called as a whole.
        functions: Functions that are called as a whole.
        example: An input. With it the sizes of all tensors but the number of examples are those
            of this input; so a pass can be read that looks at sizes, and it takes no others.

    Raises:
        UncutModel: It cannot be read, or is another one while the model trains.
    """
    evaluating, training = (
        _trace(model, units, functions, example, mode) for mode in (False, True)
    )
    if list(map(repr, evaluating.calls)) != list(map(repr, training.calls)):
        raise UncutModel("its forward pass is another one while it trains")
    return evaluating


def _trace(
    model: nn.Module,
    units: ModelUnits,
    functions: Sequence[Callable[..., Any]],
    example: Tensor | None,
    training: bool,
) -> ForwardPass:
    modes = {each: each.training for each in model.modules()}
    model.train(training)
    tracer = _UnitTracer(units.holders(), functions)
    if example is not None:
        tracer = _SizedTracer(units.holders(), functions, model, example)
    try:
        with opaque_methods(model, tracer):
            graph = tracer.trace(_Caller(model))
    except TRACE_ERRORS as error:
        raise UncutModel(f"its forward pass cannot be read ({_first_line(error)})") from None
    finally:
        for each, mode in modes.items():
            each.training = mode
    nodes = [node for node in graph.nodes if node.op != "placeholder"]
    dropouts: dict[str, nn.Module] = {}
    return ForwardPass(model, tuple(_to_call(node, dropouts) for node in nodes), dropouts)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


class _Caller(nn.Module):
    """Calls a model with one argument, so that its other arguments have their defaults."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Any) -> Any:
        return self.model(x)


class _UnitTracer(fx.Tracer):
    """Enters only the modules around the units; every other module is one call."""

    proxy_buffer_attributes = True

    def __init__(self, holders: Collection[str], functions: Sequence[Callable[..., Any]]) -> None:
        super().__init__(autowrap_functions=tuple(functions))
        self.holders = holders
        self.is_computing = False  # whether a call is carried out while the pass is read

    def method_call(self, target: str, module: nn.Module, name: str) -> Callable[..., Any]:
        """What stands for a method while the pass is read."""
        method = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.is_computing:
                return method(*args, **kwargs)
            return self.create_proxy("call_module", target, args, kwargs)

        return call

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name.removeprefix("model").removeprefix(".") not in self.holders


@contextlib.contextmanager
def opaque_methods(model: nn.Module, tracer: "_UnitTracer") -> Iterator[None]:
    """Inside the block a call of one of OPAQUE_METHODS becomes one call of the pass."""
    patched = []
    for path, module in model.named_modules():
        for name in OPAQUE_METHODS:
            if hasattr(module, name):
                setattr(module, name, tracer.method_call(f"model.{path}:{name}", module, name))
                patched.append((module, name))
    try:
        yield
    finally:
        for module, name in patched:
            delattr(module, name)


class _SizedTracer(_UnitTracer):
    """Reads the pass for one size of the input, and computes the sizes of all results on the way.

    A size that is a multiple of BATCH is taken for the number of examples, and stays open.
    """

    def __init__(
        self,
        holders: Collection[str],
        functions: Sequence[Callable[..., Any]],
        model: nn.Module,
        example: Tensor,
    ) -> None:
        super().__init__(holders, functions)
        self.forward_pass, self.example = ForwardPass(model, ()), example
        self.values: dict[str, Any] = {}
        self.mode = fake_tensors(example.device)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _SizedProxy(node, self)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self.is_computing:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        if self.is_computing:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_proxy(self, kind: str, *args: Any, **kwargs: Any) -> Any:
        proxy: Any = super().create_proxy(kind, *args, **kwargs)
        if kind == "output":
            return proxy
        self.is_computing = True
        try:
            with self.mode, torch.no_grad():
                value = self._compute(proxy.node)
        finally:
            self.is_computing = False
        self.values[proxy.node.name] = value
        return value if _is_plain(value) else proxy

    def _compute(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return torch.zeros(BATCH, *self.example.shape[1:], device=self.example.device)
        dropouts: dict[str, nn.Module] = {}
        call = _to_call(node, dropouts)
        forward_pass = ForwardPass(self.forward_pass.model, (), dropouts)
        return run_call(call, self.values, forward_pass.find)


def _is_plain(value: Any) -> bool:
    """Whether a result is one number, or several, that do not depend on the number of examples."""
    if isinstance(value, tuple | list):
        return bool(value) and all(map(_is_plain, value))
    return (
        isinstance(value, int) and not isinstance(value, bool) and (value == 0 or value % BATCH > 0)
    )


class _SizedProxy(fx.Proxy):
    """A result whose size is known while the pass is read."""

    def _value(self) -> Any:
        return self.tracer.values[self.node.name]  # type: ignore[attr-defined]

    @property
    def shape(self) -> Any:
        return tuple(self.size(i) for i in range(self._value().dim()))

    @property
    def ndim(self) -> int:
        return int(self._value().dim())

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        if dim is None:
            return self.shape
        side = self._value().shape[dim]
        if side == 0 or side % BATCH:
            return side
        return self.tracer.create_proxy("call_method", "size", (self, dim), {})

    @property
    def device(self) -> Any:
        """That of a weight, so that what is made there does not depend on the input."""
        model = self.tracer.forward_pass.model  # type: ignore[attr-defined]
        name = next(name for name, _ in model.named_parameters())
        weight = self.tracer.create_proxy("get_attr", f"model.{name}", (), {})
        return self.tracer.create_proxy("call_function", getattr, (weight, "device"), {})

    def __iter__(self) -> Any:
        value = self._value()
        if isinstance(value, tuple | list):
            own: Any = self  # fx gives proxies their operators while it is imported
            return iter([own[i] for i in range(len(value))])
        return super().__iter__()

    def __len__(self) -> int:
        return len(self._value())


def _to_call(node: fx.Node, dropouts: dict[str, nn.Module]) -> Call:
    """A node of fx as a call. A call of the function dropout becomes a module in `dropouts`.

    So the mode of the stage decides whether it drops, as the mode of the model does in its own
    forward pass.
    """
    args, kwargs = fx.node.map_arg(
        (node.args, dict(node.kwargs)),
        lambda n: Value(n.name),  # type: ignore[arg-type, return-value]
    )
    if node.op == "output":
        return Call("output", "function", _same, args)
    if node.op in ("call_module", "get_attr"):
        path = str(node.target).removeprefix("model.")
        if node.op == "get_attr":
            return Call(node.name, "parameter", path)
        return Call(node.name, "module", path, args, kwargs)
    if node.op == "call_method":
        return Call(node.name, "method", str(node.target), args, kwargs)
    assert callable(node.target)
    if node.target is F.dropout:
        rate: Any = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
        dropouts[node.name] = nn.Dropout(float(rate))
        return Call(node.name, "module", node.name, (kwargs.get("input") or args[0],))
    return Call(node.name, "function", node.target, args, kwargs)


def _same(value: Any) -> Any:
    return value
