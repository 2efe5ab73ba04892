"""The table of the classes on a model card."""

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
