"""Segmenters with weights for other classes than those of the data, so that their last convolutions are new."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn.modules.batchnorm import _BatchNorm

from tests.helpers.mask_files import write_images_and_masks
from tuner.config import parsing, yaml_document
from tuner.config.run import PluginConfig, Recipe, Run
from tuner.training.building import build_model

SPACE = """
task: segmentation
data: {name: masks, path: x, size: 64, valid: 0.25, test: 0.25}
model: {name: lraspp_mobilenet_v3_large, weights: x}
recipe: {lr: 0.003, batch_size: 4, epochs: 1}
"""


def write_weights(file: Path, name: str, classes: int) -> Path:
    """Weights of a segmenter for other classes, whose BatchNorm has seen other images."""
    config = PluginConfig(name, {"weights": "none"})
    run = Run(PluginConfig("segmentation", {}), PluginConfig("masks", {}), config, Recipe(), 0)
    model = build_model(run, Path(), classes).model
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.0, generator=generator)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, file)
    return file


def make_run(folder: Path, weights: Path, *words: str) -> Run:
    if not (folder / "photos").exists():
        write_images_and_masks(folder / "photos")
    document = parsing.apply_overrides(
        yaml_document.parse_document(SPACE, "masks.yaml"),
        [f"data.path={folder / 'photos'}", f"model.weights={weights}", *words],
    )
    return parsing.parse_space(document).sample(None, seed=1)
