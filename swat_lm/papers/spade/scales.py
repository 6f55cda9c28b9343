"""SPADE's scales: tiny (two cores), small (one GPU), paper (its WikiText-103 run). Data only.

W and L are the paper's window and training length, 512 and 3,072. Of the paper's run the shape, window, length and
number of updates are its script's; optimiser, tokenizer and the number of processes are ours.
"""

from swat_lm.papers.scales import TEXT_BYTES, Budget, Scale, miniature, shape, small_budget, tiny_budget

__all__ = ["SCALES", "STATE_SIZES"]

TINY = Scale(
    name="tiny",
    about="2M parameters, 1.0M tokens a variant; about 45 minutes a seed on two cores",
    budgets={"analysis": tiny_budget(shape(144, 384, 4, 12))},
    sizes={"W": 32, "L": 256},
    lengths=(32, 256, 1024, 4096),
    pieces=16,
    text_bytes=TEXT_BYTES,
)

SMALL = Scale(
    name="small",
    about="41M parameters, 302M tokens a variant; for one GPU",
    budgets={"analysis": small_budget(shape(576, 1536, 8, 12))},
    sizes={"W": 128, "L": 1024},
    lengths=(128, 1024, 4096, 16_384),
    pieces=16,
)

PAPER = Scale(
    name="paper",
    about="the paper's WikiText-103 model: 16 layers of width 1,024, 286,000 updates; for a cluster",
    budgets={
        "analysis": Budget(
            shape(1024, 4096, 16, 8), 286_000, 73_728, 3e-4, 16_000, 50_257, 9216,
            "hub:Salesforce/wikitext:wikitext-103-raw-v1", "openai-community/gpt2",
        ),
    },
    sizes={"W": 512, "L": 3072},
    lengths=(512, 3072, 12_288),
    pieces=64,
    held_out=0.005,
)  # fmt: skip

MINIATURE = miniature(shape(24, 32, 2, 4), {"W": 8, "L": 32}, (8, 32, 64), steps=2, text_bytes=40_000)

SCALES = {scale.name: scale for scale in (TINY, SMALL, PAPER, MINIATURE)}
STATE_SIZES = {"tiny": 16, "small": 64, "paper": 64, "miniature": 4}
"""N by scale; the paper's is 64."""
