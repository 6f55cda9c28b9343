"""Pictures of measured curves as PNG files; readable at half size, in print and with any colour vision.

Knows numbers only: no model, no data. Draws without a display.
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import XAxis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from swat_lm.files import write_bytes

__all__ = ["Series", "plot_loss_by_length", "plot_memory", "plot_state_bytes", "plot_training", "write_picture"]

# the colour-blind safe palette of Okabe and Ito, most distinct first; markers tell the lines apart without colour
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", "-.", ":", "-", "--")


@dataclass(frozen=True)
class Series:
    """One line of a picture: `y[i]`, and if measured its standard error, at `x[i]`."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float | None] | None = None
    style: int | None = None
    """Which colour, marker and dashes; None: those of its place among the lines of its picture."""


def styled(series: Sequence[Series]) -> list[tuple[int, Series]]:
    """Each line with the number of its style."""
    return [((index if line.style is None else line.style) % len(COLOURS), line) for index, line in enumerate(series)]


def drawable(line: Series) -> Series:
    """The line without points that are not finite, which no axis holds; its name says how many these are."""
    y = [value if math.isfinite(value) else math.nan for value in line.y]
    missing = sum(map(math.isnan, y))
    if not missing:
        return line
    error = None if line.error is None else [None if e is None or not math.isfinite(e) else e for e in line.error]
    return replace(line, name=f"{line.name} ({missing} of {len(y)} not finite)", y=y, error=error)


def plot_loss_by_length(
    series: Sequence[Series],
    path: Path,
    *,
    training_length: int | None = None,
    window: int | None = None,
    ylabel: str = "loss (nats per token)",
    title: str | None = None,
) -> None:
    """Loss against evaluation length in tokens, on a doubling axis; error bars are one standard error.

    `training_length` and `window` are marked by vertical lines. Raises ValueError if there is nothing to draw.
    """
    check_series(series)
    series = [drawable(line) for line in series]
    figure, axes = new_figure()
    for style, line in styled(series):
        errors = None if line.error is None else [0.0 if e is None else e for e in line.error]
        axes.errorbar(line.x, line.y, yerr=errors, label=line.name, **line_style(style), capsize=4)
    doubling_axis(axes.xaxis, sorted({x for line in series for x in line.x}))
    axes.set(xlabel="evaluation length (tokens)", ylabel=ylabel)
    low, high = axes.get_ylim()
    # room above the curves for the words of the vertical marks
    axes.set_ylim(low, high + 0.1 * (high - low))
    mark_verticals(axes, {"training length": training_length, "window": window})
    finish(figure, path, title)


def plot_training(
    training: Sequence[Series], held_out: Sequence[Series], path: Path, *, title: str | None = None
) -> None:
    """Training loss (thin, with its running mean) and held-out loss (marked) against tokens trained on.

    `held_out[i]` belongs to `training[i]` and shares its colour; it may be empty. Raises ValueError without any line.
    """
    check_series(training)
    training, held_out = [drawable(line) for line in training], [drawable(line) for line in held_out]
    figure, axes = new_figure()
    for style, line in styled(training):
        axes.plot(line.x, line.y, color=COLOURS[style], linewidth=0.8, alpha=0.3)
        axes.plot(line.x, running_mean(line.y), **line_style(style, marker=""), label=line.name)
    for style, line in styled(held_out):
        if line.x:
            axes.plot(line.x, line.y, color=COLOURS[style], linestyle="none", marker=MARKERS[style],
                      markersize=8, markeredgecolor="black")  # fmt: skip
    low, high = smoothed_range(training, held_out)
    marks = "; marks: held-out text" if any(line.x for line in held_out) else ""
    axes.set(xlabel="tokens trained on", ylabel=f"loss (nats per token{marks})")
    axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axes.xaxis.set_major_formatter(lambda value, _: short_number(value))
    finish(figure, path, title)


