"""Verdicts on claims: held or broken only beyond twice the standard error of a paired gap.

A gap is what the claim says is positive. It is paired over documents, and over seeds where there are several.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from swat_lm.evaluate.curves import mean_and_error

__all__ = ["Samples", "Verdict", "joined_error", "judge", "paired_gap", "pooled"]

Samples = Mapping[int, Sequence[float]]
"""Per seed, one value per document."""


@dataclass(frozen=True)
class Verdict:
    """What the measured gap says about a claim."""

    says: str
    paper: str
    """The paper's own numbers for it; empty for a claim that is no paper's."""
    outcome: str
    """held, broken, `undecided at this scale`, or `not measured`."""
    gap: float | None
    error: float | None
    num_documents: int
    num_seeds: int
    remark: str = ""


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


def paired_gap(worse: Samples, better: Samples) -> tuple[float, float | None, int, int]:
    """Mean of `worse - better`, its standard error (see `pooled`), documents and seeds.

    Raises ValueError without common seeds.
    """
    seeds = sorted(worse.keys() & better.keys())
    if not seeds:
        raise ValueError("no seed has both sides of the gap")
    gaps = {seed: [a - b for a, b in zip(worse[seed], better[seed], strict=True)] for seed in seeds}
    return *pooled(gaps), len(gaps[seeds[0]]), len(seeds)


def judge(says: str, paper: str, worse: Samples | None, better: Samples | None, remark: str = "") -> Verdict:
    """Held if the gap exceeds twice its standard error, broken if its opposite does, else undecided."""
    if worse is None or better is None or not worse.keys() & better.keys():
        return Verdict(says, paper, "not measured", None, None, 0, 0, remark)
    gap, error, documents, seeds = paired_gap(worse, better)
    outcome = "undecided at this scale"
    if error is not None and abs(gap) > 2 * error:
        outcome = "held" if gap > 0 else "broken"
    return Verdict(says, paper, outcome, gap, error, documents, seeds, remark)
