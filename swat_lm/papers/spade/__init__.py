"""SPADE (arXiv 2212.08136): the system beside its controls and ablations, as one experiment."""

from swat_lm.papers.experiment import Experiment
from swat_lm.papers.spade.losses import SpadeLosses

__all__ = ["SPADE"]

SPADE: dict[str, Experiment] = {
    "spade": SpadeLosses(
        "spade",
        "SPADE: a state space at the bottom of a stack of windows",
        doubtful=(
            "The paper's tables were not at hand, so no printed number stands beside ours; a benchmark aggregator "
            "quotes WikiText-103 perplexities of 24.18 (validation) and 24.55 (test) without saying of which variant.",
            "The released code's own default is fusion by addition with a state space in every layer, which its run "
            "script overrides; the paper's formula is concatenation in the bottom layer.",
        ),
    )
}
