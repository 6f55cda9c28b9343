"""The pictures of a reproduced table or figure."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.ticker import FuncFormatter, NullLocator

from swat_lm.evaluate.heatmaps import plot_heat_map
from swat_lm.evaluate.plots import (
    COLOURS,
    MARKERS,
    Series,
    mark_vertical,
    new_figure,
    plot_loss_by_length,
    plot_training,
    write_picture,
)
from swat_lm.papers.claims import paired_gap
from swat_lm.papers.findings import Findings
from swat_lm.papers.measuring import read_variances, windows_of
from swat_lm.papers.variants import Variant

__all__ = ["draw", "plot_rows"]

FIRST_POSITIONS = 12


def draw(findings: Findings, out: Path) -> dict[str, Path]:
    """Write the experiment's pictures as PNG files; returns them by their headings."""
    drawn: dict[str, Path] = {}
    name, scale = findings.experiment.name, findings.scale
    sizes = ", ".join(f"{one} = {scale.sizes[one]:,}" for one in ("W", "L", "XL")) + " tokens"
    if name == "table2":
        for text, heading in (("text", "Loss on held-out text"), ("books", "Loss on books")):
            path = out / f"table2-{text}.png"
            series = [length_series(findings, one, text) for one in findings.chosen.values() if findings.finished(one)]
            if not series:
                continue
            plot_loss_by_length(series, path, window=scale.sizes["W"], title=f"{sizes}; bars: error of the change")
            drawn[heading] = path
    elif name == "table3":
        for text, heading in (("text", "held-out text"), ("books", "books")):
            path, last = out / f"table3-{text}.png", scale.lengths[-1]
            rows = [(one.label, *findings.mean_loss(one, text, last)) for one in findings.chosen.values()]
            plot_rows(rows, path, xlabel=f"loss at {last:,} tokens on {heading} (nats per token)", title=sizes)
            drawn[f"Loss at {last:,} tokens on {heading}"] = path
    elif name == "figure2" and all(map(findings.finished, findings.chosen.values())):
        drawn["Loss of a softmax model behind windows it was not trained with"] = draw_windows(findings, out)
    elif name == "figure3":
        drawn |= draw_variances(findings, out)
    elif name == "figure5":
        drawn["Training loss"] = draw_training(findings, out)
    elif name == "table1":
        rows = [(one.label, *findings.mean_average(one)) for one in findings.chosen.values()]
        if any(value is not None for _, value, _ in rows):
            path = out / "table1.png"
            plot_rows(
                rows, path, xlabel="average accuracy of the eight tasks (%)", mark=(findings.guessing(), "guessing")
            )
            drawn["Average of the eight accuracies"] = path
    return drawn


def length_series(findings: Findings, one: Variant, text: str) -> Series:
    """Losses by length; bars are standard errors of the change since the shortest, so that harder texts do not show."""
    lengths, window = findings.scale.lengths, windows_of(findings.experiment, findings.scale, one)[0]
    losses = [findings.losses(one, text, length, window) for length in lengths]
    errors = [paired_gap(each, losses[0])[1] for each in losses]
    return Series(one.label, lengths, [findings.mean_loss(one, text, length)[0] or 0.0 for length in lengths], errors)


def draw_windows(findings: Findings, out: Path) -> Path:
    """Figure 2: windows by evaluation lengths, mean over seeds."""
    scale, (one,) = findings.scale, findings.chosen.values()
    windows = windows_of(findings.experiment, scale, one)
    values = [[findings.mean_loss(one, "text", length, window)[0] for length in scale.lengths] for window in windows]
    path = out / "figure2.png"
    plot_heat_map(
        values, path, rows=[f"{window:,}" for window in windows], columns=[f"{length:,}" for length in scale.lengths],
        ylabel="evaluation window (tokens)", xlabel="evaluation length (tokens)", scale="loss (nats per token)",
        title=f"trained with full attention on {scale.sizes[one.length]:,} tokens",
    )  # fmt: skip
    return path


def draw_variances(findings: Findings, out: Path) -> dict[str, Path]:
    """Figure 3: layers by first positions, the logarithm of the mean variance; first seed, one range of colours."""
    found = {}
    for one in findings.chosen.values():
        read = read_variances(findings.run_folder(one, findings.seeds[0]))
        if read is not None:
            found[one.name] = [[math.log10(max(x, 1e-12)) for x in layer[:FIRST_POSITIONS]] for layer in read["mean"]]
    if not found:
        return {}
    every = [x for layers in found.values() for layer in layers for x in layer]
    drawn = {}
    for name, layers in found.items():
        path = out / f"figure3-{name}.png"
        label = findings.chosen[name].label
        plot_heat_map(
            layers, path, rows=["embedding", *map(str, range(1, len(layers)))],
            columns=[str(place) for place in range(1, len(layers[0]) + 1)],
            ylabel="after layer", xlabel="position in the row (tokens)", scale="variance of hidden states (log10)",
            title=label, limits=(min(every), max(every)),
        )  # fmt: skip
        drawn[f"Variance of hidden states: {label}"] = path
    return drawn


def draw_training(findings: Findings, out: Path) -> Path:
    """Figure 5: training loss of the first seed, of a run that diverged as far as it came."""
    training = []
    for one in findings.chosen.values():
        lines = findings.training(one, findings.seeds[0])
        if not lines:
            continue
        training.append(Series(one.label, [line["tokens"] for line in lines], [line["loss"] for line in lines]))
    path = out / "figure5.png"
    plot_training(training, [], path)
    return path


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
