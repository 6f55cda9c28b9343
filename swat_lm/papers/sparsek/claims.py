"""SPARSEK's claims as data (arXiv 2406.16747), those of the controls that it lacks, and what is doubtful in it."""

from swat_lm.papers.by_length import lower

__all__ = ["CLAIMS", "DOUBTFUL"]

ABSTRACT = "abstract, without numbers here"
CONTROL = "not in the paper: learned scores in the place of others"
ABLATION = "not in the paper's text that we could read"
OURS = "not in the paper: this project's score function"
MATCHED = "(to be matched: undecided or broken is what SPARSEK needs)"

CLAIMS = (
    lower("SPARSEK has a lower loss than its window alone", ABSTRACT, "window", "sparsek", "L"),
    lower("SPARSEK has a lower loss than its window alone at the greatest length", ABSTRACT, "window", "sparsek"),
    lower("SPARSEK has a lower loss than a window of as many keys as it sees, k + W", ABSTRACT, "window-wide",
          "sparsek", "L"),
    lower("SPARSEK has a lower loss than a window of k + W at the greatest length", ABSTRACT, "window-wide", "sparsek"),
    lower("SPARSEK has a lower loss than with k keys by chance", CONTROL, "random", "sparsek", "L"),
    lower("SPARSEK has a lower loss than with the k most recent keys", CONTROL, "recent", "sparsek", "L"),
    lower(f"full attention has a lower loss than SPARSEK {MATCHED}", ABSTRACT, "sparsek", "full-attention", "L"),
    lower("SPARSEK has a lower loss than full attention at the greatest length (robust length extrapolation)", ABSTRACT,
          "full-attention", "sparsek"),
    lower("a window beside it lowers SPARSEK's loss at equal keys", ABLATION, "no-window", "sparsek", "L"),
    lower("soft values with hard keys have a lower loss than soft values and keys", ABLATION, "both", "sparsek", "L"),
    lower("soft values with hard keys have a lower loss than a hard mask with the soft one's gradient", ABLATION,
          "straight", "sparsek", "L"),
    lower("sigmoid has a lower loss than softmax over the same selection", OURS, "sparsek", "sparsek-sigmoid", "L"),
    lower("SWAT's window of k + W has a lower loss than SPARSEK", OURS, "sparsek", "swat", "L"),
)  # fmt: skip
"""In the order of the page."""

DOUBTFUL = (
    "The paper's text and tables could not be consulted: claims are those of its abstract and of summaries.",
    "Sizes, k, W and learning rates are not known to us; ours are k = W at every scale.",
    "What masks keys and what masks values by default is not known to us; ours are hard keys and soft values.",
    "The paper's scores may be normalised over time; ours are not.",
    "Scores do not depend on the query: a token that looked of no use when it was read cannot be recalled.",
)
"""Shown beside the verdicts."""
