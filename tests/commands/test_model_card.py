"""The table of the classes on a model card."""

from typing import Any

import pytest

from tuner.export._model_card import MAX_CLASSES_LISTED, _format_classes


def scores(f1: float) -> dict[str, float]:
    return {"precision": f1, "recall": f1, "f1": f1, "examples": 3}


def test_the_worst_classes_come_first_and_the_rest_is_counted() -> None:
    count = MAX_CLASSES_LISTED + 2
    table = _format_classes({f"class{i}": scores(1 - i / count) for i in range(count)})
    rows = [line for line in table.splitlines() if line.startswith("| class")]
    assert len(rows) == 1 + MAX_CLASSES_LISTED and rows[1].startswith(f"| class{count - 1} |")
    assert "2 further classes, all with a higher F1, are in `manifest.json`" in table


def test_a_task_without_classes_has_no_table() -> None:
    assert _format_classes({}) == ""


def test_a_name_cannot_break_the_table() -> None:
    assert "| a\\|b | 1.0000 |" in _format_classes({"a|b": scores(1.0)})


@pytest.mark.parametrize(
    ("scores", "head", "first"),
    [
        (
            {
                "cat": {"average_precision": 0.5, "average_recall": 0.625, "objects": 4},
                "dog": {"average_precision": 0.25, "average_recall": 0.5, "objects": 9},
            },
            "| class | average precision | average recall | objects |",
            "| dog | 0.2500 | 0.5000 | 9 |",
        ),
        (
            {  # nobody saw or predicted a sofa
                "sofa": {"pixels": 0},
                "cat": {"iou": 0.5, "dice": 2 / 3, "recall": 1.0, "precision": 0.5, "pixels": 40},
            },
            "| class | IoU | Dice | recall | precision | pixels |",
            "| cat | 0.5000 | 0.6667 | 1.0000 | 0.5000 | 40 |\n| sofa | – | – | – | – | 0 |",
        ),
    ],
)
def test_objects_and_pixels_have_a_table_of_their_own(scores: Any, head: str, first: str) -> None:
    table = _format_classes(scores)
    assert f"{head}\n|---" in table and f"|\n{first}" in table
