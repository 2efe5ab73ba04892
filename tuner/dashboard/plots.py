"""Pictures for the dashboard, drawn without a display."""

import base64
import io
import json
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from tuner.config.objective import Direction, metric_label
from tuner.deferred_figures import KIND_KEY, PREFIX

MAX_CLASSES_WITH_COUNTS, MAX_CLASSES_WITH_NAMES = (
    20,
    60,
)  # up to so many classes the counts, and the names, can be read
MAX_TARGETS_SHOWN = 9  # of a regression
FORMATS = ("JPEG",)  # of the images of mistakes
LOSS_COLOUR, SCORE_COLOUR = "tab:red", "tab:blue"
_matplotlib_lock = threading.Lock()  # matplotlib draws for one thread at a time


def render_figure(content: bytes) -> bytes:
    """A PNG of what `figures.later` gave; any other content as it is."""
    if not content.startswith(PREFIX):
        return content
    shown = json.loads(content)
    kinds: dict[str, Callable[..., bytes]] = {
        "confusion": plot_confusion,
        "curve": plot_learning_curve,
        "mistakes": plot_mistakes,
        "predicted": plot_predicted,
    }
    with _matplotlib_lock:
        return kinds[shown.pop(KIND_KEY)](**shown)


def _encode_png(figure: Figure) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a script that the font lacks is drawn as boxes
        FigureCanvasAgg(figure).print_png(out)  # type: ignore[no-untyped-call]
    return out.getvalue()


def plot_confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> bytes:
    """Counts, true class down, predicted class across, coloured by the share of the true class."""
    side = min(12.0, 3.0 + 0.4 * len(classes))
    figure = Figure(figsize=(side, side), dpi=100, layout="constrained")
    axes = figure.subplots()
    shares = [
        [count / max(1, sum(row)) for count in row] for row in matrix
    ]  # a rare class is seen as well as a common one
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    names = [name if len(name) <= 16 else name[:15] + "…" for name in classes]
    ticks = range(len(classes)) if len(classes) <= MAX_CLASSES_WITH_NAMES else []
    axes.set_xticks(
        ticks,
        [names[i] for i in ticks],
        rotation=90 if max(map(len, names), default=0) > 2 else 0,
        parse_math=False,
    )
    axes.set_yticks(ticks, [names[i] for i in ticks], parse_math=False)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    right, total = sum(row[i] for i, row in enumerate(matrix)), sum(map(sum, matrix))
    figure.suptitle(f"validation, best epoch: {right:,} of {total:,} right", fontsize=10)
    if len(classes) <= MAX_CLASSES_WITH_COUNTS:
        for i, row in enumerate(matrix):
            for j, count in enumerate(row):
                if count:
                    color = "white" if shares[i][j] > 0.5 else "black"
                    axes.text(j, i, str(count), ha="center", va="center", color=color, fontsize=8)
    return _encode_png(figure)


def plot_mistakes(mistakes: Sequence[Mapping[str, Any]]) -> bytes:
    """The images of which a model was surest and wrong, with the predicted and the true class.

    `mistakes`: of each the `image` (JPEG in base64), `truth`, `predicted`, and `confidence` 0..1.
    """
    columns = min(4, len(mistakes))
    rows = -(-len(mistakes) // columns)
    figure = Figure(figsize=(2.2 * columns, 2.6 * rows), dpi=100, layout="constrained")
    for position, mistake in enumerate(mistakes, 1):
        axes = figure.add_subplot(rows, columns, position)
        content = io.BytesIO(base64.b64decode(mistake["image"]))
        with Image.open(content, formats=FORMATS) as image:
            axes.imshow(image)
        axes.set_axis_off()
        caption = f"{mistake['predicted']} {mistake['confidence']:.0%}\nis {mistake['truth']}"
        axes.set_title(caption, fontsize=9, parse_math=False)
    return _encode_png(figure)


def plot_predicted(
    targets: Sequence[str],
    truth: Sequence[Sequence[float]],
    predicted: Sequence[Sequence[float]],
) -> bytes:
    """Predicted against true numbers, a field for each target; a line where both are equal.

    `truth` and `predicted`: for each target the numbers of the examples. The first
    MAX_TARGETS_SHOWN targets are shown.
    """
    shown = min(len(targets), MAX_TARGETS_SHOWN)
    columns = min(3, shown)
    rows = -(-shown // columns)
    figure = Figure(figsize=(3.4 * columns, 3.4 * rows), dpi=100, layout="constrained")
    for i in range(shown):
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.scatter(truth[i], predicted[i], s=9, alpha=0.6, color=SCORE_COLOUR)
        ends = [min(*truth[i], *predicted[i]), max(*truth[i], *predicted[i])]
        axes.plot(ends, ends, "--", color="grey", linewidth=1)
        axes.set_xlabel("true")
        axes.set_ylabel("predicted")
        axes.set_title(targets[i][:40], fontsize=10, parse_math=False)
    return _encode_png(figure)


def plot_learning_curve(
    losses: Sequence[float],
    scores: Sequence[Mapping[str, float]],
    metric: str,
    direction: Direction = "maximise",
) -> bytes:
    """Training loss and validation score by epoch; the best epoch is ringed.

    `scores` are empty for an epoch that was not validated. `direction`: whether higher or lower
    scores are better. Files of earlier versions do not say it.
    """
    epochs = range(1, len(losses) + 1)
    values = {epoch: s[metric] for epoch, s in zip(epochs, scores, strict=True) if metric in s}
    figure = Figure(figsize=(6, 3.5), dpi=100, layout="constrained")
    left = figure.subplots()
    left.plot(epochs, losses, "o--", color=LOSS_COLOUR, markersize=3, linewidth=1)
    left.set_xlabel("epoch")
    left.set_ylabel("training loss", color=LOSS_COLOUR)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.grid(visible=True, axis="x", alpha=0.3)
    right = left.twinx()
    right.plot(list(values), list(values.values()), "s-", color=SCORE_COLOUR, markersize=3)
    right.set_ylabel(f"validation {metric_label(metric)}", color=SCORE_COLOUR)
    if values:
        choose = min if direction == "minimise" else max
        best = choose(values, key=values.__getitem__)
        right.plot(best, values[best], "o", color=SCORE_COLOUR, markersize=11, fillstyle="none")
        right.set_title(f"best: {values[best]:.4f} in epoch {best} of {len(losses)}", fontsize=10)
    return _encode_png(figure)
