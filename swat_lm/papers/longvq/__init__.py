"""LongVQ (reconstruction, arXiv 2404.11163): its comparison with its parts, as `swat-lm reproduce` runs it."""

from swat_lm.papers.experiment import Experiment
from swat_lm.papers.longvq.claims import DOUBTFUL
from swat_lm.papers.longvq.losses import LossOfParts
from swat_lm.papers.longvq.variants import LABELS

__all__ = ["LONGVQ"]

LONGVQ: dict[str, Experiment] = {
    "longvq": LossOfParts(
        "longvq",
        "LongVQ (reconstruction) beside its parts and what it is said to beat",
        doubtful=DOUBTFUL,
        names=tuple(LABELS),
    )
}
