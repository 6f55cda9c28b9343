"""ECP's scales: tiny (two cores), small (one GPU), paper (the official code's defaults). Data only.

W stands for two segments, 512 tokens there, H for one and a half, l for latents, and L for the row, 2,048.
"""

from swat_lm.papers.scales import TEXT_BYTES, Budget, Scale, miniature, shape, small_budget, tiny_budget

__all__ = ["SCALES"]


def sizes(segment: int) -> dict[str, int]:
    """Of rows of eight segments, half of them latents."""
    return {"W": 2 * segment, "H": segment * 3 // 2, "l": 4 * segment, "L": 8 * segment}


CODE = {"norm": "layer", "feed_forward": "plain", "hidden_act": "gelu_pytorch_tanh", "mlp_bias": True}
"""The layer around attention in the official code."""

TINY = Scale(
    name="tiny",
    about="1.3M parameters, 1.0M tokens a variant; for two cores",
    budgets={"analysis": tiny_budget(shape(128, 352, 4, 4))},
    sizes=sizes(32),
    lengths=(256,),
    pieces=256,
    text_bytes=TEXT_BYTES,
)

SMALL = Scale(
    name="small",
    about="34M parameters, 302M tokens a variant; for one GPU",
    budgets={"analysis": small_budget(shape(512, 1408, 8, 8))},
    sizes=sizes(128),
    lengths=(1024,),
    pieces=512,
)

PAPER = Scale(
    name="paper",
    about="the official code's sizes, rate and steps: 130M parameters and 16.4B tokens a variant; for a cluster",
    budgets={
        "analysis": Budget(
            {**shape(768, 3072, 12, 6), **CODE}, 500_000, 32_768, 2e-4, 1000, 28_996, 16_384,
            "hub:Salesforce/wikitext:wikitext-103-raw-v1:train", "google-bert/bert-base-cased", 0.03125,
        ),
    },
    sizes=sizes(256),
    lengths=(2048,),
    pieces=512,
    held_out=0.02,
)  # fmt: skip

MINIATURE = miniature(shape(32, 48, 3, 4), sizes(4), (32,), pieces=4)

SCALES = {scale.name: scale for scale in (TINY, SMALL, PAPER, MINIATURE)}
