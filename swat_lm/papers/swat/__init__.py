"""SWAT (arXiv 2502.18845): its tables and figures as objects that `swat-lm reproduce` runs."""

from swat_lm.papers.experiment import Experiment
from swat_lm.papers.swat.benchmarks import Benchmarks
from swat_lm.papers.swat.claims import DOUBTFUL, PRINTED
from swat_lm.papers.swat.losses import BehindWindows, LossByLength, LossOfModules, TrainingLoss
from swat_lm.papers.swat.variances import StateVariance
from swat_lm.papers.swat.variants import SwatExperiment

__all__ = ["SWAT"]

EXPERIMENTS: tuple[SwatExperiment, ...] = (
    Benchmarks("table1", "Table 1: benchmarks at equal size", doubtful=DOUBTFUL["table1"]),
    LossByLength(
        "table2",
        "Table 2: training and evaluation length",
        ("vanilla-softmax-short", "vanilla-softmax-long", "sliding-softmax", "sliding-softmax-4w",
         "sliding-softmax-xl"),
        printed=PRINTED["table2"],
        doubtful=DOUBTFUL["table2"],
    ),
    LossOfModules(
        "table3",
        "Table 3: ablation of score function, slopes and rotary",
        ("vanilla-softmax-short", "vanilla-sigmoid-short", "sliding-softmax", "sliding-alibi-12-0",
         "sliding-alibi-8-4", "sliding-alibi-6-6", "sliding-alirope", "alirope-wide", "vanilla-softmax-long",
         "vanilla-sigmoid-long"),
        printed=PRINTED["table3"],
        doubtful=DOUBTFUL["table3"],
    ),
    BehindWindows(
        "figure2", "Figure 2: softmax models behind a window they were not trained with", ("vanilla-softmax-long",)
    ),
    StateVariance(
        "figure3",
        "Figure 3: variance of hidden states by layer and position",
        ("vanilla-softmax-long", "sliding-softmax", "sliding-alirope"),
    ),
    TrainingLoss(
        "figure5",
        "Figure 5: training loss of the module ablations",
        ("sliding-softmax", "sliding-alibi-12-0", "sliding-alibi-8-4", "sliding-alibi-6-6", "sliding-alirope"),
    ),
)  # fmt: skip
SWAT: dict[str, Experiment] = {experiment.name: experiment for experiment in EXPERIMENTS}
