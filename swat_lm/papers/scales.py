"""How large an experiment is: tiny (two cores), small (one GPU), paper (a cluster). Data only.

W, L, XL stand for the paper's windows and lengths 128, 1,024 and 4,096; smaller scales keep their ratios.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["SCALES", "Budget", "Scale", "find_scale"]


@dataclass(frozen=True)
class Budget:
    """Shape and training of the models of one kind of experiment."""

    shape: Mapping[str, Any]
    """Fields that SwatConfig and Llama share."""
    steps: int
    tokens_per_step: int
    learning_rate: float
    warmup_steps: int
    vocab_size: int
    tokens_per_pass: int | None = None
    """Of one forward pass of one process; None: the whole step."""
    source: str | None = None
    """What the paper trained on, where no data is named; None: data must be named."""
    tokenizer: str | None = None
    """Of the hub; None: byte-level BPE trained on the text."""

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return self.steps * self.tokens_per_step


@dataclass(frozen=True)
class Scale:
    """Everything about a scale that is not a variant."""

    name: str
    about: str
    analysis: Budget
    """Tables 2 and 3, the figures."""
    benchmarks: Budget
    """Table 1."""
    sizes: Mapping[str, int]
    """Tokens of W, 4W, L, XL, and of Table 1's window (BW) and training length (BL)."""
    lengths: tuple[int, ...]
    """Evaluation lengths; each divides the last."""
    pieces: int
    """Pieces of the greatest length read from the held-out text, and from the books."""
    text_bytes: int | None
    """Of the training text, spread evenly; None: all of it."""
    table1: Mapping[str, Mapping[str, Any]]
    """Table 1's models by variant: the architecture's own fields beside those in `shape`."""
    task_limit: int | None = None
    """Documents of each benchmark; None: all."""
    held_out: float = 0.03
    for_people: bool = True
    """Whether the command line offers it."""


def shape(width: int, feed_forward: int, layers: int, heads: int) -> dict[str, Any]:
    """Names as in Llama's configuration."""
    return {
        "hidden_size": width,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


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

TINY = Scale(
    name="tiny",
    about="2M parameters, 1.0M tokens a variant; about 40 minutes a seed on two cores for everything but Table 1",
    analysis=Budget(shape(144, 384, 4, 12), 500, 2048, 2e-3, 50, 2048),
    benchmarks=Budget(shape(144, 384, 4, 12), 500, 2048, 2e-3, 50, 2048),
    sizes={"W": 32, "4W": 128, "L": 256, "XL": 1024, "BW": 64, "BL": 256},
    lengths=(32, 256, 1024, 4096),
    pieces=16,
    text_bytes=24_000_000,
    table1={"llama": LLAMA, "mistral": MISTRAL, "swat-balanced": SWAT["swat-balanced"]},
    task_limit=200,
)

SMALL = Scale(
    name="small",
    about="41M parameters, 302M tokens a variant; for one GPU",
    analysis=Budget(shape(576, 1536, 8, 12), 4600, 65_536, 1e-3, 300, 8192, 32_768),
    benchmarks=Budget(shape(576, 1536, 8, 12), 4600, 65_536, 1e-3, 300, 8192, 32_768),
    sizes={"W": 128, "4W": 512, "L": 1024, "XL": 4096, "BW": 256, "BL": 1024},
    lengths=(128, 1024, 4096, 16_384, 65_536),
    pieces=16,
    text_bytes=None,
    table1={
        "llama": LLAMA,
        "mistral": MISTRAL,
        "mamba2": mamba2(15, 18, 64, 64),
        "gated-deltanet": deltanet(6, 12, 48),
        "retnet": {"architecture": "retnet", "num_heads": 4, "intermediate_size": 768},
        "gla": {"architecture": "gla", "num_heads": 4},
        "deltanet": {"architecture": "deltanet", "num_heads": 9},
        **SWAT,
    },
)

PAPER = Scale(
    name="paper",
    about="the paper's own: 247M parameters and 19.7B tokens a variant, Table 1 374M and 15B; for a cluster",
    analysis=Budget(
        shape(768, 2048, 24, 12), 80_000, 245_760, 6e-4, 2000, 50_257, 15_360,
        "hub:Skylion007/openwebtext", "openai-community/gpt2",
    ),
    benchmarks=Budget(
        shape(1024, 2816, 24, 16), 28_611, 524_288, 4e-4, 1000, 32_000, 32_768,
        "hub:HuggingFaceFW/fineweb-edu:sample-100BT", "NousResearch/Llama-2-7b-hf",
    ),
    sizes={"W": 128, "4W": 512, "L": 1024, "XL": 4096, "BW": 1024, "BL": 4096},
    lengths=(128, 1024, 4096, 16_384),
    pieces=64,
    text_bytes=None,
    table1={
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
    held_out=0.0005,
)  # fmt: skip

MINIATURE = Scale(
    name="miniature",
    about="for tests: everything runs, nothing is learnt",
    analysis=Budget(shape(24, 32, 2, 12), 4, 256, 3e-3, 1, 300),
    benchmarks=Budget(shape(24, 32, 2, 4), 4, 256, 3e-3, 1, 300),
    sizes={"W": 8, "4W": 16, "L": 32, "XL": 64, "BW": 16, "BL": 64},
    lengths=(8, 32, 64, 128),
    pieces=3,
    text_bytes=60_000,
    table1={"llama": LLAMA, "swat-balanced": SWAT["swat-balanced"]},
    task_limit=2,
    held_out=0.2,
    for_people=False,
)

SCALES = {one.name: one for one in (TINY, SMALL, PAPER, MINIATURE)}


def find_scale(name: str) -> Scale:
    """A scale by its name; raises ValueError naming the nearest."""
    if name in SCALES:
        return SCALES[name]
    offered = [one.name for one in SCALES.values() if one.for_people]
    near = difflib.get_close_matches(name, offered, n=1, cutoff=0.4)
    raise ValueError(
        f"--scale: expected {', '.join(offered)}, got {name!r}" + (f"; nearest: {near[0]}" if near else "")
    )
