"""Experiments that compare the loss of equally large models on held-out text by length."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from typing_extensions import override

from swat_lm.papers.experiment import Measurement, Run, Section
from swat_lm.papers.findings import Findings
from swat_lm.papers.loss_claims import Claim, Loss, claimed
from swat_lm.papers.measuring import missing_losses
from swat_lm.papers.page import with_error
from swat_lm.papers.scales import Scale
from swat_lm.papers.sized import SizedExperiment, SizedVariant
from swat_lm.papers.verdicts import Verdict

__all__ = ["LossByLength", "lower"]

TEXT = "text"
"""Held out from training."""


def lower(says: str, paper: str, worse: str, better: str, length: str = "last") -> Claim:
    """That one model has a lower loss on held-out text than another."""
    return Claim(says, paper, Loss(worse, TEXT, length), Loss(better, TEXT, length))


@dataclass(frozen=True)
class LossByLength(SizedExperiment):
    """Models of the same text and size; which ones, and what is claimed of them, is the paper's affair."""

    names: tuple[str, ...] = ()
    texts: ClassVar[tuple[str, ...]] = (TEXT,)
    lists_losses: ClassVar[bool] = True

    @property
    @abstractmethod
    def claims(self) -> Sequence[Claim]:
        """What is judged."""

    @override
    def measure(self, variant: SizedVariant, run: Run) -> list[Measurement]:
        return missing_losses(run, TEXT, self.window(variant, run.scale))

    @override
    def verdicts(self, found: Findings) -> list[Verdict]:
        return claimed(found, self.claims)

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
        columns = "variant", "parameters", *(f"{length:,} tokens" for length in lengths)
        return [Section("Loss on held-out text", columns, losses, note=self.losses_note(found.scale))]

    def losses_note(self, scale: Scale) -> str:
        """What the numbers under "Loss on held-out text" are."""
        return "Nats per token over whole pieces, \u00b1 its standard error over pieces and seeds."

    @override
    def pictures(self, found: Findings, out: Path) -> dict[str, Path]:
        from swat_lm.papers.pictures import plot_losses

        path, sizes = out / f"{self.name}-text.png", found.scale.sizes
        title = f"W = {sizes['W']:,}, L = {sizes['L']:,} tokens; bars: error of the change"
        return {"Loss on held-out text": path} if plot_losses(found, TEXT, path, title=title) else {}
