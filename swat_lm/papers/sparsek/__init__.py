"""SPARSEK (arXiv 2406.16747): its comparison with controls, as `swat-lm reproduce` runs it."""

from swat_lm.papers.experiment import Experiment
from swat_lm.papers.sparsek.claims import DOUBTFUL
from swat_lm.papers.sparsek.losses import LossOfSelections
from swat_lm.papers.sparsek.variants import LABELS

__all__ = ["SPARSEK"]

SPARSEK: dict[str, Experiment] = {
    "sparsek": LossOfSelections(
        "sparsek", "SPARSEK beside other selections, windows and full attention", doubtful=DOUBTFUL, names=tuple(LABELS)
    )
}
