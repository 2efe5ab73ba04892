"""What comes after a model: logits divided by a temperature, the mean over two mirror images."""

from collections.abc import Callable

from torch import Tensor, nn

from tuner.core.input_spec import TensorTree, tree_to_dict
from tuner.core.types import Task
from tuner.errors import NO_MEAN_OF_OUTPUTS, SpaceError

Function = Callable[[TensorTree], TensorTree]


def require_flips(task: Task, location: str = "search.test_flips") -> None:
    """Raises SpaceError, which names the key or option at `location`, where the task has no
    test-time flips.
    """
    if type(task).mirror_output is Task.mirror_output:
        raise SpaceError(f"{location}: {type(task).__name__} has no flips: {NO_MEAN_OF_OUTPUTS}")


class ScaledLogits(nn.Module):
    """A net whose logits are divided by a temperature.

    Args:
        net: Gives one tensor, the logits.
        temperature: Above 0.
    """

    def __init__(self, net: nn.Module, temperature: float) -> None:
        super().__init__()
        self.net, self.temperature = net, temperature

    def forward(self, x: TensorTree) -> Tensor:
        logits: Tensor = self.net(x)
        return logits.float() / self.temperature  # bfloat16 would round the quotient


class FlippedPair(nn.Module):
    """A net whose output for images is the mean of that and of the one for their mirror images.

    Args:
        net: A whole model: its input are images, (n, 3, height, width).
        mirror_output: `Task.mirror_output` of its task.
    """

    def __init__(self, net: nn.Module, mirror_output: Function) -> None:
        super().__init__()
        self.net, self.mirror_output = net, mirror_output

    def forward(self, x: TensorTree) -> TensorTree:
        return average_with_mirror(self.net, self.mirror_output)(x)


def average_with_mirror(function: Function, mirror_output: Function) -> Function:
    """A function whose output for images is the mean over them and their mirror images.

    Logits are averaged and not probabilities, that is, the geometric mean of the probabilities is
    taken. So the output is still logits, of which a task makes what it makes of a model's: it takes
    the softmax, or enlarges a mask. And a temperature may come before the mean or after it: both
    give the same.

    Args:
        function: A model or an export; its input are images, (n, 3, height, width).
        mirror_output: `Task.mirror_output` of its task.
    """

    def average(x: TensorTree) -> TensorTree:
        assert isinstance(x, Tensor)
        mirrored = tree_to_dict(mirror_output(function(x.flip(-1))))
        outputs = tree_to_dict(function(x))
        means = {name: (output + mirrored[name]) / 2 for name, output in outputs.items()}
        return means[""] if set(means) == {""} else means

    return average
