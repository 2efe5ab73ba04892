"""Which parameters of a net are trained where its stages have adapters.

An adapter is a small change of a frozen layer. A net with adapters trains these and its head; the
layers below them stay as they are, and are neither copied nor written into checkpoints.
"""

from collections.abc import Mapping

from torch import Tensor, nn

MARK = ".lora_"  # in the names of the parameters of adapters, as peft gives them


def has_adapters(module: nn.Module) -> bool:
    """Whether a module has layers with adapters."""
    return any(MARK in name for name, _ in module.named_parameters())


def trained_parameters(net: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a suffix that are trained, by name.

    They are all of them; with adapters only these, and those of the last stage.
    """
    parameters = dict(net.named_parameters())
    if not has_adapters(net):
        return parameters
    head = next(reversed(dict(net.named_children())))
    return {
        name: parameter
        for name, parameter in parameters.items()
        if MARK in name or name.startswith(f"{head}.")
    }


def trained_state(net: nn.Module, *, keep_vars: bool = False) -> dict[str, Tensor]:
    """The state dict of a suffix without the parameters that stay as they are below adapters.

    Args:
        net: The suffix.
        keep_vars: Gives the parameters themselves, and not their values.
    """
    state: dict[str, Tensor] = net.state_dict(keep_vars=keep_vars)
    if not has_adapters(net):
        return state
    trained = {id(parameter) for parameter in trained_parameters(net).values()}
    frozen = {
        name
        for name, parameter in net.named_parameters(remove_duplicate=False)
        if id(parameter) not in trained
    }
    return {name: value for name, value in state.items() if name not in frozen}


def load_trained_state(net: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads what `trained_state` gave. Raises RuntimeError where the names are others."""
    if trained_state(net).keys() != state.keys():
        raise RuntimeError("the weights are those of another net")
    net.load_state_dict(state, strict=False)
