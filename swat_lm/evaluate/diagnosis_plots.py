"""Pictures of a diagnosis: heat maps by layer and head, and by layer and position."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from swat_lm.evaluate.diagnose import Diagnosis, LayerWeights
from swat_lm.evaluate.heatmaps import plot_heat_map
from swat_lm.evaluate.plots import short_number

__all__ = ["plot_diagnosis"]


# file, score function, field of LayerWeights (None: saturated weights) and what its colours mean
BY_HEAD = (
    ("first_token.png", "softmax", "first_token_mass", "weight of the first token"),
    ("first_token_sigmoid.png", "sigmoid", "first_token_mass", "weight of the first token"),
    ("row_sum.png", "sigmoid", "row_sum", "sum of a query's weights"),
    ("saturated.png", "sigmoid", None, "share of weights below 0.01 or above 0.99"),
)


def plot_diagnosis(diagnosis: Diagnosis, out: Path, *, title: str | None = None) -> list[Path]:
    """Write all pictures that the diagnosis has numbers for; returns their paths."""
    kinds = {layer.score_function for layer in diagnosis.weights if layer is not None}
    made = [
        by_head(diagnosis, out / name, kind, field, scale, title)
        for name, kind, field, scale in BY_HEAD if kind in kinds
    ]  # fmt: skip
    return [
        *made,
        by_position(diagnosis.output_norm, out / "output_norm.png", "layer", "norm of the mixer's output", title),
        by_position(diagnosis.hidden_variance, out / "variance.png", "before layer (last: after all)",
                    "log10 of the hidden state's variance", title, logarithm=True),
    ]  # fmt: skip


def by_head(diagnosis: Diagnosis, path: Path, kind: str, field: str | None, scale: str, title: str | None) -> Path:
    """One number per layer and head; heads of layers of another kind stay white."""

    def row(layer: LayerWeights | None, count: int) -> list[float | None]:
        if layer is None or layer.score_function != kind:
            return [None] * count
        if field is None:
            return [low + high for low, high in zip(layer.near_zero, layer.near_one, strict=True)]
        return list(getattr(layer, field))

    count = max(len(layer.row_sum) for layer in diagnosis.weights if layer is not None)
    values = [row(layer, count) for layer in diagnosis.weights]
    limits = None if field == "row_sum" else (0.0, 1.0)
    names = [str(layer) for layer in range(len(values))]
    columns = [str(head) for head in range(count)]
    plot_heat_map(values, path, rows=names, columns=columns, ylabel="layer", xlabel="head", scale=scale, title=title,
                  limits=limits)  # fmt: skip
    return path


def by_position(
    values: Sequence[Sequence[float]], path: Path, ylabel: str, scale: str, title: str | None, logarithm: bool = False
) -> Path:
    """Means over positions in bins that double, the first position by itself."""
    length = len(values[0])
    edges = [0, *(1 << power for power in range(math.ceil(math.log2(length)))), length]
    rows = []
    for norms in values:
        means = [sum(norms[low:high]) / (high - low) for low, high in itertools.pairwise(edges)]
        rows.append([math.log10(max(mean, 1e-30)) for mean in means] if logarithm else means)
    columns = [short_number(edge) for edge in edges[:-1]]
    plot_heat_map(rows, path, rows=[str(index) for index in range(len(rows))], columns=columns, ylabel=ylabel,
                  xlabel="position (first of a doubling range)", scale=scale, title=title)  # fmt: skip
    return path
