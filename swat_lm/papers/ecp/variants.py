"""The models that ECP is compared with: Perceivers, the controls it lacks, and windows of sigmoid.

All have about equal parameters: a Perceiver's layers have one output projection less and a wider feed-forward instead.
"""

from collections.abc import Mapping
from typing import Any

from swat_lm.papers.ecp.scales import SCALES
from swat_lm.papers.scales import Scale
from swat_lm.papers.sized import SizedVariant

__all__ = ["LABELS", "is_perceiver", "variants"]

LABELS = {
    "ecp": "ECP",
    "disjoint": "disjoint segments of 2m",
    "window": "softmax window of 2m with RoPE",
    "window-short": "softmax window of 1.5m with RoPE",
    "full-attention": "full attention",
    "apart": "ECP with separate keys and values, RoPE in all layers",
    "ecp-sigmoid": "ECP with sigmoid",
    "swat": "SWAT (sigmoid window of 2m, AliRope)",
    "perceiver-ar": "Perceiver AR",
    "perceiver-v1": "V1: history sees itself",
    "perceiver-v2": "V2: history sees itself within segments",
    "perceiver-v3": "V3: history compressed along time",
}


def is_perceiver(name: str) -> bool:
    """Whether the last tokens of a row alone are learnt from."""
    return name.startswith("perceiver")


def plan(name: str, scale: Scale, num_layers: int) -> list[Any]:
    """The pattern of layers of a model at a scale."""
    window, length, latents = scale.sizes["W"], scale.sizes["L"], scale.sizes["l"]
    ecp = {"kind": "ecp", "segment": window // 2}
    softmax = {"kind": "attention", "score_function": "softmax", "slopes": "none"}
    last = {"kind": "perceiver", "latents": latents}
    whole, between = {**last, "history": "whole"}, num_layers - 1
    rotated = {"rotary_layers": "all"}
    plans: Mapping[str, list[Any]] = {
        "ecp": [ecp],
        "disjoint": [{**ecp, "segment": window, "look_back": 0}],
        "window": [{**softmax, "sliding_window": window}],
        "window-short": [{**softmax, "sliding_window": scale.sizes["H"]}],
        "full-attention": [{**softmax, "sliding_window": None}],
        "apart": [{**ecp, "tied": False, "first_projection": False, **rotated}],
        "ecp-sigmoid": [{**ecp, "score_function": "sigmoid", "score_bias": "-log(window)"}],
        "swat": [{"kind": "attention", "sliding_window": window}],
        "perceiver-ar": [last],
        "perceiver-v1": [{**whole, **rotated, "repeat": between}, {**last, **rotated}],
        "perceiver-v2": [{**last, "history": "segments", "segment": window // 2, "repeat": between}, last],
        "perceiver-v3": [{**last, "history": "compress", "length": length}, {**whole, "repeat": between - 1}, last],
    }
    return plans[name]


def variants(names: tuple[str, ...], scale: str) -> dict[str, SizedVariant]:
    """These models at a scale."""
    chosen = SCALES[scale]
    shape = chosen.budgets["analysis"].shape
    width, num_layers = shape["hidden_size"], shape["num_hidden_layers"]
    # a square of the width in a feed-forward of two matrices, or of three
    wider = shape["intermediate_size"] + width // (2 if shape.get("feed_forward") == "plain" else 3)
    return {
        name: SizedVariant(
            name, LABELS[name], "L", None,
            {"layers": plan(name, chosen, num_layers), **({"intermediate_size": wider} if is_perceiver(name) else {})},
        )
        for name in names
    }  # fmt: skip
