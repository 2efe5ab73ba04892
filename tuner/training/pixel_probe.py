"""The linear probe of a segmenter: its new 1x1 convolutions, solved on the pixels of the images.

A 1x1 convolution is a linear layer over pixels. The head enlarges its output by bilinear
interpolation, which gives the same as the layer on enlarged features. So its weights are the
minimum of a convex function, as those of a classifier's last layer are: see `linear_probe`. The
examples are pixels: a random sample of each image.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuner.core.input_spec import TensorTree
from tuner.core.targets import IGNORED
from tuner.core.types import Batch, Source
from tuner.training.linear_probe import LayerExamples, LossFunction, solve_output_layer

PIXELS_PER_IMAGE = 256  # neighbouring pixels are alike, so more of one image add little
MAX_PIXELS = 50_000  # of all images, so that the features fit into the memory
IMAGES_AT_ONCE = 8  # feature maps of a head are large
ConvolutionGroups = Sequence[Sequence[nn.Conv2d]]
"""For each output of a head: the 1x1 convolutions whose outputs add up to it."""


@torch.no_grad()
def collect_pixel_examples(
    head: nn.Module,
    groups: ConvolutionGroups,
    source: Source,
    autocast: Callable[[], AbstractContextManager[None]],
) -> list[LayerExamples]:
    """The inputs of convolutions at a sample of pixels, for the first view of `source`.

    Pixels that are ignored are left out. The sample follows from the indices of the images alone.

    Args:
        head: The last stage of a segmenter.
        groups: Convolutions of `head`. Those of one group have inputs of one size.
        source: The inputs of `head`; the targets are masks, uint8 (n, height, width).
        autocast: The precision of the computation.

    Returns:
        For each group the features of the pixels, float32 (pixels, channels of all convolutions
        together), and their classes, uint8 (pixels,).
    """
    inputs: dict[nn.Module, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda module, args: inputs.update({module: args[0]}))
        for group in groups
        for layer in group
    ]
    head.eval()
    head.training = True  # it gives its auxiliary output too; the layers inside stay in eval mode
    features: list[list[Tensor]] = [[] for _ in groups]
    labels: list[Tensor] = []
    images = _choose_images(len(source))
    count = min(PIXELS_PER_IMAGE, max(1, MAX_PIXELS // len(images)))
    try:
        for index in torch.split(images, IMAGES_AT_ONCE):
            x, masks = source.take(index, 0)
            assert isinstance(masks, Tensor)
            with autocast():
                head(x)
            pixels = sample_pixels(masks, index, count)
            truth = masks.flatten(1).gather(1, pixels)
            counted = truth != IGNORED
            labels.append(truth[counted])
            for group, collected in zip(groups, features, strict=True):
                maps = [features_at(inputs[layer], pixels, masks.shape[1:]) for layer in group]
                collected.append(torch.cat(maps, dim=2)[counted])
    finally:
        head.training = False
        for hook in hooks:
            hook.remove()
    return [LayerExamples(torch.cat(collected), torch.cat(labels)) for collected in features]


def _choose_images(count: int) -> Tensor:
    """The indices of the images to use, int64, rising: all, or a random part of very many."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[:MAX_PIXELS].sort().values


def sample_pixels(masks: Tensor, index: Tensor, count: int) -> Tensor:
    """Positions of random pixels of each image, int64 (n, count), counted row by row.

    Ignored pixels are among them only where an image has too few others.

    Args:
        masks: uint8 (n, height, width), IGNORED where a pixel does not count.
        index: The indices of the images in their source, int64 (n,); the sample follows from them.
        count: Pixels of each image; fewer where the image has fewer.
    """
    size = masks[0].numel()
    noise = torch.stack(
        [torch.rand(size, generator=torch.Generator().manual_seed(i)) for i in index.tolist()]
    ).to(masks.device)
    noise = noise - (masks.flatten(1) == IGNORED).float()  # these come after all others
    return noise.topk(min(count, size), dim=1).indices


def features_at(maps: Tensor, pixels: Tensor, size: Sequence[int]) -> Tensor:
    """Feature maps, enlarged bilinearly to the size of the images, at some pixels.

    It equals `interpolate(..., mode="bilinear", align_corners=False)` there.

    Args:
        maps: Feature maps (n, channels, height, width).
        pixels: Positions in the images, int64 (n, count), counted row by row.
        size: Height and width of the images.

    Returns:
        float32 (n, count, channels).
    """
    height, width = size
    column = (pixels % width + 0.5) * (2 / width) - 1
    row = (pixels // width + 0.5) * (2 / height) - 1
    grid = torch.stack([column, row], dim=-1)[:, None]
    sampled = F.grid_sample(
        maps.float(), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    return sampled[:, :, 0].transpose(1, 2)


def solve_convolutions(
    group: Sequence[nn.Conv2d],
    loss: LossFunction,
    train: LayerExamples,
    valid: LayerExamples,
    *,
    join_valid: bool = False,
) -> None:
    """Gives 1x1 convolutions, whose outputs add up, the weights that minimise `loss` together.

    Args:
        group: The convolutions. Their weights are replaced.
        loss: The mean loss of a module whose output is logits (n, classes, 1, 1), on a batch whose
            x is (n, channels) and whose y is (n, 1, 1).
        train: The training examples, with the channels of all convolutions one after the other.
        valid: The validation examples. They choose the penalty.
        join_valid: After the penalty is chosen, solve on both kinds of examples together.
    """
    widths = [layer.in_channels for layer in group]
    classes = group[0].out_channels
    has_bias = any(layer.bias is not None for layer in group)
    device = group[0].weight.device
    joint = nn.Linear(sum(widths), classes, bias=has_bias, device=device)

    def pixel_loss(net: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(batch.y, Tensor)
        as_images = nn.Sequential(net, nn.Unflatten(1, (classes, 1, 1)))
        targets: TensorTree = batch.y[:, None, None]
        return loss(as_images, Batch(batch.x, targets))

    solve_output_layer(joint, pixel_loss, train, valid, join_valid=join_valid)
    _hand_out_weights(joint, group, widths)


@torch.no_grad()
def _hand_out_weights(joint: nn.Linear, group: Sequence[nn.Conv2d], widths: list[int]) -> None:
    """Gives each convolution its columns of the joint layer; the first bias takes the whole."""
    for layer, weight in zip(group, torch.split(joint.weight, widths, dim=1), strict=True):
        layer.weight.copy_(weight[:, :, None, None])
    biases = [layer.bias for layer in group if layer.bias is not None]
    for bias in biases:
        bias.zero_()
    if biases:
        biases[0].copy_(joint.bias)
