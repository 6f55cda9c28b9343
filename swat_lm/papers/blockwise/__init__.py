"""Blockwise parallel transformers (arXiv 2305.19370): its claim on memory, measured beside its controls and ours."""

from swat_lm.papers.blockwise.claims import DOUBTFUL
from swat_lm.papers.blockwise.memory import BlockwiseMemory

__all__ = ["BLOCKWISE"]

BLOCKWISE = {
    "blockwise": BlockwiseMemory(
        "blockwise",
        "Blockwise parallel transformers: the longest row in a given memory",
        DOUBTFUL,
        "A row fits where the predicted peak of a training step, with weights, gradients and AdamW, does. Held or "
        "broken by that length alone: nothing is drawn, so there is no error.",
    )
}
