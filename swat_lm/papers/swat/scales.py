"""SWAT's scales: tiny (two cores), small (one GPU), paper (a cluster), and Table 1's models at each. Data only.

W, L, XL stand for the paper's windows and lengths 128, 1,024 and 4,096; smaller scales keep their ratios. BW and BL are
Table 1's window and training length.
"""

from collections.abc import Mapping
from typing import Any

from swat_lm.papers.scales import TEXT_BYTES, Budget, Scale, shape, small_budget, tiny_budget

__all__ = ["SCALES", "TABLE1"]


def deltanet(key_heads: int, value_heads: int, size: int) -> dict[str, Any]:
    """Keys half as wide as values, so that a layer is as large as one of attention."""
    return {
        "architecture": "gated_deltanet",
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": size,
        "linear_value_head_dim": size,
    }


def mamba2(layers: int, heads: int, size: int, state: int) -> dict[str, Any]:
    """About two layers for each of a Transformer, since Mamba2 has no feed-forward."""
    return {
        "architecture": "mamba2",
        "num_hidden_layers": layers,
        "num_heads": heads,
        "head_dim": size,
        "state_size": state,
        "n_groups": 1,
        "initializer_range": 0.02,
    }


LLAMA: Mapping[str, Any] = {"architecture": "llama"}
MISTRAL: Mapping[str, Any] = {"architecture": "mistral", "sliding_window": "BW"}
SWAT: dict[str, Mapping[str, Any]] = {
    "swat-negative": {"slopes": "negative", "slope_schedule": "alibi", "sliding_window": "BW"},
    "swat-positive": {"slopes": "positive", "slope_schedule": "alibi", "sliding_window": "BW"},
    "swat-balanced": {"slopes": "balanced", "sliding_window": "BW"},
}

TINY_BUDGET = tiny_budget(shape(144, 384, 4, 12))
TINY = Scale(
    name="tiny",
    about="2M parameters, 1.0M tokens a variant; about 40 minutes a seed on two cores for everything but Table 1",
    budgets={"analysis": TINY_BUDGET, "benchmarks": TINY_BUDGET},
    sizes={"W": 32, "4W": 128, "L": 256, "XL": 1024, "BW": 64, "BL": 256},
    lengths=(32, 256, 1024, 4096),
    pieces=16,
    text_bytes=TEXT_BYTES,
    task_limit=200,
)

SMALL_BUDGET = small_budget(shape(576, 1536, 8, 12))
SMALL = Scale(
    name="small",
    about="41M parameters, 302M tokens a variant; for one GPU",
    budgets={"analysis": SMALL_BUDGET, "benchmarks": SMALL_BUDGET},
    sizes={"W": 128, "4W": 512, "L": 1024, "XL": 4096, "BW": 256, "BL": 1024},
    lengths=(128, 1024, 4096, 16_384, 65_536),
    pieces=16,
)

PAPER = Scale(
    name="paper",
    about="the paper's own: 247M parameters and 19.7B tokens a variant, Table 1 374M and 15B; for a cluster",
    budgets={
        "analysis": Budget(
            shape(768, 2048, 24, 12), 80_000, 245_760, 6e-4, 2000, 50_257, 15_360,
            "hub:Skylion007/openwebtext", "openai-community/gpt2",
        ),
        "benchmarks": Budget(
            shape(1024, 2816, 24, 16), 28_611, 524_288, 4e-4, 1000, 32_000, 32_768,
            "hub:HuggingFaceFW/fineweb-edu:sample-100BT", "NousResearch/Llama-2-7b-hf",
        ),
    },
    sizes={"W": 128, "4W": 512, "L": 1024, "XL": 4096, "BW": 1024, "BL": 4096},
    lengths=(128, 1024, 4096, 16_384),
    pieces=64,
    held_out=0.0005,
)  # fmt: skip

MINIATURE = Scale(
    name="miniature",
    about="for tests: everything runs, nothing is learnt",
    budgets={
        "analysis": Budget(shape(24, 32, 2, 12), 4, 256, 3e-3, 1, 300),
        "benchmarks": Budget(shape(24, 32, 2, 4), 4, 256, 3e-3, 1, 300),
    },
    sizes={"W": 8, "4W": 16, "L": 32, "XL": 64, "BW": 16, "BL": 64},
    lengths=(8, 32, 64, 128),
    pieces=3,
    text_bytes=60_000,
    task_limit=2,
    held_out=0.2,
    for_people=False,
)

SCALES = {scale.name: scale for scale in (TINY, SMALL, PAPER, MINIATURE)}

TABLE1: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "tiny": {"llama": LLAMA, "mistral": MISTRAL, "swat-balanced": SWAT["swat-balanced"]},
    "small": {
        "llama": LLAMA,
        "mistral": MISTRAL,
        "mamba2": mamba2(15, 18, 64, 64),
        "gated-deltanet": deltanet(6, 12, 48),
        "retnet": {"architecture": "retnet", "num_heads": 4, "intermediate_size": 768},
        "gla": {"architecture": "gla", "num_heads": 4},
        "deltanet": {"architecture": "deltanet", "num_heads": 9},
        **SWAT,
    },
    "paper": {
        "llama": LLAMA,
        "mistral": MISTRAL,
        "mamba2": mamba2(47, 32, 64, 128),
        "gated-deltanet": deltanet(4, 8, 128),
        "retnet": {"architecture": "retnet", "num_heads": 4, "intermediate_size": 1536},
        "gla": {"architecture": "gla", "num_heads": 4},
        "deltanet": {"architecture": "deltanet", "num_heads": 8},
        "mamba": {"architecture": "mamba", "num_hidden_layers": 46},
        **SWAT,
    },
    "miniature": {"llama": LLAMA, "swat-balanced": SWAT["swat-balanced"]},
}
"""Table 1's models by scale and variant: the architecture's own fields beside the budget's shape."""