def plot_state_bytes(series: Sequence[Series], path: Path, *, title: str | None = None) -> None:
    """Bytes that a stream keeps against tokens read, both axes doubling. Raises ValueError without any line."""
    check_series(series)
    figure, axes = new_figure()
    for style, line in styled(series):
        axes.plot(line.x, line.y, label=line.name, **line_style(style))
    doubling_axis(axes.xaxis, sorted({x for line in series for x in line.x}))
    axes.set_yscale("log", base=2)
    levels = sorted({y for line in series for y in line.y})
    if levels[-1] < 4 * levels[0]:
        # powers of two would leave such lines between two ticks
        axes.set_ylim(levels[0] / 2, 2 * levels[-1])
        axes.set_yticks(levels[:: max(1, len(levels) // 4)])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: short_bytes(value))
    axes.set(xlabel="tokens read", ylabel="state of one stream")
    finish(figure, path, title)


def plot_memory(series: Sequence[Series], path: Path, *, available: float, title: str | None = None) -> None:
    """Bytes that a training step needs against the tokens of its row, both axes doubling; `available` is marked.

    Raises ValueError without any line.
    """
    check_series(series)
    figure, axes = new_figure()
    for style, line in styled(series):
        axes.plot(line.x, line.y, label=line.name, **line_style(style))
    doubling_axis(axes.xaxis, sorted({x for line in series for x in line.x}))
    axes.axhline(available, color="#666666", linestyle=":", linewidth=1.5)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: short_bytes(value))
    axes.set(xlabel="tokens of the row", ylabel="peak of a training step")
    finish(figure, path, title)


def short_number(value: float) -> str:
    """1024 -> 1k, 1500 -> 1.5k where that is exact enough to read off an axis; powers of two count in 1024s."""
    for unit, size in (("M", 1 << 20), ("k", 1 << 10)):
        if value >= size and value % size == 0:
            return f"{value / size:g}{unit}"
    for unit, size in (("M", 1_000_000), ("k", 1000)):
        if value >= 10 * size or (value >= size and value % (size // 10) == 0):
            return f"{value / size:.3g}{unit}"
    return f"{value:g}"


def short_bytes(value: float) -> str:
    """Bytes with a binary unit, such as 1.5 MiB."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:g} B"


def running_mean(values: Sequence[float]) -> list[float]:
    """Mean over about a fifteenth of the curve, centred so that it does not lag; the ends use what there is."""
    reach = len(values) // 30
    # equally far to both sides, else a falling curve's first means would be too low
    halves = [min(reach, index, len(values) - 1 - index) for index in range(len(values))]
    return [fmean(values[index - half : index + half + 1]) for index, half in enumerate(halves)]


def smoothed_range(training: Sequence[Series], held_out: Sequence[Series]) -> tuple[float, float]:
    """Limits of the loss axis: the lowest value, and the smoothed loss after a tenth of training."""
    lowest = min((value for line in (*training, *held_out) for value in line.y if math.isfinite(value)), default=0.0)
    smooth = [[value for value in running_mean(line.y) if math.isfinite(value)] for line in training]
    highest = max((curve[len(curve) // 10] for curve in smooth if curve), default=lowest)
    return lowest, max(highest, lowest + 1e-3)


def new_figure() -> tuple[Figure, Axes]:
    """A figure of 9 by 5.4 inches whose text stays readable at half size."""
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(True, color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=13)
    axes.xaxis.label.set_fontsize(14)
    axes.yaxis.label.set_fontsize(14)
    return figure, axes


def line_style(style: int, marker: str | None = None) -> dict[str, Any]:
    """How the line of this style is drawn, with its own marker or another."""
    marker = MARKERS[style] if marker is None else marker
    return {
        "color": COLOURS[style], "marker": marker, "linestyle": DASHES[style], "linewidth": 2.2, "markersize": 7
    }  # fmt: skip


def doubling_axis(axis: XAxis, ticks: Sequence[float]) -> None:
    """Numbers of tokens on a doubling axis, labelled at these places only."""
    axis.axes.set_xscale("log", base=2)
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: short_number(value))


def mark_verticals(axes: Axes, marks: Mapping[str, float | None]) -> None:
    """A line for each mark that has a place; those of one place share it."""
    places = dict.fromkeys(place for place in marks.values() if place is not None)
    for place in places:
        mark_vertical(axes, place, " = ".join(text for text, other in marks.items() if other == place))


def mark_vertical(axes: Axes, at: float, text: str) -> None:
    """A dotted vertical line with its words at the top."""
    axes.axvline(at, color="#555555", linestyle=":", linewidth=1.6)
    axes.annotate(text, (at, 0.985), xycoords=("data", "axes fraction"), xytext=(5, 0), textcoords="offset points",
                  va="top", fontsize=12, color="#333333")  # fmt: skip


def check_series(series: Sequence[Series]) -> None:
    """Raise ValueError if a line is empty or its parts differ in length."""
    if not series:
        raise ValueError("nothing to draw: expected at least one series")
    for line in series:
        sizes = {len(line.x), len(line.y)} | ({len(line.error)} if line.error is not None else set())
        if len(sizes) != 1 or 0 in sizes:
            raise ValueError(f"series {line.name!r}: x, y and error must be equally long and not empty; got {sizes}")


def finish(figure: Figure, path: Path, title: str | None) -> None:
    """Put the names of the lines above the axes, where they hide no point, and write the PNG in one piece."""
    axes = figure.axes[0]
    if title:
        axes.set_title(title, loc="left", fontsize=13, color="#333333")
    figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=13)
    write_picture(figure, path)


def write_picture(figure: Figure, path: Path) -> None:
    """Write a PNG beside its place and rename it: an interruption leaves no half picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_bytes(path, buffer.getvalue())
