"""A paper's claims about losses as data, and their verdicts."""

from collections.abc import Sequence
from dataclasses import dataclass

from swat_lm.papers.findings import Findings
from swat_lm.papers.verdicts import Samples, Verdict, judge

__all__ = ["Claim", "Loss", "claimed"]


@dataclass(frozen=True)
class Loss:
    """Loss of a variant on a text at an evaluation length; lengths are `first`, `last` or a size of the scale."""

    variant: str
    text: str
    length: str = "last"
    window: str | None = None
    """Another window of evaluation than the variant's."""


@dataclass(frozen=True)
class Claim:
    """What the paper says, as the difference of two losses that it says is positive."""

    says: str
    paper: str
    """The paper's own numbers for it."""
    worse: Loss
    better: Loss


def claimed(found: Findings, claims: Sequence[Claim]) -> list[Verdict]:
    """The verdicts on claims of an experiment; `not measured` where it does not train what one names."""

    def side(wanted: Loss) -> Samples | None:
        variant, scale = found.chosen.get(wanted.variant), found.scale
        if variant is None:
            return None
        length = scale.lengths[-1] if wanted.length == "last" else scale.sizes[wanted.length]
        window = scale.sizes[wanted.window] if wanted.window else found.window(variant)
        return found.losses(variant, wanted.text, length, window) or None

    return [judge(claim.says, claim.paper, side(claim.worse), side(claim.better)) for claim in claims]
