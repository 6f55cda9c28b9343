"""ECP (arXiv 2412.06106): its comparison with Perceivers and controls, as `swat-lm reproduce` runs it."""

from swat_lm.papers.ecp.claims import DOUBTFUL
from swat_lm.papers.ecp.losses import LossOfSegments
from swat_lm.papers.ecp.variants import LABELS
from swat_lm.papers.experiment import Experiment

__all__ = ["ECP"]

ECP: dict[str, Experiment] = {
    "ecp": LossOfSegments(
        "ecp", "ECP beside the Perceivers and the controls it lacks", doubtful=DOUBTFUL, names=tuple(LABELS)
    )
}
