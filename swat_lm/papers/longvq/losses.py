"""LongVQ's experiment: loss of equally large models by length, and how many codes are in use."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from typing_extensions import override

from swat_lm.papers.experiment import Measurement, Run, Section
from swat_lm.papers.findings import Findings
from swat_lm.papers.longvq.claims import CLAIMS, TEXT
from swat_lm.papers.longvq.scales import DIMENSIONS, SCALES
from swat_lm.papers.longvq.variants import variants
from swat_lm.papers.loss_claims import claimed
from swat_lm.papers.measuring import missing_losses
from swat_lm.papers.page import with_error
from swat_lm.papers.scales import Scale
from swat_lm.papers.sized import SizedExperiment, SizedVariant
from swat_lm.papers.verdicts import Verdict

__all__ = ["LossOfParts", "codes_in_use"]

USED = "layers_codes_used_"
"""Of metrics.jsonl: the perplexity of a layer's codes over a step."""


def codes_in_use(line: Mapping[str, float]) -> list[str]:
    """Of a line of metrics, in the order of layers."""
    layers = sorted(int(name.removeprefix(USED)) for name in line if name.startswith(USED))
    return [f"{line[f'{USED}{layer}']:.0f}" for layer in layers]


@dataclass(frozen=True)
class LossOfParts(SizedExperiment):
    """Models of the same text and size that differ in what their tokens remember, and how."""

    names: tuple[str, ...] = ()
    texts: ClassVar[tuple[str, ...]] = (TEXT,)
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
        return missing_losses(run, TEXT, self.window(variant, run.scale))

    @override
    def verdicts(self, found: Findings) -> list[Verdict]:
        return claimed(found, CLAIMS)

    @override
    def sections(self, found: Findings) -> list[Section]:
        lengths = found.scale.lengths
        losses = [
            [
                variant.label, f"{found.parameters(variant):,}",
                *(with_error(*found.mean_loss(variant, TEXT, length)) for length in lengths),
            ]
            for variant in found.chosen.values()
        ]  # fmt: skip
        used = []
        for variant in found.chosen.values():
            for seed in found.finished(variant):
                counts = [count for line in found.training(variant, seed)[-1:] for count in codes_in_use(line)]
                if counts:
                    used.append([variant.label, str(seed), ", ".join(counts)])
        return [
            Section("Loss on held-out text", ("variant", "parameters", *(f"{length:,} tokens" for length in lengths)),
                    losses, note="Nats per token over whole pieces, \u00b1 its standard error over pieces and seeds."),
            Section("Codes in use in the last step", ("variant", "seed", "by layer"), used,
                    note="The exponential of the entropy of how many keys each code has."),
        ]  # fmt: skip

    @override
    def pictures(self, found: Findings, out: Path) -> dict[str, Path]:
        # two lengths, which the table shows
        return {}

    @override
    def lead(self, scale: Scale) -> str:
        size = DIMENSIONS[scale.name]
        return (
            f"LongVQ (reconstruction), arXiv 2404.11163. {size.codes:,} codes, blocks of {scale.sizes['W'] // 2:,} "
            f"tokens of which two are near, rows of L = {scale.sizes['L']:,}. Sizes are ours: the paper's are not "
            "known."
        )
