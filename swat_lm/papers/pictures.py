"""Pictures that pages share: rows of values with their errors, and losses of training."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import FuncFormatter, NullLocator

from swat_lm.evaluate.plots import (
    COLOURS,
    MARKERS,
    Series,
    mark_vertical,
    new_figure,
    plot_loss_by_length,
    write_picture,
)
from swat_lm.papers.findings import Findings
from swat_lm.papers.verdicts import paired_gap

__all__ = ["plot_losses", "plot_rows", "training_series"]


def training_series(label: str, metrics: Sequence[Mapping[str, Any]], loss: str = "loss") -> Series:
    """A loss against the tokens trained on, of the lines of a metrics.jsonl that have it."""
    lines = [line for line in metrics if loss in line]
    return Series(label, [line["tokens"] for line in lines], [line[loss] for line in lines])


def plot_rows(
    rows: Sequence[tuple[str, float | None, float | None]],
    path: Path,
    *,
    xlabel: str,
    from_zero: bool = False,
    title: str | None = None,
    mark: tuple[float | None, str] | None = None,
    apart: bool = False,
) -> None:
    """One point per row, the names on the left, bars of one standard error; the first row on top.

    `mark` is a value with its name, drawn as a dotted line. `apart`: each row in the colour and with the marker that
    the lines of other pictures have in its place.
    """
    # no axis holds what is not finite
    rows = [
        (f"{name} ({value})", None, None)
        if value is not None and not math.isfinite(value)
        else (name, value, None if error is None or not math.isfinite(error) else error)
        for name, value, error in rows
    ]
    figure, axes = new_figure()
    figure.set_size_inches(9, 1.6 + 0.42 * len(rows))
    if title:
        axes.set_title(title, loc="left", fontsize=13, color="#333333")
    if mark is not None and mark[0] is not None:
        mark_vertical(axes, mark[0], mark[1])
    for index, (_, value, error) in enumerate(rows):
        style = index % len(COLOURS) if apart else 0
        if value is not None:
            axes.errorbar(
                [value], [index], xerr=None if error is None else [error], color=COLOURS[style], marker=MARKERS[style],
                markersize=9, capsize=5, linewidth=2.2,
            )  # fmt: skip
    axes.set_yticks(range(len(rows)), labels=[name for name, _, _ in rows])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(len(rows) - 0.5, -0.5)
    if from_zero:
        axes.set_xlim(0, 1.08 * max(value or 0.0 for _, value, _ in rows) or 1.0)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.set_xlabel(xlabel)
    write_picture(figure, path)


def plot_losses(found: Findings, text: str, path: Path, *, title: str) -> bool:
    """Loss on a text against length, a line for each variant that finished; whether there is any.

    Bars are errors of the change from the least length, which leave out that some texts are harder than others.
    """
    lengths, series = found.scale.lengths, []
    for variant in filter(found.finished, found.chosen.values()):
        losses = [found.losses(variant, text, length, found.window(variant)) for length in lengths]
        means = [found.mean_loss(variant, text, length)[0] or 0.0 for length in lengths]
        errors = [paired_gap(each, losses[0])[1] for each in losses]
        series.append(Series(variant.label, lengths, means, errors))
    if series:
        plot_loss_by_length(series, path, window=found.scale.sizes["W"], title=title)
    return bool(series)
