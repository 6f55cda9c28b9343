"""LongVQ's scales: tiny (two cores), small (one GPU), paper (a cluster; sizes of our own). Data only.

W stands for two blocks, what is near, and L for the row.
"""

from dataclasses import dataclass

from swat_lm.papers.scales import Budget, Scale, shape

__all__ = ["DIMENSIONS", "SCALES", "Dimensions"]


@dataclass(frozen=True)
class Dimensions:
    """What the layers need beside the budget's shape."""

    codes: int
    average_decay: float
    """Of the codebook: in short runs keys move on fast, and codes must follow."""
    key_size: int
    state_size: int
    """Of a state space of LongVQ."""
    recurrence: int
    """State size of Mamba-2 alone."""


TINY = Scale(
    name="tiny",
    about="1.4M parameters, 1.0M tokens a variant; for two cores",
    budgets={"analysis": Budget(shape(128, 168, 4, 4), 500, 2048, 2e-3, 50, 2048)},
    sizes={"W": 64, "L": 512},
    lengths=(512, 2048),
    pieces=64,
    text_bytes=24_000_000,
)

SMALL = Scale(
    name="small",
    about="34M parameters, 302M tokens a variant; for one GPU",
    budgets={"analysis": Budget(shape(512, 680, 8, 8), 4600, 65_536, 1e-3, 300, 8192, 32_768)},
    sizes={"W": 256, "L": 2048},
    lengths=(2048, 8192, 32_768),
    pieces=64,
)

PAPER = Scale(
    name="paper",
    about="a size of our own, since the paper's are not known: 164M parameters, 16.4B tokens a variant; for a cluster",
    budgets={
        "analysis": Budget(
            shape(768, 1024, 12, 12), 125_000, 131_072, 4e-4, 2000, 50_257, 32_768,
            "hub:Salesforce/wikitext:wikitext-103-raw-v1:train", "openai-community/gpt2",
        ),
    },
    sizes={"W": 1024, "L": 4096},
    lengths=(4096, 16_384),
    pieces=64,
    held_out=0.02,
)  # fmt: skip

MINIATURE = Scale(
    name="miniature",
    about="for tests: everything runs, nothing is learnt",
    budgets={"analysis": Budget(shape(32, 40, 2, 4), 3, 128, 3e-3, 1, 300)},
    sizes={"W": 8, "L": 32},
    lengths=(32,),
    pieces=4,
    text_bytes=60_000,
    held_out=0.2,
    for_people=False,
)

SCALES = {scale.name: scale for scale in (TINY, SMALL, PAPER, MINIATURE)}
DIMENSIONS = {
    "tiny": Dimensions(64, 0.9, 64, 16, 24),
    "small": Dimensions(256, 0.99, 128, 16, 40),
    "paper": Dimensions(512, 0.99, 128, 16, 48),
    "miniature": Dimensions(8, 0.9, 8, 4, 4),
}
"""By scale."""
