"""Where a model's tensors lie: its device, and the order of their elements in memory."""

import torch
from torch import Tensor, nn

# Up to PyTorch 2.14 the gradient of such weights writes beyond its memory on CPUs with AVX-512,
# where the input is channels-last: kernels of 1 x 1, a stride, and fewer channels than a register
# holds. RepVGG, MobileOne and FastViT begin with one.
CHANNELS_OF_A_REGISTER = 16


def place_model(model: nn.Module, device: torch.device) -> None:
    """Moves a model to a device, in place, with its convolutions channels-last.

    On a CPU those convolutions stay contiguous whose gradient would damage other memory.
    """
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if device.type != "cpu":
        return
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and _is_damaging(module):
            weight = module.weight
            # `contiguous` would leave a kernel of 1 x 1 as it is
            weight.data = weight.data.clone(memory_format=torch.contiguous_format)
            if _take_contiguous not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(_take_contiguous)


def _is_damaging(convolution: nn.Conv2d) -> bool:
    channels = convolution.in_channels // convolution.groups
    return (
        convolution.kernel_size == (1, 1)
        and max(convolution.stride) > 1
        and channels < CHANNELS_OF_A_REGISTER
    )


def _take_contiguous(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0].contiguous(),)
