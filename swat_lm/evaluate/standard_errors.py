"""Means with their standard errors: of one sample, of independent parts together, over documents and seeds."""

import math
from collections.abc import Mapping, Sequence

__all__ = ["Samples", "joined_error", "mean_and_error", "pooled"]

Samples = Mapping[int, Sequence[float]]
"""Per seed, one value per document."""


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard error of the mean; None for one value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    spread = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(spread / len(values))


def joined_error(*errors: float | None) -> float | None:
    """The standard error of independent parts together, leaving out those that cannot be told; None without any."""
    known = [error for error in errors if error is not None]
    return math.sqrt(math.fsum(error**2 for error in known)) if known else None


def pooled(samples: Samples) -> tuple[float, float | None]:
    """Mean over documents and seeds and its standard error.

    The error joins the spread over documents (of values averaged over seeds) and, with several seeds, the spread over
    seeds (of values averaged over documents); None where neither can be told.
    """
    rows = [samples[seed] for seed in sorted(samples)]
    mean, over_seeds = mean_and_error([math.fsum(row) / len(row) for row in rows])
    _, over_documents = mean_and_error([math.fsum(column) / len(column) for column in zip(*rows, strict=True)])
    return mean, joined_error(over_documents, over_seeds)
