"""Heat maps as PNG files: numbers over two named axes, with their values written in where there is room."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from swat_lm.evaluate.plots import write_picture

__all__ = ["plot_heat_map"]

# more cells in a row leave no room for numbers that can be read at half size
NUMBERED = 12
# in steps, so that neighbouring labels of an axis do not touch
LABELS = 12


def plot_heat_map(
    values: Sequence[Sequence[float | None]],
    path: Path,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    ylabel: str,
    xlabel: str,
    scale: str,
    title: str | None = None,
    limits: tuple[float, float] | None = None,
) -> None:
    """Draw `values[row][column]`, the first row at the bottom; `scale` names what a colour means.

    None stays white, as do numbers that are not finite. Raises ValueError for rows of other lengths than the names.
    """
    if not values or len(values) != len(rows) or {len(row) for row in values} != {len(columns)} or not columns:
        raise ValueError(f"heat map: expected {len(rows)} rows of {len(columns)} values, neither of them none")
    numbers = [[math.nan if value is None or math.isinf(value) else value for value in row] for row in values]
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    axes = figure.add_subplot()
    # without any number the scale has no ends of its own
    drawn = any(not math.isnan(value) for row in numbers for value in row)
    low, high = limits or ((None, None) if drawn else (0.0, 1.0))
    image = axes.imshow(numbers, origin="lower", aspect="auto", cmap="viridis", vmin=low, vmax=high)
    for axis, names, label in ((axes.xaxis, columns, xlabel), (axes.yaxis, rows, ylabel)):
        step = -(-len(names) // LABELS)
        axis.set_ticks(range(0, len(names), step), labels=[str(name) for name in names[::step]], fontsize=13)
        axis.set_label_text(label, fontsize=14)
    if len(columns) <= NUMBERED and len(rows) <= NUMBERED:
        middle = sum(image.get_clim()) / 2
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                if value is not None:
                    # what has no colour stays white
                    colour = "black" if value > middle or not math.isfinite(value) else "white"
                    axes.text(
                        x,
                        y,
                        f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}",
                        ha="center",
                        va="center",
                        fontsize=12,
                        color=colour,
                    )
    bar = figure.colorbar(image, ax=axes)
    bar.set_label(scale, fontsize=14)
    bar.ax.tick_params(labelsize=13)
    if title:
        axes.set_title(title, loc="left", fontsize=13, color="#333333")
    write_picture(figure, path)
