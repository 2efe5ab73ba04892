"""The linear probe: the head's last layer, solved once on the features of all other stages and kept
for every later trial.

Linear probing comes before fine-tuning, because the gradients of a random head would distort what
the other stages have learnt (Kumar et al., Fine-Tuning can Distort Pretrained Features and
Underperform Out-of-Distribution, ICLR 2022).

The features are computed in one pass over the examples. The layer is then the minimum of a convex
function: the task's loss on standardised features and an L2 penalty, by L-BFGS (Liu and Nocedal,
Mathematical Programming 45, 1989). The penalty is the one of PENALTIES that gives the lowest loss
on the validation examples.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tuner.core.input_spec import TensorTree, tree_to_dict
from tuner.core.targets import IGNORED_TAG
from tuner.core.types import Batch, Source
from tuner.files.atomic import atomic_folder, disk_errors
from tuner.files.cache_entries import make_space, open_or_create, write_checksums

PROBED_HEAD_FILE = "head.safetensors"
FORMAT_VERSION = 4  # of what is kept; another number is another probe
PENALTIES = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001)  # strong to weak
WORSE_IN_A_ROW = 2  # penalties after which weaker ones are not tried
MAX_ITERATIONS = 50  # of L-BFGS for one penalty; each begins at the solution of the one before
MAX_PRODUCT = 2e10  # examples x features x outputs; of more examples a random part is used
MIN_DEVIATION = 1e-6  # of a feature; one that hardly varies is not scaled up

LossFunction = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class LayerExamples:
    """What a layer is solved on: its inputs, float32 (n, features), and the examples' targets."""

    inputs: Tensor
    targets: TensorTree

    def __len__(self) -> int:
        return len(self.inputs)

    def select(self, rows: Tensor) -> "LayerExamples":
        """The examples at `rows` (int64, (k,))."""
        targets = {name: tensor[rows] for name, tensor in tree_to_dict(self.targets).items()}
        return LayerExamples(self.inputs[rows], targets[""] if set(targets) == {""} else targets)

    def join(self, others: "LayerExamples") -> "LayerExamples":
        """These examples, and then the others."""
        more = tree_to_dict(others.targets)
        targets = {
            name: torch.cat([tensor, more[name]])
            for name, tensor in tree_to_dict(self.targets).items()
        }
        return LayerExamples(
            torch.cat([self.inputs, others.inputs]),
            targets[""] if set(targets) == {""} else targets,
        )


def load_or_solve_probe(
    head: nn.Module, folder: Path, run_key: str, solve: Callable[[], None]
) -> None:
    """Gives `head` its probed weights: read from `folder`, or solved now and written there.

    Args:
        head: The last stage of a model. It is changed in place.
        folder: The cache of all probes.
        run_key: Everything that the probed weights depend on. Equal keys, equal weights.
        solve: Gives `head` its probed weights in place.
    """
    key = f"{FORMAT_VERSION} {run_key}"
    entry_folder = folder / hashlib.sha256(key.encode()).hexdigest()[:32]

    def create_entry() -> None:
        solve()
        make_space(folder, 0.0)
        with atomic_folder(entry_folder, crash_prefix="probe") as temporary:
            state = {name: value.contiguous() for name, value in head.state_dict().items()}
            save_file(state, temporary / PROBED_HEAD_FILE)
            write_checksums(temporary)

    with disk_errors(entry_folder):
        folder.mkdir(parents=True, exist_ok=True)
        pinned_entry = open_or_create(entry_folder, create_entry)
    head.load_state_dict(load_file(pinned_entry.folder / PROBED_HEAD_FILE))


@torch.no_grad()
def find_output_layer(
    head: nn.Module, x: TensorTree, autocast: Callable[[], AbstractContextManager[None]]
) -> nn.Linear | None:
    """The linear layer whose output is the output of `head` for the inputs `x`, which are as
    `autocast` computes them.

    None where `head` does not end with a linear layer over vectors, one for each example or for
    each of its tokens: then there is no linear probe.
    """
    outputs: list[tuple[nn.Linear, Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda layer, _, output: outputs.append((layer, output)))
        for module in head.modules()
        if isinstance(module, nn.Linear)
    ]
    head.eval()
    try:
        with autocast():
            output = head(x)
    finally:
        for hook in hooks:
            hook.remove()
    if not outputs or not isinstance(output, Tensor) or output.dim() not in (2, 3):
        return None
    layer, layer_output = outputs[-1]
    return layer if torch.equal(layer_output.reshape(output.shape), output) else None


def has_hidden_layers(head: nn.Module, output_layer: nn.Linear) -> bool:
    """Whether `head` has weights before its output layer, such as BERT's pooler.

    Norms, whose weights are vectors, do not count.
    """
    own = set(output_layer.parameters())
    return any(value.dim() > 1 and value not in own for value in head.parameters())


