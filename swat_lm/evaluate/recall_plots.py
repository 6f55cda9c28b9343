"""Pictures of recall and influence against distance, with the window's edge and the theoretical reach marked."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator

from swat_lm.evaluate.plots import COLOURS, doubling_axis, finish, line_style, mark_verticals, new_figure
from swat_lm.evaluate.reach import ReachCurve
from swat_lm.evaluate.recall import RecallCurve

__all__ = ["plot_reach", "plot_recall"]

VISIBLE = 0.005
"""Shares below cannot be told from none in a picture."""


def plot_recall(
    curves: Sequence[RecallCurve], path: Path, *, title: str | None = None, styles: Sequence[int] | None = None
) -> None:
    """Share of right answers against distance; bars are 95 % intervals. Raises ValueError without a curve.

    `styles` are the numbers of the curves' colours and markers; by default their places.
    """
    if not curves:
        raise ValueError("nothing to draw: expected at least one curve")
    figure, axes = new_figure()
    for index, curve in enumerate(curves):
        # side by side, where several were asked for at one distance
        style = (index if styles is None else styles[index]) % len(COLOURS)
        aside = 1.035 ** (index - (len(curves) - 1) / 2)
        at = [max(point.distance, 1) * aside for point in curve.points]
        accuracy = [point.accuracy for point in curve.points]
        below = [max(0.0, point.accuracy - point.low) for point in curve.points]
        above = [max(0.0, point.high - point.accuracy) for point in curve.points]
        axes.errorbar(at, accuracy, yerr=[below, above], label=curve.task, **line_style(style), capsize=4)
    axes.set(ylim=(-0.03, 1.12), yticks=[0, 0.25, 0.5, 0.75, 1], ylabel="share of answers recalled")
    for chance in sorted({curve.chance for curve in curves if curve.chance is not None and curve.chance >= VISIBLE}):
        axes.axhline(chance, color="#555555", linestyle=(0, (1, 3)), linewidth=1.6)
        axes.annotate("guessing", (0.995, chance), xycoords=("axes fraction", "data"), xytext=(0, 3), ha="right",
                      textcoords="offset points", fontsize=12, color="#333333")  # fmt: skip
    shown = [point.distance for curve in curves for point in curve.points]
    edges = [edge - 1 for edge in (curves[0].window, curves[0].reach) if edge is not None]
    by_distance(axes, [*shown, *edges], "distance to recall (tokens)")
    mark_edges(axes, curves[0].window, curves[0].reach)
    finish(figure, path, title)


def plot_reach(curve: ReachCurve, path: Path, *, title: str | None = None) -> None:
    """Influence per token against distance, both axes logarithmic; distance 0 stands at the left edge."""
    figure, axes = new_figure()
    shown = [i for i, share in enumerate(curve.share) if share > 0 and curve.first[i] > 0]
    if not shown:
        raise ValueError("nothing to draw: no token before the last has any influence")
    middle = [(curve.first[i] * curve.last[i]) ** 0.5 for i in shown]
    shares = [100 * curve.share[i] for i in shown]
    errors = [100 * min(curve.share_error[i] or 0.0, 0.9 * curve.share[i]) for i in shown]
    axes.errorbar(middle, shares, yerr=errors, label="influence of one token", **line_style(0), capsize=4)
    axes.set(yscale="log", ylabel="share of all influence (%)")
    axes.set_yticks(readable_ticks(*axes.get_ylim()))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    by_distance(axes, [curve.last[i] for i in shown], "distance to the prediction (tokens)")
    mark_edges(axes, curve.window, curve.reach)
    # in the legend, since the lines may stand close to each other and to the window's edge
    for index, (name, value) in enumerate(curve.within.items(), start=1):
        axes.axvline(max(value, axes.get_xlim()[0]), color=COLOURS[index % 6], linewidth=1.8, linestyle="--",
                     label=f"{100 * float(name):g} % within {value:,.0f} tokens")  # fmt: skip
    finish(figure, path, title)


def readable_ticks(low: float, high: float) -> list[float]:
    """Round numbers within a logarithmic axis: 1, 2 and 5 times powers of ten, or evenly where these are too few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(powers) <= 4 else (1,)
    ticks = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
    if len(ticks) >= 3:
        return ticks
    return [tick for tick in MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high) if low <= tick <= high]


def by_distance(axes: Axes, distances: Sequence[int], label: str) -> None:
    """A doubling axis with a tick at every fourth power of two at most, so that labels do not touch."""
    powers = range(0, max(max(distances, default=1), 2).bit_length() + 1)
    step = 1 if len(powers) <= 14 else 2
    low = max(1, min(distances, default=1))
    doubling_axis(axes.xaxis, [2.0**power for power in powers if 2**power >= low / 2][::step])
    axes.set_xlabel(label)


def mark_edges(axes: Axes, window: int | None, reach: int | None) -> None:
    """The last distance that one layer sees, and the last that all layers together can carry."""
    edges = {"window": window, "reach": reach}
    mark_verticals(axes, {text: edge - 1 for text, edge in edges.items() if edge is not None and edge > 1})
