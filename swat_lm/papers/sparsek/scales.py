"""SPARSEK's scales: tiny (two cores), small (one GPU), paper (a size of ours: its is unknown). Data only.

W stands for the window and for k, 2W for what is seen of both, and L for the training length.
"""

from swat_lm.papers.scales import TEXT_BYTES, Budget, Scale, miniature, shape, small_budget

__all__ = ["SCALES"]


def sizes(window: int, length: int) -> dict[str, int]:
    """As many keys selected as the window has."""
    return {"W": window, "2W": 2 * window, "L": length}


TINY = Scale(
    name="tiny",
    about="0.8M parameters, 0.3M tokens a variant; a quarter of an hour of one core a seed",
    budgets={"analysis": Budget(shape(96, 256, 4, 4), 160, 2048, 2e-3, 30, 2048)},
    sizes=sizes(32, 256),
    lengths=(256, 1024),
    pieces=32,
    text_bytes=TEXT_BYTES,
)

SMALL = Scale(
    name="small",
    about="34M parameters, 302M tokens a variant; for one GPU",
    budgets={"analysis": small_budget(shape(512, 1408, 8, 8))},
    sizes=sizes(128, 1024),
    lengths=(1024, 4096, 16_384),
    pieces=16,
)

PAPER = Scale(
    name="paper",
    about="124M parameters and 13B tokens of OpenWebText a variant, ours; for a cluster",
    budgets={
        "analysis": Budget(
            {**shape(768, 2048, 12, 12), "tie_word_embeddings": True}, 50_000, 262_144, 6e-4, 1000, 50_257, 32_768,
            "hub:Skylion007/openwebtext", "openai-community/gpt2",
        ),
    },
    sizes=sizes(512, 4096),
    lengths=(4096, 16_384, 65_536),
    pieces=32,
    held_out=0.0005,
)  # fmt: skip

MINIATURE = miniature(shape(32, 48, 2, 4), sizes(4, 32), (32, 64))

SCALES = {scale.name: scale for scale in (TINY, SMALL, PAPER, MINIATURE)}
