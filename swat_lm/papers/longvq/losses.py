"""LongVQ's experiment: loss of equally large models by length, and how many codes are in use."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import override

from swat_lm.papers.by_length import LossByLength
from swat_lm.papers.experiment import Section
from swat_lm.papers.findings import Findings
from swat_lm.papers.longvq.claims import CLAIMS
from swat_lm.papers.longvq.scales import DIMENSIONS, SCALES
from swat_lm.papers.longvq.variants import variants
from swat_lm.papers.loss_claims import Claim
from swat_lm.papers.scales import Scale
from swat_lm.papers.sized import SizedVariant

__all__ = ["LossOfParts", "codes_in_use"]

USED = "layers_codes_used_"
"""Of metrics.jsonl: the perplexity of a layer's codes over a step."""


def codes_in_use(line: Mapping[str, float]) -> list[str]:
    """Of a line of metrics, in the order of layers."""
    layers = sorted(int(name.removeprefix(USED)) for name in line if name.startswith(USED))
    return [f"{line[f'{USED}{layer}']:.0f}" for layer in layers]


@dataclass(frozen=True)
class LossOfParts(LossByLength):
    """Models of the same text and size that differ in what their tokens remember, and how."""

    @property
    @override
    def scales(self) -> Mapping[str, Scale]:
        return SCALES

    @property
    @override
    def claims(self) -> Sequence[Claim]:
        return CLAIMS

    @override
    def variants(self, scale: Scale) -> Mapping[str, SizedVariant]:
        return variants(self.names, scale.name)

    @override
    def sections(self, found: Findings) -> list[Section]:
        used = []
        for variant in found.chosen.values():
            for seed in found.finished(variant):
                counts = [count for line in found.training(variant, seed)[-1:] for count in codes_in_use(line)]
                if counts:
                    used.append([variant.label, str(seed), ", ".join(counts)])
        codes = Section("Codes in use in the last step", ("variant", "seed", "by layer"), used,
                        note="The exponential of the entropy of how many keys each code has.")  # fmt: skip
        return [*super().sections(found), codes]

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
