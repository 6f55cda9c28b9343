"""LongVQ's claims as data (arXiv 2404.11163), those of the controls, and what is doubtful in a reconstruction."""

from swat_lm.papers.loss_claims import Claim, Loss

__all__ = ["CLAIMS", "DOUBTFUL", "TEXT"]

TEXT = "text"
ABSTRACT = "abstract: better than Transformers, convolutions and state spaces, without numbers here"
CONTROL = "a control of the reconstruction: what a part is good for"
OURS = "not in the paper: this project's variants"


def lower(says: str, paper: str, worse: str, better: str, length: str = "L") -> Claim:
    """That one model has a lower loss on held-out text than another."""
    return Claim(says, paper, Loss(worse, TEXT, length), Loss(better, TEXT, length))


CLAIMS = (
    lower("LongVQ has a lower loss than the same block without attention", CONTROL, "no-attention", "longvq"),
    lower("LongVQ has a lower loss than the same block without a state space", CONTROL, "no-ssm", "longvq"),
    lower("keys as they are have a lower loss than quantised ones (to be matched: undecided or broken is what LongVQ "
          "needs)", CONTROL, "longvq", "exact"),
    lower("LongVQ has a lower loss than with a quarter of the codes", CONTROL, "fewer-codes", "longvq"),
    lower("LongVQ has a lower loss than the same block whose dead codes stay dead", CONTROL, "dead-codes", "longvq"),
    lower("LongVQ has a lower loss than full attention", ABSTRACT, "full-attention", "longvq"),
    lower("LongVQ has a lower loss than Mamba-2 alone", ABSTRACT, "ssm-only", "longvq"),
    lower("LongVQ has a lower loss than Mamba-2 alone at the greatest length", ABSTRACT, "ssm-only", "longvq", "last"),
    lower("LongVQ has a lower loss than a softmax window of as many near keys, two blocks", OURS, "window", "longvq"),
    lower("SWAT's window of two blocks has a lower loss than LongVQ", OURS, "longvq", "swat"),
)  # fmt: skip

DOUBTFUL = (
    "A reconstruction: the paper's text, tables and code could not be consulted. The wiring is Mega's, the attention "
    "Transformer-VQ's; that LongVQ joins them so is inferred.",
    "No size, codebook or schedule of the paper is known; those here are ours, at the scale called paper too.",
    "Its other claims (Long Range Arena, images, speech) are not judged here; ListOps has a measurement of its own: "
    "docs/experiments.md.",
)
"""Shown beside the verdicts."""
