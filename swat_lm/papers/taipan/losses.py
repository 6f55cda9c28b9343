"""Taipan's experiments: loss of equally large models by length, and what their gates chose."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from typing_extensions import override

from swat_lm.papers.by_length import LossByLength
from swat_lm.papers.experiment import Section
from swat_lm.papers.findings import Findings
from swat_lm.papers.loss_claims import Claim
from swat_lm.papers.scales import Scale
from swat_lm.papers.sized import SizedVariant
from swat_lm.papers.taipan.claims import CLAIMS
from swat_lm.papers.taipan.scales import SCALES
from swat_lm.papers.taipan.variants import variants

__all__ = ["LossOfHybrids"]

GATE = ("layers_selected", "layers_selected_without_noise")
"""Of metrics.jsonl: the share of tokens that look back in training, and what it would be without noise."""


@dataclass(frozen=True)
class LossOfHybrids(LossByLength):
    """Models of the same text and size that differ in which tokens look back, and how."""

    @property
    @override
    def scales(self) -> Mapping[str, Scale]:
        return SCALES

    @override
    def variants(self, scale: Scale) -> Mapping[str, SizedVariant]:
        return variants(self.names, scale.name)

    @property
    @override
    def claims(self) -> Sequence[Claim]:
        return CLAIMS[self.name]

    @override
    def sections(self, found: Findings) -> list[Section]:
        shares = [
            [variant.label, str(seed), *(f"{100 * last[name]:.1f} %" for name in GATE)]
            for variant in found.chosen.values()
            for seed in found.finished(variant)
            for last in found.training(variant, seed)[-1:]
            if GATE[0] in last
        ]
        gates = Section(
            "What the gates chose in the last step", ("variant", "seed", "with noise", "without noise"), shares,
            note="Share of the tokens that look back, over all layers of selective attention. Budgets count what is "
            "chosen with noise; without it is how the model is used.",
        )  # fmt: skip
        return [*super().sections(found), gates]

    @override
    def lead(self, scale: Scale) -> str:
        return (
            f"Taipan, arXiv 2410.18572. Window W = {scale.sizes['W']:,} here (2,048 there), training length "
            f"L = {scale.sizes['L']:,} (4,096). Recall has a measurement of its own: docs/experiments.md."
        )
