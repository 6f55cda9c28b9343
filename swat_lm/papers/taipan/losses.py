"""Taipan's experiments: loss of equally large models by length, and what their gates chose."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from typing_extensions import override

from swat_lm.papers.experiment import Measurement, Run, Section
from swat_lm.papers.findings import Findings
from swat_lm.papers.loss_claims import claimed
from swat_lm.papers.measuring import missing_losses
from swat_lm.papers.page import with_error
from swat_lm.papers.scales import Scale
from swat_lm.papers.sized import SizedExperiment, SizedVariant
from swat_lm.papers.taipan.claims import CLAIMS
from swat_lm.papers.taipan.scales import SCALES
from swat_lm.papers.taipan.variants import variants
from swat_lm.papers.verdicts import Verdict

__all__ = ["LossOfHybrids"]

GATE = ("layers_selected", "layers_selected_without_noise")
"""Of metrics.jsonl: the share of tokens that look back in training, and what it would be without noise."""


@dataclass(frozen=True)
class LossOfHybrids(SizedExperiment):
    """Models of the same text and size that differ in which tokens look back, and how."""

    names: tuple[str, ...] = ()
    texts: ClassVar[tuple[str, ...]] = ("text",)
    lists_losses: ClassVar[bool] = True

    @property
    @override
    def scales(self) -> Mapping[str, Scale]:
        return SCALES

    @override
    def variants(self, scale: Scale) -> Mapping[str, SizedVariant]:
        return variants(self.names, scale.name)

    @override
    def measure(self, variant: SizedVariant, run: Run) -> list[Measurement]:
        return missing_losses(run, "text", self.window(variant, run.scale))

    @override
    def verdicts(self, found: Findings) -> list[Verdict]:
        return claimed(found, CLAIMS[self.name])

    @override
    def sections(self, found: Findings) -> list[Section]:
        lengths = found.scale.lengths
        losses = [
            [
                variant.label, f"{found.parameters(variant):,}",
                *(with_error(*found.mean_loss(variant, "text", length)) for length in lengths),
            ]
            for variant in found.chosen.values()
        ]  # fmt: skip
        shares = [
            [variant.label, str(seed), *(f"{100 * last[name]:.1f} %" for name in GATE)]
            for variant in found.chosen.values()
            for seed in found.finished(variant)
            for last in found.training(variant, seed)[-1:]
            if GATE[0] in last
        ]
        return [
            Section("Loss on held-out text", ("variant", "parameters", *(f"{length:,} tokens" for length in lengths)),
                    losses, note="Nats per token over whole pieces, \u00b1 its standard error over pieces and seeds."),
            Section("What the gates chose in the last step", ("variant", "seed", "with noise", "without noise"), shares,
                    note="Share of the tokens that look back, over all layers of selective attention. Budgets count "
                    "what is chosen with noise; without it is how the model is used."),
        ]  # fmt: skip

    @override
    def pictures(self, found: Findings, out: Path) -> dict[str, Path]:
        from swat_lm.papers.pictures import plot_losses

        path, sizes = out / f"{self.name}-text.png", found.scale.sizes
        title = f"W = {sizes['W']:,}, L = {sizes['L']:,} tokens; bars: error of the change"
        return {"Loss on held-out text": path} if plot_losses(found, "text", path, title=title) else {}

    @override
    def lead(self, scale: Scale) -> str:
        return (
            f"Taipan, arXiv 2410.18572. Window W = {scale.sizes['W']:,} here (2,048 there), training length "
            f"L = {scale.sizes['L']:,} (4,096). Recall has a measurement of its own: docs/experiments.md."
        )