@torch.no_grad()
def collect_layer_examples(
    head: nn.Module,
    layer: nn.Linear,
    source: Source,
    chunk: int,
    autocast: Callable[[], AbstractContextManager[None]],
) -> LayerExamples:
    """The inputs of a layer of `head`, in eval mode, for the first view of `source`.

    Where each token has a target, those tokens that count are the examples.

    Args:
        head: The last stage of a model.
        layer: The layer of `head`.
        source: The inputs of `head`.
        chunk: The number of examples to compute at once.
        autocast: The precision of the computation.
    """
    inputs: list[Tensor] = []
    targets: list[dict[str, Tensor]] = []
    hook = layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    head.eval()
    try:
        for index in torch.split(_choose_rows(len(source), layer), chunk):
            x, y = source.take(index, 0)
            with autocast():
                head(x)
            if isinstance(y, Tensor) and y.dim() == 2 and not y.is_floating_point():
                inputs[-1], y = _counted_tokens(inputs[-1], y)
            inputs[-1] = inputs[-1].flatten(0, -2).float()
            targets.append(tree_to_dict(y))
    finally:
        hook.remove()
    joined = {name: torch.cat([part[name] for part in targets]) for name in targets[0]}
    examples = LayerExamples(torch.cat(inputs), joined[""] if set(joined) == {""} else joined)
    rows = _choose_rows(len(examples), layer)  # of tokens there may be more than of examples
    return examples if len(rows) == len(examples) else examples.select(rows)


def _counted_tokens(hidden: Tensor, tags: Tensor) -> tuple[Tensor, Tensor]:
    """The vectors of the tokens that count, (k, features), and their tags, (k,).

    Args:
        hidden: (n, width, features).
        tags: integers (n, length), not below `width` in length, IGNORED_TAG for other tokens.
    """
    tags = tags[:, : hidden.shape[1]].to(hidden.device)
    counted = tags != IGNORED_TAG
    return hidden[counted], tags[counted]


def _choose_rows(count: int, layer: nn.Linear) -> Tensor:
    """The rows of the examples to use, int64, rising: all, or a random part where they are many."""
    limit = int(MAX_PRODUCT / layer.weight.numel())
    if count <= limit:
        return torch.arange(count)
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(count, generator=generator)[:limit].sort().values


def solve_output_layer(
    layer: nn.Linear,
    loss: LossFunction,
    train: LayerExamples,
    valid: LayerExamples,
    *,
    join_valid: bool = False,
    penalties: Sequence[float] = PENALTIES,
) -> float:
    """Gives `layer` the weights that minimise `loss` on the training examples, with a penalty.

    Args:
        layer: The layer. Its weights are replaced.
        loss: The mean loss of a module on a batch whose x is (n, features).
        train: The training examples.
        valid: The validation examples. They choose the penalty.
        join_valid: After the penalty is chosen, solve on both kinds of examples together.
        penalties: The penalties to try, strong to weak.

    Returns:
        The chosen penalty: the factor of half the squared norm of the weights of standardised
        features.
    """
    scaling = _Scaling.of(train.inputs, centre=layer.bias is not None)
    standardised = _StandardisedLayer(layer)
    examples, judged = scaling.apply(train), scaling.apply(valid)
    best_loss, best_penalty, best_state = math.inf, penalties[0], standardised.copy_weights()
    worse = 0
    for penalty in penalties:
        standardised.minimise(loss, examples, penalty)
        with torch.no_grad():
            valid_loss = float(loss(standardised, Batch(judged.inputs, judged.targets)))
        if valid_loss < best_loss:
            best_loss, best_penalty, worse = valid_loss, penalty, 0
            best_state = standardised.copy_weights()
        else:
            worse += 1
        if worse == WORSE_IN_A_ROW:
            break
    standardised.load_state_dict(best_state)
    if join_valid:
        standardised.minimise(loss, examples.join(judged), best_penalty)
    scaling.fold_into(layer, standardised)
    return best_penalty


@dataclass(frozen=True)
class _Scaling:
    """The mean and the standard deviation of each feature, float32 (features,)."""

    mean: Tensor
    deviation: Tensor

    @staticmethod
    def of(inputs: Tensor, *, centre: bool) -> "_Scaling":
        """`centre`: subtract the mean, which only a layer with a bias can undo."""
        mean = inputs.mean(0) if centre else torch.zeros_like(inputs[0])
        deviation = (inputs - mean).square().mean(0).sqrt()
        return _Scaling(mean, deviation.where(deviation > MIN_DEVIATION, 1.0))

    def apply(self, examples: LayerExamples) -> LayerExamples:
        return LayerExamples((examples.inputs - self.mean) / self.deviation, examples.targets)

    @torch.no_grad()
    def fold_into(self, layer: nn.Linear, standardised: "_StandardisedLayer") -> None:
        """Gives `layer` the weights that do to features what `standardised` does to scaled ones."""
        weight = standardised.weight / self.deviation
        layer.weight.copy_(weight)
        if layer.bias is not None and standardised.bias is not None:
            layer.bias.copy_(standardised.bias - weight @ self.mean)


class _StandardisedLayer(nn.Linear):
    """A float32 layer of zeros with the shape of another one."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            device=layer.weight.device,
            dtype=torch.float32,
        )
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def copy_weights(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.state_dict().items()}

    def minimise(self, loss: LossFunction, examples: LayerExamples, penalty: float) -> None:
        """Minimises the loss on `examples` and the penalty, from the present weights on."""
        optimizer = torch.optim.LBFGS(
            self.parameters(),
            max_iter=MAX_ITERATIONS,
            tolerance_grad=1e-5,
            tolerance_change=1e-7,
            line_search_fn="strong_wolfe",
        )
        batch = Batch(examples.inputs, examples.targets)

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss(self, batch) + penalty / 2 * self.weight.square().sum()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        optimizer.step(closure)  # type: ignore[no-untyped-call]
