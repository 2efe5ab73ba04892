"""What an export of `tuner` predicts for the test part of a set, in the form that task_scores.py reads.

Boxes and texts are what `tuner predict --json` tells. It tells only the shares of the classes of an image, not their pixels,
so masks come from the same functions in this process.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import task_sets


def write(kind: str, export: Path, folder: Path, scratch: Path, out: Path) -> None:
    """Writes the predictions of boxes, masks or texts to `out`."""
    if kind == "masks":
        write_masks(export, folder, out)
    elif kind == "boxes":
        files = [file for file, _ in task_sets.list_boxes(folder, "test")]
        lines = predicted_lines(export, files, scratch)
        out.write_text(json.dumps({Path(line["image"]).stem: line["objects"] for line in lines}))
    else:
        texts, labels = task_sets.read_texts(folder, "test")
        file = scratch / "texts.txt"
        file.write_text("\n".join(texts) + "\n", encoding="utf-8")
        lines = predicted_lines(export, [file], scratch)
        classes = sorted(lines[0]["classes"])
        rows = [
            [classes.index(label), [line["classes"][name] for name in classes]]
            for label, line in zip(labels, lines, strict=True)
        ]
        out.write_text(json.dumps({"classes": classes, "rows": rows}))


def predicted_lines(export: Path, examples: list[Path], scratch: Path) -> list[dict[str, Any]]:
    words = ["predict", export, *examples, "--json", "--out", scratch / "pictures"]
    told = subprocess.run(
        [sys.executable, "-m", "tuner", *map(str, words)],
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in told.stdout.splitlines() if line.startswith("{")]


def write_masks(export: Path, folder: Path, out: Path) -> None:
    """Writes the class of each pixel of the test images as PNG."""
    import torch
    from PIL import Image

    from tuner.core.input_spec import ImageInputSpec
    from tuner.tasks.segmentation import mask_on_image
    from tuner.training import inference

    published = inference.find_export(export.parent, str(export))
    predictor = inference.open_predictor(published, "safetensors", "cpu")
    function, input_spec = predictor.function, predictor.input_spec
    assert isinstance(input_spec, ImageInputSpec)
    out.mkdir()
    files = [file for file, _ in task_sets.list_masks(folder, "test")]
    for batch in inference.read_image_batches(files, input_spec):
        assert not batch.problems, batch.problems
        with torch.no_grad():
            logits: Any = function(batch.x)
        for name, image_logits, image in zip(batch.names, logits, batch.originals, strict=True):
            mask = mask_on_image(image_logits, image.width, image.height, input_spec)
            Image.fromarray(mask).save(out / f"{Path(name).stem}.png")
