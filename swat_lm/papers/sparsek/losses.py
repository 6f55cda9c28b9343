"""SPARSEK's experiment: loss of equally large models by length."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from typing_extensions import override

from swat_lm.papers.by_length import LossByLength
from swat_lm.papers.loss_claims import Claim
from swat_lm.papers.scales import Scale
from swat_lm.papers.sized import SizedVariant
from swat_lm.papers.sparsek.claims import CLAIMS
from swat_lm.papers.sparsek.scales import SCALES
from swat_lm.papers.sparsek.variants import variants

__all__ = ["LossOfSelections"]


@dataclass(frozen=True)
class LossOfSelections(LossByLength):
    """Models of the same text and size that differ in which keys are seen."""

    @property
    @override
    def scales(self) -> Mapping[str, Scale]:
        return SCALES

    @override
    def variants(self, scale: Scale) -> Mapping[str, SizedVariant]:
        return variants(self.names, scale)

    @property
    @override
    def claims(self) -> Sequence[Claim]:
        return CLAIMS

    @override
    def lead(self, scale: Scale) -> str:
        return (
            f"SPARSEK, arXiv 2406.16747. A window of W = {scale.sizes['W']:,} and as many keys before it, k, "
            f"rows of L = {scale.sizes['L']:,} tokens. Whether scores learn what to keep has a measurement of its own: "
            "selective copy in docs/experiments.md."
        )
