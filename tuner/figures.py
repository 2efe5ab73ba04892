"""Pictures for the dashboard and the report, drawn without a display."""

import io
from collections.abc import Mapping, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    FigureCanvasAgg(figure).print_png(out)  # type: ignore[no-untyped-call]
    return out.getvalue()


def confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> bytes:
    """Counts, true class down, predicted class across; the numbers are written in for up to 20 classes."""
    side = min(12.0, 2.5 + 0.4 * len(classes))
    figure = Figure(figsize=(side, side), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.imshow(matrix, cmap="Blues")
    names = [name if len(name) <= 16 else name[:15] + "…" for name in classes]
    ticks = range(len(classes)) if len(classes) <= 60 else []
    axes.set_xticks(ticks, [names[i] for i in ticks], rotation=90)
    axes.set_yticks(ticks, [names[i] for i in ticks])
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    top = max(max(row) for row in matrix)
    if len(classes) <= 20:
        for i, row in enumerate(matrix):
            for j, count in enumerate(row):
                if count:
                    axes.text(j, i, str(count), ha="center", va="center", color="white" if count > top / 2 else "black", fontsize=8)
    return _png(figure)


def curve(losses: Sequence[float], scores: Sequence[Mapping[str, float]], metric: str) -> bytes:
    """Training loss and validation score by epoch."""
    epochs = range(1, len(losses) + 1)
    figure = Figure(figsize=(6, 3.5), dpi=100, layout="constrained")
    left = figure.subplots()
    left.plot(epochs, losses, "o-", color="tab:red", markersize=3)
    left.set_xlabel("epoch")
    left.set_ylabel("training loss", color="tab:red")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    right = left.twinx()
    right.plot(epochs, [s[metric] for s in scores], "s-", color="tab:blue", markersize=3)
    right.set_ylabel(f"validation {metric.replace('_', ' ')}", color="tab:blue")
    return _png(figure)
