"""ECP's experiment: loss of equally large models over the second half of whole rows.

Every model reads the same rows from their beginning, and the tokens that count are those that latents predict.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from typing_extensions import override

from swat_lm.evaluate.curves import summarise
from swat_lm.evaluate.streaming_model import evaluating
from swat_lm.evaluate.windows import model_window
from swat_lm.model.loading import load_causal_lm
from swat_lm.papers.by_length import LossByLength
from swat_lm.papers.ecp.claims import CLAIMS, TEXT
from swat_lm.papers.ecp.scales import SCALES
from swat_lm.papers.ecp.variants import is_perceiver, variants
from swat_lm.papers.experiment import Measurement, Progress, Run
from swat_lm.papers.findings import Findings
from swat_lm.papers.loss_claims import Claim
from swat_lm.papers.measuring import curve_path
from swat_lm.papers.scales import Scale
from swat_lm.papers.sized import SizedVariant
from swat_lm.recipe import Recipe

__all__ = ["LossOfSegments", "losses_of_latents"]


@dataclass(frozen=True)
class LossOfSegments(LossByLength):
    """Models of the same text and size that differ in what their tokens see."""

    @property
    @override
    def claims(self) -> Sequence[Claim]:
        return CLAIMS

    @property
    @override
    def scales(self) -> Mapping[str, Scale]:
        return SCALES

    @override
    def variants(self, scale: Scale) -> Mapping[str, SizedVariant]:
        return variants(self.names, scale.name)

    @override
    def recipe(
        self, variant: SizedVariant, scale: Scale, seed: int, out: Path, sources: tuple[str, ...], tokenizer: str
    ) -> Recipe:
        recipe = super().recipe(variant, scale, seed, out, sources, tokenizer)
        if not is_perceiver(variant.name):
            return recipe
        learnt = {"objective": "last_tokens", "objective_settings": {"count": scale.sizes["l"]}}
        return replace(recipe, train=replace(recipe.train, **learnt))

    @override
    def measure(self, variant: SizedVariant, run: Run) -> list[Measurement]:
        path, count = curve_path(run.folder, TEXT, None), run.scale.sizes["l"]

        def measure(told: Progress) -> None:
            model, rows = load_causal_lm(str(run.folder)), run.streams(TEXT)
            losses = []
            for row in rows:
                losses.append(losses_of_latents(model, torch.as_tensor(row).long()[None], count))
                told("rows of held-out text", len(losses), len(rows))
            columns, size = [[loss] for loss in losses], run.scale.sizes["L"]
            summarise([size], columns, columns, [0], len(rows) * (count - 1), model_window(model), same_text=True).save(
                path
            )

        return [] if path.exists() else [measure]

    @override
    def losses_note(self, scale: Scale) -> str:
        return (
            f"Nats per token over the last {scale.sizes['l']:,} of rows of {scale.sizes['L']:,}, \u00b1 its standard "
            "error over rows and seeds."
        )

    @override
    def pictures(self, found: Findings, out: Path) -> dict[str, Path]:
        # one length
        return {}

    @override
    def lead(self, scale: Scale) -> str:
        return (
            f"ECP, arXiv 2412.06106. Segments of m = {scale.sizes['W'] // 2:,} here (256 there), rows of "
            f"L = {scale.sizes['L']:,} tokens (2,048). Perceivers learn from the last {scale.sizes['l']:,} of a row."
        )


@torch.no_grad()
def losses_of_latents(model: torch.nn.Module, row: torch.Tensor, count: int) -> float:
    """Mean loss in nats of what the last `count` tokens of a row `[1, T]` predict inside it: `count - 1` tokens."""
    with evaluating(model):  # type: ignore[arg-type]
        logits = model(input_ids=row, use_cache=False).logits[0, -count:-1].float()
        return F.cross_entropy(logits, row[0, -count + 1 :]).item()
