"""SPADE's scales: tiny (two cores), small (one GPU), paper (its WikiText-103 run). Data only.

W and L are the paper's window and training length, 512 and 3,072. Of the paper's run the shape, window, length and
number of updates are its script's; optimiser, tokenizer and the number of processes are ours.
"""

from swat_lm.papers.scales import Budget, Scale, shape

__all__ = ["SCALES", "STATE_SIZES"]

TINY = Scale(
    name="tiny",
    about="2M parameters, 1.0M tokens a variant; about 45 minutes a seed on two cores",
    budgets={"analysis": Budget(shape(144, 384, 4, 12), 500, 2048, 2e-3, 50, 2048)},
    sizes={"W": 32, "L": 256},
    lengths=(32, 256, 1024, 4096),
    pieces=16,
    text_bytes=24_000_000,
)

SMALL = Scale(
    name="small",
    about="41M parameters, 302M tokens a variant; for one GPU",
    budgets={"analysis": Budget(shape(576, 1536, 8, 12), 4600, 65_536, 1e-3, 300, 8192, 32_768)},
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

MINIATURE = Scale(
    name="miniature",
    about="for tests: everything runs, nothing is learnt",
    budgets={"analysis": Budget(shape(24, 32, 2, 4), 2, 128, 3e-3, 1, 300)},
    sizes={"W": 8, "L": 32},
    lengths=(8, 32, 64),
    pieces=2,
    text_bytes=40_000,
    held_out=0.2,
    for_people=False,
)

SCALES = {scale.name: scale for scale in (TINY, SMALL, PAPER, MINIATURE)}
STATE_SIZES = {"tiny": 16, "small": 64, "paper": 64, "miniature": 4}
"""N by scale; the paper's is 64."""
