"""What is exported of a model: the model with its normalisation inside."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tuner.core.input_spec import InputSpec, TensorTree
from tuner.core.target_scale import TargetScale
from tuner.core.types import StagedModel


class ExportModule(nn.Module):
    """A staged model with its normalisation inside, so that an export needs no further code.

    Its input is a batch as an export takes it: images as RGB in 0..1, float32 (n, 3, size, size),
    or texts as token ids, int64 (n, length) by name. Its output is the model's own, divided by the
    temperature where there is one, or, for a regression, in the units of the targets.

    Args:
        staged: The model. Its modules are used, not copied.
        input_spec: How the model's examples must look.
        temperature: What the logits are divided by; None: the model's output stays as it is.
        target_scale: Of a model that gives standardised targets; None: it gives something else.
    """

    mean: Tensor
    std: Tensor
    temperature: Tensor
    target_mean: Tensor
    target_deviation: Tensor

    def __init__(
        self,
        staged: StagedModel,
        input_spec: InputSpec,
        temperature: float | None = None,
        target_scale: TargetScale | None = None,
    ) -> None:
        super().__init__()
        self.function = staged.as_module()
        self.staged = (staged,)  # in a tuple, so that torch does not register its model as a child
        self.input_spec = input_spec
        self.max_length = input_spec.max_length
        self.has_normalisation = input_spec.normalisation() is not None
        for name, values in zip(("mean", "std"), input_spec.normalisation() or (), strict=False):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1))
        self.has_temperature = temperature is not None
        if temperature is not None:
            self.register_buffer("temperature", torch.tensor(temperature))
        self.has_target_scale = target_scale is not None
        if target_scale is not None:
            self.register_buffer("target_mean", torch.tensor(target_scale.mean))
            self.register_buffer("target_deviation", torch.tensor(target_scale.deviation))

    def forward(self, x: TensorTree) -> TensorTree:
        if self.has_normalisation:
            x = (x - self.mean) / self.std  # type: ignore[operator]
        output = self.function(x)
        if self.has_temperature:
            output = output / self.temperature
        if self.has_target_scale:
            output = output * self.target_deviation + self.target_mean
        return output  # type: ignore[no-any-return]

    def export_state(self) -> dict[str, Tensor]:
        """All weights: the model's under their native names, normalisation, temperature and target
        scale under `tuner.`.

        The tensors are copies, and no two share memory.
        """
        own = {f"tuner.{name}": value for name, value in self.named_buffers(recurse=False)}
        model = self.staged[0].model.state_dict()
        return {name: value.detach().clone().contiguous() for name, value in (model | own).items()}

    def load_export_state(self, state: Mapping[str, Tensor]) -> None:
        """Loads what `export_state` gave."""
        self.staged[0].model.load_state_dict(
            {name: value for name, value in state.items() if not name.startswith("tuner.")}
        )
        for name, buffer in self.named_buffers(recurse=False):
            buffer.copy_(state[f"tuner.{name}"])


def dynamic_shapes(model: ExportModule, example: TensorTree) -> Any:
    """The dimensions that an export leaves open, in the form that torch.export takes.

    They are the number of examples and the length of texts; none where exports take one example.
    """
    if not model.staged[0].exports_batched:
        return dict.fromkeys(example) if isinstance(example, dict) else None
    batch = torch.export.Dim("batch", min=1, max=65_536)
    if isinstance(example, Tensor):
        return {0: batch}
    length = torch.export.Dim("length", min=2, max=model.max_length)
    return {name: {0: batch, 1: length} for name in example}


@contextmanager
def quiet_export() -> Iterator[None]:
    """Hides warnings that torch and torchvision give while a model is traced: the user cannot act
    on them.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*create_unbacked_symint.* is deprecated", FutureWarning)
        # the inputs of a text share the names of their axes on purpose
        warnings.filterwarnings("ignore", "# The axis name", UserWarning)
        yield
