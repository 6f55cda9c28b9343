"""Papers' tables and figures run anew and judged, studies, the demo, and pages that compare runs."""

from swat_lm.named_recipes import SUFFIXES
from swat_lm.papers.ecp import ECP
from swat_lm.papers.experiment import Experiment
from swat_lm.papers.longvq import LONGVQ
from swat_lm.papers.spade import SPADE
from swat_lm.papers.studies import load_study
from swat_lm.papers.swat import SWAT
from swat_lm.papers.taipan import TAIPAN
from swat_lm.words import did_you_mean

PAPERS: dict[str, dict[str, Experiment]] = {
    "swat": SWAT,
    "spade": SPADE,
    "taipan": TAIPAN,
    "ecp": ECP,
    "longvq": LONGVQ,
}
"""Tables and figures of each paper, by the names that `swat-lm reproduce` takes."""

__all__ = ["PAPERS", "find_experiment"]


def find_experiment(name: str) -> Experiment:
    """A paper's table or figure by its name, or a study by its file; raises ValueError naming the nearest."""
    known = {key: experiment for paper in PAPERS.values() for key, experiment in paper.items()}
    if name in known:
        return known[name]
    if name.endswith(SUFFIXES):
        return load_study(name)
    raise ValueError(f"no experiment {name!r}{did_you_mean(name, known, '.')} Expected one of {', '.join(known)}")
