"""The models that Taipan is compared with: those of the paper, the controls it lacks, and windows of sigmoid.

All have six recurrences to one layer of attention unless their label says otherwise, and about equal parameters.
"""

from collections.abc import Mapping
from typing import Any

from swat_lm.papers.sized import SizedVariant
from swat_lm.papers.taipan.scales import DIMENSIONS, Dimensions

__all__ = ["CAPACITIES", "CONTROLS", "plan", "variants"]

CAPACITY = 0.15
CAPACITIES = (0.1, 0.2, 0.25)
SOFTMAX = {"kind": "attention", "score_function": "softmax", "slopes": "none", "score_bias": 0.0}
CONTROLS = ("random", "all-tokens", "ssm-only", "samba")
"""Those that must be beaten or matched."""


def selective(**settings: Any) -> dict[str, Any]:
    """A layer of selective attention."""
    return {"kind": "taipan", "capacity": CAPACITY, **settings}


LABELS = {
    "taipan": "Taipan, C = 0.15",
    "random": "attention on a random 15 % of the tokens",
    "all-tokens": "windowed attention on all tokens",
    "ssm-only": "Mamba-2 alone, eight for each seven",
    "samba": "Samba-style: Mamba-2 and a softmax window with RoPE in turn",
    "jamba": "full attention with RoPE on all tokens (the paper's Jamba)",
    "transformer": "Transformer++ (Llama)",
    "taipan-sigmoid": "Taipan with sigmoid windows",
    "samba-swat": "Mamba-2 and SWAT (sigmoid window, AliRope) in turn",
    **{f"taipan-{round(100 * share)}": f"Taipan, C = {share:.2f}" for share in CAPACITIES},
}


def plan(name: str, size: Dimensions) -> list[Any]:
    """The pattern of layers of a hybrid. Raises KeyError for another model."""
    recurrence = {"kind": "mamba2", "state_size": size.state_size}
    six = {**recurrence, "repeat": 6}
    hybrids: Mapping[str, list[Any]] = {
        "taipan": [six, selective()],
        "random": [six, selective(selection="random")],
        "all-tokens": [six, selective(selection="all")],
        "ssm-only": [recurrence],
        "samba": [recurrence, {**SOFTMAX, "intermediate_size": size.samba}],
        "jamba": [six, {**SOFTMAX, "sliding_window": None}],
        "taipan-sigmoid": [six, selective(score_function="sigmoid", score_bias="-log(window)")],
        "samba-swat": [recurrence, {"kind": "attention", "intermediate_size": size.samba}],
        **{f"taipan-{round(100 * share)}": [six, selective(capacity=share)] for share in CAPACITIES},
    }
    return hybrids[name]


def model(name: str, size: Dimensions) -> dict[str, Any]:
    """The `model:` of a variant's recipe beside the budget's shape."""
    if name == "transformer":
        depth = {"num_hidden_layers": 4 * size.groups, "intermediate_size": size.transformer}
        return {"architecture": "llama", **depth}
    per_group = {"ssm-only": 8, "samba": 6, "samba-swat": 6}.get(name, 7)
    return {"sliding_window": "W", "num_hidden_layers": per_group * size.groups, "layers": plan(name, size)}


def variants(names: tuple[str, ...], scale: str) -> dict[str, SizedVariant]:
    """These models at a scale; Llama, which has no window, is read behind one of its training length."""
    size = DIMENSIONS[scale]
    return {
        name: SizedVariant(name, LABELS[name], "L", "L" if name == "transformer" else None, model(name, size))
        for name in names
    }
