"""Papers' tables and figures run anew and judged, studies, the demo, and pages that compare runs."""

from typing import TYPE_CHECKING

from swat_lm.named_recipes import SUFFIXES
from swat_lm.papers.ecp import ECP
from swat_lm.papers.experiment import Experiment
from swat_lm.papers.longvq import LONGVQ
from swat_lm.papers.spade import SPADE
from swat_lm.papers.sparsek import SPARSEK
from swat_lm.papers.studies import load_study
from swat_lm.papers.swat import SWAT
from swat_lm.papers.taipan import TAIPAN
from swat_lm.words import did_you_mean

if TYPE_CHECKING:
    from swat_lm.papers.measured import MeasuredExperiment

PAPERS: dict[str, dict[str, Experiment]] = {
    "swat": SWAT,
    "spade": SPADE,
    "taipan": TAIPAN,
    "ecp": ECP,
    "sparsek": SPARSEK,
    "longvq": LONGVQ,
}
"""Tables and figures of each paper, by the names that `swat-lm reproduce` takes."""
MEASURED = ("blockwise",)
"""Papers whose claims are measured of models that nobody trains, by the same names (`find_measured`)."""

__all__ = ["MEASURED", "PAPERS", "find_experiment", "find_measured"]


def find_measured(name: str) -> "MeasuredExperiment":
    """One of `MEASURED`."""
    # which import torch, as names of other experiments need not
    from swat_lm.papers.blockwise import BLOCKWISE

    return BLOCKWISE[name]


def find_experiment(name: str) -> Experiment:
    """A paper's table or figure by its name, or a study by its file; raises ValueError naming the nearest."""
    known = {key: experiment for paper in PAPERS.values() for key, experiment in paper.items()}
    if name in known:
        return known[name]
    if name.endswith(SUFFIXES):
        return load_study(name)
    names = [*known, *MEASURED]
    raise ValueError(f"no experiment {name!r}{did_you_mean(name, names, '.')} Expected one of {', '.join(names)}")
