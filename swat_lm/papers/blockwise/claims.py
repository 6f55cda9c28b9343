"""Blockwise parallel transformers' claims (arXiv 2305.19370) as data, the controls it lacks, and ours."""

from collections.abc import Mapping
from typing import NamedTuple

from swat_lm.papers.blockwise.methods import METHODS
from swat_lm.papers.blockwise.scales import Measure
from swat_lm.papers.measured import Results
from swat_lm.papers.verdicts import Verdict

__all__ = ["DOUBTFUL", "judged"]

EXACT = 1e-10
"""Most that gradients in float64 may differ and be called the same."""
WITHIN = 0.2
"""Most that a counted peak may differ from the predicted one."""

DOUBTFUL = (
    "The paper's tables of greatest lengths and of throughput could not be consulted: claims are the abstract's, and "
    "the printed thousands of tokens those of Ring Attention's table 3, as a third party notes them.",
    "How much longer than vanilla depends on the memory: scores grow with the square of the row, the rest with the "
    "row. Twice the memory makes the ratio larger by about the root of two.",
    "Vanilla here is our definition of attention under autograd, which holds several matrices of all pairs in float32; "
    "the paper's accounting has one in two bytes. One that held a fourth would read rows twice as long.",
    "The paper's own memory-efficient baseline keeps or recomputes what its framework chose; ours holds what PyTorch's "
    "autograd saves of a layer whose attention saves queries, keys and values alone.",
    "Peaks are of live tensors: what kernels and PyTorch's allocator take beside them is not counted, nor, where "
    "weights are shared out, what is gathered of a layer at a time.",
)


class Longer(NamedTuple):
    """That one method reads rows so many times as long as another in the same memory."""

    says: str
    paper: str
    better: str
    worse: str
    times: float


ABSTRACT = "abstract"
CONTROL, OURS = "not in the paper: a control", "not in the paper: this project's execution"
LONGER = (
    Longer("blockwise reads rows 32 times as long as vanilla", ABSTRACT, "blockwise", "vanilla", 32),
    Longer("blockwise reads rows 4 times as long as memory-efficient attention (the paper: up to 4)", ABSTRACT,
           "blockwise", "memory-efficient", 4),
    Longer("blockwise reads longer rows than layers that are checkpointed whole", CONTROL,
           "blockwise", "checkpoint", 1),
    Longer("with a window, blockwise reads longer rows than layers that are checkpointed whole", CONTROL,
           "window-blockwise", "window-checkpoint", 1),
    Longer("with a window, reverse chunks read rows 4 times as long as blockwise", OURS, "window-chunks",
           "window-blockwise", 4),
)  # fmt: skip


def judged(found: Results, measure: Measure) -> list[Verdict]:
    """The outcome of every claim, of every size of model."""
    verdicts = [exact(found["exact"])] if "exact" in found else []
    for size in measure.sizes:
        of = {name: found[f"{size.name}-{name}"] for name in METHODS}
        prefix = f"{size.name}: " if len(measure.sizes) > 1 else ""
        verdicts += [longer(claim, of, prefix) for claim in LONGER]
    counted = [point for each in found.values() for point in each.get("points", ())]
    if counted:
        worst = max(abs(point["counted"] / point["predicted"] - 1) for point in counted)
        outcome = "held" if worst <= WITHIN else "broken"
        remark = f"{len(counted)} passes, the worst off by {worst:.1%}."
        says = f"peaks are as predicted, to within {WITHIN:.0%}"
        verdicts.append(Verdict(says, OURS, outcome, None, None, 0, 0, remark))
    return verdicts


def exact(found: Results) -> Verdict:
    """That nothing is approximated."""
    worst = max(max(each.values()) for each in found.values())
    name = max(found, key=lambda name: max(found[name].values()))
    remark = f"Largest difference in float64, relative to the largest number of a weight: {worst:.1e} ({name})."
    return Verdict(
        "loss and all gradients are those of attention over all scores", "stated: exact attention, no approximation",
        "held" if worst <= EXACT else "broken", None, None, 0, 0, remark,
    )  # fmt: skip


def longer(claim: Longer, of: Mapping[str, Results], prefix: str) -> Verdict:
    """Of the longest rows that fit."""
    better, worse = of[claim.better]["longest"], of[claim.worse]["longest"]
    if not worse:
        remark, outcome = f"Not even a row of 64 tokens fits {claim.worse}.", "not measured"
    else:
        ratio = better / worse
        outcome = "held" if (ratio >= claim.times if claim.times > 1 else ratio > 1) else "broken"
        remark = f"{better:,} tokens beside {worse:,}: {ratio:.1f} times."
    return Verdict(f"{prefix}{claim.says}", claim.paper, outcome, None, None, 0, 0, remark)
