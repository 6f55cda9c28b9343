"""ECP's claims as data (arXiv 2412.06106), those of the controls that it lacks, and what is doubtful in it."""

from swat_lm.papers.loss_claims import Claim, Loss

__all__ = ["CLAIMS", "DOUBTFUL", "TEXT"]

TEXT = "text"
"""Held out from training. Its curves here are of whole rows, since Perceivers have no streams."""
ABSTRACT, NONE = "abstract, without numbers here", "not in the paper: a control that its reviewers asked for"
OURS = "not in the paper: this project's variants"


def lower(says: str, paper: str, worse: str, better: str) -> Claim:
    """That one model has a lower loss on held-out text than another."""
    return Claim(says, paper, Loss(worse, TEXT, "L"), Loss(better, TEXT, "L"))


CLAIMS = (
    lower("ECP has a lower loss than Perceiver AR", ABSTRACT, "perceiver-ar", "ecp"),
    lower("ECP has a lower loss than V1", ABSTRACT, "perceiver-v1", "ecp"),
    lower("ECP has a lower loss than V2", ABSTRACT, "perceiver-v2", "ecp"),
    lower("ECP has a lower loss than V3", ABSTRACT, "perceiver-v3", "ecp"),
    lower("V1 has a lower loss than Perceiver AR", ABSTRACT, "perceiver-ar", "perceiver-v1"),
    lower("V1 has a lower loss than V2", ABSTRACT, "perceiver-v2", "perceiver-v1"),
    lower("V1 has a lower loss than V3", ABSTRACT, "perceiver-v3", "perceiver-v1"),
    lower("ECP has a lower loss than disjoint segments of 2m", NONE, "disjoint", "ecp"),
    lower("ECP has a lower loss than a window of as many keys as it executes, 2m", NONE, "window", "ecp"),
    lower("ECP has a lower loss than a window of as many keys as it uses, 1.5m", NONE, "window-short", "ecp"),
    lower("full attention has a lower loss than ECP (to be matched: undecided or broken is what ECP needs)", NONE,
          "ecp", "full-attention"),
    lower("ECP has a lower loss than with separate keys and values and one output projection", NONE, "apart", "ecp"),
    lower("sigmoid has a lower loss than softmax in ECP's layers", OURS, "ecp", "ecp-sigmoid"),
    lower("SWAT's window of 2m has a lower loss than ECP", OURS, "ecp", "swat"),
)  # fmt: skip

DOUBTFUL = (
    "The tables of perplexity could not be consulted: claims are those of the abstract.",
    "A reviewer notes that ECP at 2,048 tokens is compared with Perceiver AR at 1,024; here all read the same rows.",
    "The official code validates on the test set, and its perplexity is per WordPiece, not per word.",
    "Here nothing is selected on any text: losses are of the last step, in nats per token.",
    "The code halves its rate every 100,000 steps and has dropout; here a cosine with warm-up, and no dropout.",
    "The share of latents is not known to us; ours is half of the row, so Perceivers learn from half of the tokens.",
    "Mathematically ECP is block-local attention with one block of look-back: nothing is seen beyond (layers + 1) m.",
)
"""Shown beside the verdicts."""
