"""The models that LongVQ (reconstruction) is compared with: its parts removed, its rivals, and windows of sigmoid.

All have about equal parameters: feed-forwards are as wide as what a layer lacks allows.
"""

from typing import Any

from swat_lm.papers.longvq.scales import DIMENSIONS, SCALES, Dimensions
from swat_lm.papers.scales import Scale
from swat_lm.papers.sized import SizedVariant

__all__ = ["LABELS", "variants"]

LABELS = {
    "longvq": "LongVQ (reconstruction)",
    "no-attention": "the same block without attention (O = 0)",
    "no-ssm": "the same block without a state space",
    "exact": "the same block with keys as they are, all pairs",
    "fewer-codes": "LongVQ with a quarter of the codes",
    "dead-codes": "LongVQ whose dead codes stay dead",
    "full-attention": "full softmax attention with RoPE",
    "ssm-only": "Mamba-2 alone",
    "window": "softmax window of two blocks with RoPE",
    "swat": "SWAT (sigmoid window of two blocks, AliRope)",
}
# Mamba-2 has no feed-forward: two of its layers are about as large as one with attention
RECURRENCES = 2


def lacking(kind: str, width: int, block: int, size: Dimensions) -> int:
    """By how many parameters a layer's mixer is smaller than LongVQ's."""
    value = 2 * width
    # projections of reset gate, queries and keys, values and output; scales, shifts and biases
    attention = width * (3 * value + size.key_size) + 2 * value + 5 * size.key_size + block
    system = (3 * size.state_size + 2) * width
    gates = 2 * width * (width + 1)
    return {"attention": attention, "system": system, "all": attention + system + gates - 4 * width**2}[kind]


def layer(name: str, scale: Scale) -> dict[str, Any]:
    """The only entry of a model's plan at a scale."""
    size, shape = DIMENSIONS[scale.name], scale.budgets["analysis"].shape
    width, window, inner = shape["hidden_size"], scale.sizes["W"], shape["intermediate_size"]

    def wider(kind: str) -> dict[str, int]:
        return {"intermediate_size": inner + round(lacking(kind, width, window // 2, size) / (3 * width))}

    near = {"kind": "longvq", "block": window // 2, "key_size": size.key_size}
    system = {"state_size": size.state_size}
    book = {"codes": size.codes, "average_decay": size.average_decay}
    quantised = {**near, **system, **book}
    softmax = {"kind": "attention", "score_function": "softmax", "slopes": "none", **wider("all")}
    plans: dict[str, dict[str, Any]] = {
        "longvq": quantised,
        "no-attention": {"kind": "longvq", "attention": "none", **system, **wider("attention")},
        "no-ssm": {**near, **book, "ssm": "none", **wider("system")},
        "exact": {**near, **system, "attention": "exact"},
        "fewer-codes": {**quantised, "codes": size.codes // 4},
        "dead-codes": {**quantised, "dead_below": 0.0},
        "full-attention": {**softmax, "sliding_window": None},
        "ssm-only": {"kind": "mamba2", "state_size": size.recurrence},
        "window": {**softmax, "sliding_window": window},
        "swat": {"kind": "attention", "sliding_window": window, **wider("all")},
    }
    return plans[name]


def variants(names: tuple[str, ...], scale: str) -> dict[str, SizedVariant]:
    """These models at a scale."""
    chosen = SCALES[scale]
    depth = chosen.budgets["analysis"].shape["num_hidden_layers"]
    return {
        name: SizedVariant(
            name, LABELS[name], "L", None,
            {"layers": [layer(name, chosen)], "num_hidden_layers": depth * (RECURRENCES if name == "ssm-only" else 1)},
        )
        for name in names
    }  # fmt: skip
