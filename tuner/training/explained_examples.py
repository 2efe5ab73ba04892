"""Heat maps of a model on some test examples, for the report of its study."""

import base64
import io
import json
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tuner.config.run import Run
from tuner.core.export_module import ExportModule
from tuner.core.input_spec import ImageInputSpec
from tuner.core.targets import split_weights
from tuner.core.types import Dataset
from tuner.errors import SpaceError
from tuner.preprocessing.image_decoding import FORMATS
from tuner.training.heat_maps import draw_heat_map, heat_maps

EXAMPLES = 8  # that are shown: a few seconds on a CPU, and less than 100 kB
LOOKED_AT = 48  # among which they are chosen
SMALLEST_SIDE = 96  # of a picture, in pixels


def explain_examples(run: Run, model: ExportModule, dataset: Dataset) -> bytes | None:
    """The content of an export's file with heat maps, as JSON.

    Half of the examples are those of which the model is surest and wrong, as far as there are any;
    the others are right, of as many classes as possible. Each has its `image` (JPEG in base64: the
    image, and beside it its heat map), `truth`, `predicted` and `confidence`.

    Returns:
        None where there are no heat maps: for other tasks, for texts, and for models without a
        feature map before their head.
    """
    if run.task.name != "classification" or not isinstance(dataset.input_spec, ImageInputSpec):
        return None
    count = len(dataset.test)
    index = torch.linspace(0, count - 1, min(LOOKED_AT, count)).round().long()
    batch = dataset.test.take(index, 0)
    x, truth = dataset.input_spec.to_export_input(batch.x), split_weights(batch.y)[0]
    if not isinstance(x, Tensor) or not isinstance(truth, Tensor):
        return None
    with torch.no_grad():
        confidence, predicted = model(x).softmax(1).max(1)
    chosen = choose_examples(truth.tolist(), predicted.tolist(), confidence.tolist())
    try:
        heats = heat_maps(model, x[chosen], predicted[chosen])
    except (SpaceError, RuntimeError):  # a model that cannot be explained is published as well
        return None
    examples = [
        {
            "image": base64.b64encode(_beside(x[row], heat)).decode(),
            "truth": dataset.classes[int(truth[row])],
            "predicted": dataset.classes[int(predicted[row])],
            "confidence": round(float(confidence[row]), 4),
        }
        for row, heat in zip(chosen, heats, strict=True)
    ]
    return json.dumps(examples, indent=1).encode()


def choose_examples(
    truth: Sequence[int], predicted: Sequence[int], confidence: Sequence[float]
) -> list[int]:
    """The rows of the examples that are shown: the surest mistakes, then right answers, in which
    no class comes a second time before each has come once.
    """
    rows = sorted(range(len(truth)), key=lambda row: -confidence[row])
    wrong = [row for row in rows if truth[row] != predicted[row]][: EXAMPLES // 2]
    seen: dict[int, int] = {}
    ranks: dict[int, int] = {}
    for row in rows:
        if truth[row] == predicted[row]:
            ranks[row] = seen[truth[row]] = seen.get(truth[row], 0) + 1
    right = sorted(ranks, key=lambda row: (ranks[row], -confidence[row]))
    return wrong + right[: EXAMPLES - len(wrong)]


def _beside(pixels: Tensor, heat: Tensor) -> bytes:
    """An image and its heat map beside each other, as JPEG."""
    plain: Any = Image.open(
        io.BytesIO(draw_heat_map(pixels, torch.zeros_like(heat))), formats=FORMATS
    )
    drawn: Any = Image.open(io.BytesIO(draw_heat_map(pixels, heat)), formats=FORMATS)
    side = max(SMALLEST_SIDE, min(plain.width, 2 * SMALLEST_SIDE))
    both = Image.new("RGB", (2 * side, side))
    for place, picture in ((0, plain), (side, drawn)):
        both.paste(picture.resize((side, side), Image.Resampling.BICUBIC), (place, 0))
    out = io.BytesIO()
    both.save(out, "JPEG", quality=85)
    return out.getvalue()
