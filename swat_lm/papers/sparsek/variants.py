"""The models that SPARSEK is compared with: its scores replaced, windows, full attention, and sigmoid.

All have equal parameters but for learned scores, a row of the model's width per head and layer.
"""

from collections.abc import Mapping
from typing import Any

from swat_lm.papers.scales import Scale
from swat_lm.papers.sized import SizedVariant

__all__ = ["LABELS", "variants"]

LABELS = {
    "sparsek": "SPARSEK, k = W",
    "random": "k keys by chance",
    "recent": "the k most recent keys before the window",
    "window": "softmax window of W with RoPE",
    "window-wide": "softmax window of k + W with RoPE",
    "full-attention": "full attention",
    "no-window": "SPARSEK with k + W keys and no window",
    "both": "SPARSEK, soft values and keys",
    "straight": "SPARSEK, hard mask with the soft one's gradient",
    "sparsek-sigmoid": "SPARSEK with sigmoid",
    "swat": "SWAT (sigmoid window of k + W, AliRope)",
}


def entry(name: str, window: int) -> dict[str, Any]:
    """Every layer of a model, with this window and as many keys selected."""
    sparsek = {"kind": "sparsek", "k": window, "sliding_window": window}
    softmax = {"kind": "attention", "score_function": "softmax", "slopes": "none", "score_bias": 0.0}
    entries: Mapping[str, dict[str, Any]] = {
        "sparsek": sparsek,
        "random": {**sparsek, "selection": "random"},
        "recent": {**sparsek, "selection": "recent"},
        "window": {**softmax, "sliding_window": window},
        "window-wide": {**softmax, "sliding_window": 2 * window},
        "full-attention": {**softmax, "sliding_window": None},
        "no-window": {**sparsek, "k": 2 * window, "sliding_window": 0},
        "both": {**sparsek, "masking": "both"},
        "straight": {**sparsek, "masking": "straight"},
        "sparsek-sigmoid": {**sparsek, "score_function": "sigmoid", "score_bias": "-log(window)"},
        "swat": {"kind": "attention", "sliding_window": 2 * window},
    }
    return entries[name]


def variants(names: tuple[str, ...], scale: Scale) -> dict[str, SizedVariant]:
    """These models at a scale; all are read as they were trained."""
    return {
        name: SizedVariant(name, LABELS[name], "L", None, {"layers": [entry(name, scale.sizes["W"])]}) for name in names
    }
