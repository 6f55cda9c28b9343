"""What SWAT's tables and figures share: the models that they compare, scales, terms.

A variant that two experiments need is trained once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from swat_lm.papers.scales import Scale
from swat_lm.papers.sized import SizedExperiment, SizedVariant
from swat_lm.papers.swat.scales import SCALES

__all__ = ["ANALYSIS", "TABLE1_LABELS", "SwatExperiment"]

SOFTMAX = {"score_function": "softmax", "slopes": "none"}


def analysed(
    name: str, label: str, length: str, window: str | None, evaluated: str | None, **model: Any
) -> SizedVariant:
    """A variant of Tables 2 and 3: our model with these fields."""
    return SizedVariant(name, label, length, evaluated, {"sliding_window": window, **model})


ANALYSIS = {
    variant.name: variant
    for variant in (
        analysed("vanilla-softmax-short", "vanilla, softmax, RoPE, W", "W", None, "W", **SOFTMAX),
        analysed("vanilla-sigmoid-short", "vanilla, sigmoid, RoPE, W", "W", None, "W", slopes="none"),
        analysed("sliding-softmax", "sliding, softmax, RoPE", "L", "W", None, **SOFTMAX),
        analysed("sliding-alibi-12-0", "sliding, sigmoid, ALiBi-12:0", "L", "W", None, slopes="12:0", use_rotary=False),
        analysed("sliding-alibi-8-4", "sliding, sigmoid, ALiBi-8:4", "L", "W", None, slopes="8:4", use_rotary=False),
        analysed("sliding-alibi-6-6", "sliding, sigmoid, ALiBi-6:6", "L", "W", None, slopes="6:6", use_rotary=False),
        analysed("sliding-alirope", "sliding, sigmoid, AliRope-6:6", "L", "W", None, slopes="6:6"),
        analysed("alirope-wide", "sliding, sigmoid, AliRope-6:6, window L", "L", "L", None, slopes="6:6"),
        analysed("vanilla-softmax-long", "vanilla, softmax, RoPE, L", "L", None, "L", **SOFTMAX),
        analysed("vanilla-sigmoid-long", "vanilla, sigmoid, ALiBi-12:0, L", "L", None, "L", slopes="12:0",
                use_rotary=False),
        analysed("sliding-softmax-4w", "sliding, softmax, RoPE, length 4W", "4W", "W", None, **SOFTMAX),
        analysed("sliding-softmax-xl", "sliding, softmax, RoPE, window L, length XL", "XL", "L", None, **SOFTMAX),
    )
}  # fmt: skip

TABLE1_LABELS = {
    "llama": "Transformer++ (Llama)",
    "mistral": "softmax window (Mistral)",
    "mamba2": "Mamba2",
    "gated-deltanet": "Gated DeltaNet",
    "retnet": "RetNet",
    "gla": "GLA",
    "deltanet": "DeltaNet",
    "mamba": "Mamba",
    "swat-negative": "SWAT (-)",
    "swat-positive": "SWAT (+)",
    "swat-balanced": "SWAT (-+)",
}


@dataclass(frozen=True)
class SwatExperiment(SizedExperiment):
    """Variants of ANALYSIS at SWAT's scales."""

    names: tuple[str, ...] = ()

    @property
    @override
    def scales(self) -> Mapping[str, Scale]:
        return SCALES

    @override
    def variants(self, scale: Scale) -> Mapping[str, SizedVariant]:
        return {name: ANALYSIS[name] for name in self.names}

    @override
    def lead(self, scale: Scale) -> str:
        return (
            f"SWAT, arXiv 2502.18845. Windows and lengths are written in the paper's terms: W = {scale.sizes['W']:,} "
            f"here (128 there), L = {scale.sizes['L']:,} (1,024), XL = {scale.sizes['XL']:,} (4,096)."
        )
