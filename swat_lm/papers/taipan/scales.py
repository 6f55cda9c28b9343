"""Taipan's scales: tiny (two cores), small (one GPU), paper (the 190M model on a cluster). Data only.

W and L stand for the paper's window and training length, 2,048 and 4,096; smaller scales keep their ratio.
"""

from dataclasses import dataclass

from swat_lm.papers.scales import TEXT_BYTES, Budget, Scale, miniature, shape, small_budget, tiny_budget

__all__ = ["DIMENSIONS", "SCALES", "Dimensions"]


@dataclass(frozen=True)
class Dimensions:
    """What the compared models need beside the budget's shape, so that all have about as many parameters."""

    groups: int
    """Of six recurrences and one layer of attention."""
    state_size: int
    """Of every recurrence."""
    samba: int
    """Width of the feed-forward where recurrences and attention alternate."""
    transformer: int
    """The same where every layer is attention."""


TINY = Scale(
    name="tiny",
    about="1.4M parameters, 1.0M tokens a variant; for two cores",
    budgets={"analysis": tiny_budget(shape(128, 352, 7, 4))},
    sizes={"W": 128, "L": 256},
    lengths=(128, 256, 1024, 4096),
    pieces=16,
    text_bytes=TEXT_BYTES,
)

SMALL = Scale(
    name="small",
    about="35M parameters, 302M tokens a variant; for one GPU",
    budgets={"analysis": small_budget(shape(512, 1408, 14, 8))},
    sizes={"W": 512, "L": 1024},
    lengths=(512, 1024, 4096, 16_384, 65_536),
    pieces=16,
)

PAPER = Scale(
    name="paper",
    about="the paper's smallest: 188M parameters and 27B tokens a variant; for a cluster",
    budgets={
        "analysis": Budget(
            {**shape(768, 2048, 21, 12), "tie_word_embeddings": True}, 51_498, 524_288, 5e-4, 2000, 128_256, 32_768,
            "hub:HuggingFaceTB/smollm-corpus:cosmopedia-v2", "NousResearch/Meta-Llama-3-8B",
        ),
    },
    sizes={"W": 2048, "L": 4096},
    lengths=(2048, 4096, 16_384, 65_536),
    pieces=64,
    held_out=0.0005,
)  # fmt: skip

MINIATURE = miniature(shape(32, 48, 7, 4), {"W": 16, "L": 32}, (16, 32, 64))

SCALES = {scale.name: scale for scale in (TINY, SMALL, PAPER, MINIATURE)}
DIMENSIONS = {
    "tiny": Dimensions(1, 32, 288, 384),
    "small": Dimensions(2, 64, 1088, 1472),
    "paper": Dimensions(3, 128, 1632, 2208),
    "miniature": Dimensions(1, 8, 24, 128),
}
"""By scale."""
