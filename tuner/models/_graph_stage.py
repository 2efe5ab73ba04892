"""A stage that repeats a stretch of a model's forward pass: its modules, and what is done between.

The forward pass is a list of calls, read off by torch.fx (Reed et al., torch.fx: Practical Program
Capture and Transformation for Deep Learning in Python, MLSys 2022). A stage keeps its calls as
data, so it can be copied with its model and sent to other processes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, fx, nn

from tuner.core.input_spec import TensorTree


@dataclass(frozen=True)
class Value:
    """The result of an earlier call, as an argument."""

    name: str

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Call:
    """One call of a forward pass.

    Args:
        name: Of the result.
        kind: What is called: a module, a function, or a method of the first argument; or
            `parameter`, which calls nothing and reads a parameter or buffer.
        target: The path of the module or parameter, the function, or the name of the method. A
            module's path may end with a colon and the name of a method to call instead of it.
        args: The arguments; a Value where it is the result of an earlier call.
        kwargs: The arguments by name.
    """

    name: str
    kind: Literal["module", "parameter", "function", "method"]
    target: str | Callable[..., Any]
    args: Any = ()
    kwargs: Any = None

    def used_values(self) -> list[str]:
        """The names of the results that this call uses."""
        names: list[str] = []
        fx.node.map_aggregate((self.args, self.kwargs or {}), lambda a: _note_value(a, names))
        return names

    def __repr__(self) -> str:
        target = self.target if isinstance(self.target, str) else self.target.__name__
        return f"{self.name} = {self.kind} {target}{self.args}{self.kwargs or ''}"


def _note_value(argument: Any, names: list[str]) -> Any:
    if isinstance(argument, Value):
        names.append(argument.name)
    return argument


def run_call(call: Call, values: Mapping[str, Any], owner: Callable[[str], Any]) -> Any:
    """The result of a call.

    Args:
        call: The call.
        values: The results of the calls before it, by name.
        owner: Gives the module or parameter at a path.
    """
    args = _fill(call.args, values)
    kwargs = _fill(call.kwargs or {}, values)
    if call.kind == "parameter":
        return owner(str(call.target))
    if call.kind == "module":
        return owner(str(call.target))(*args, **kwargs)
    if call.kind == "method":
        return getattr(args[0], str(call.target))(*args[1:], **kwargs)
    assert callable(call.target)
    return call.target(*args, **kwargs)


def _fill(argument: Any, values: Mapping[str, Any]) -> Any:
    """An argument with the results in the place of their names. A list is a new one: a module may
    change it.
    """
    if isinstance(argument, Value):
        return values[argument.name]
    if isinstance(argument, tuple):
        return tuple(_fill(each, values) for each in argument)
    if isinstance(argument, list):
        return [_fill(each, values) for each in argument]
    if isinstance(argument, dict):
        return {key: _fill(each, values) for key, each in argument.items()}
    if isinstance(argument, slice):
        ends = (argument.start, argument.stop, argument.step)
        return slice(*(_fill(end, values) for end in ends))
    return argument


class GraphStage(nn.Module):
    """Consecutive calls of a model's forward pass.

    A value that enters or leaves is a tensor, or a list of tensors that travel under names of their
    own. One value alone that is a tensor travels as it is.

    Args:
        calls: The calls in order.
        inputs: The names of the values that enter, with the number of tensors of a list, or None
            for a tensor.
        outputs: The same of the values that leave.
        owned: The modules, parameters and buffers of the stage, by path.
        shared: Those that belong to an earlier stage and are used here too, such as a table of
            positions. They are trained and frozen with the earlier one.
    """

    def __init__(
        self,
        calls: Sequence[Call],
        inputs: Mapping[str, int | None],
        outputs: Mapping[str, int | None],
        owned: Mapping[str, Any],
        shared: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.calls, self.inputs, self.outputs = tuple(calls), dict(inputs), dict(outputs)
        self.shared_values = (dict(shared),)  # in a tuple, so that no module becomes a child
        for path, value in owned.items():
            name = path.replace(".", "_")
            if isinstance(value, nn.Module):
                self.add_module(name, value)
            elif isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value)
        last_use = {name: i for i, call in enumerate(self.calls) for name in call.used_values()}
        self.unused_after = [
            [name for name, last in last_use.items() if last == i and name not in self.outputs]
            for i in range(len(self.calls))
        ]

    def forward(self, x: TensorTree) -> TensorTree:
        values = unpack_values(x, self.inputs)
        for call, unused in zip(self.calls, self.unused_after, strict=True):
            values[call.name] = run_call(call, values, self._find)
            for name in unused:  # so that the memory of a large map is free at once
                values.pop(name, None)
        return pack_values(values, self.outputs)

    def _find(self, target: str) -> Any:
        """The module or parameter at a path; its method where the path has one after a colon."""
        path, _, method = target.partition(":")
        shared = self.shared_values[0]
        value = shared[path] if path in shared else getattr(self, path.replace(".", "_"))
        return getattr(value, method) if method else value

    def extra_repr(self) -> str:
        """The calls: digests of a stage are made from its text."""
        lines = [f"{list(self.inputs)} -> {list(self.outputs)}", *map(repr, self.calls)]
        return "\n".join(lines)


def pack_values(values: Mapping[str, Any], names: Mapping[str, int | None]) -> TensorTree:
    """The values at `names` as a tensor tree; the tensors of a list are numbered."""
    if len(names) == 1 and next(iter(names.values())) is None:
        tensor: Tensor = values[next(iter(names))]
        return tensor
    tree: dict[str, Tensor] = {}
    for name, length in names.items():
        if length is None:
            tree[name] = values[name]
        else:
            tree |= {f"{name}.{i}": values[name][i] for i in range(length)}
    return tree


def unpack_values(tree: TensorTree, names: Mapping[str, int | None]) -> dict[str, Any]:
    """The values that `pack_values` packed, by name."""
    if not isinstance(tree, dict):
        return {next(iter(names)): tree}
    return {
        name: tree[name] if length is None else [tree[f"{name}.{i}"] for i in range(length)]
        for name, length in names.items()
    }
