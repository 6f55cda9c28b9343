"""Taipan (arXiv 2410.18572): its comparison and its ablation as objects that `swat-lm reproduce` runs."""

from swat_lm.papers.experiment import Experiment
from swat_lm.papers.taipan.claims import DOUBTFUL
from swat_lm.papers.taipan.losses import LossOfHybrids
from swat_lm.papers.taipan.variants import CAPACITIES, CONTROLS

__all__ = ["TAIPAN"]

EXPERIMENTS = (
    LossOfHybrids(
        "taipan",
        "Taipan beside the paper's baselines and the controls it lacks",
        doubtful=DOUBTFUL["taipan"],
        names=("taipan", *CONTROLS, "jamba", "transformer", "taipan-sigmoid", "samba-swat"),
    ),
    LossOfHybrids(
        "taipan-capacity",
        "Taipan's ablation: how many tokens look back",
        doubtful=DOUBTFUL["taipan-capacity"],
        names=("taipan", *(f"taipan-{round(100 * share)}" for share in CAPACITIES)),
    ),
)
TAIPAN: dict[str, Experiment] = {experiment.name: experiment for experiment in EXPERIMENTS}
