"""What papers share whose models differ in architecture and in windows and lengths that are sizes of a scale.

Text and schedule are the same for all variants of a budget, so that losses can be paired.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import override

from swat_lm.papers.experiment import Experiment, Variant
from swat_lm.papers.scales import Budget, Scale
from swat_lm.recipe import DataRecipe, Recipe, TrainRecipe

__all__ = ["SizedExperiment", "SizedVariant"]


@dataclass(frozen=True)
class SizedVariant(Variant):
    """A model whose windows and lengths are sizes of the scale, by name."""

    length: str
    """Training length."""
    evaluated: str | None
    """Window of evaluation; None: as trained."""
    model: Mapping[str, Any]


# what an architecture takes of the budget's shape and the length; others take all of it
SHAPE_FIELDS = {
    "mamba2": ("hidden_size",),
    "mamba": ("hidden_size", "num_hidden_layers"),
    "retnet": ("hidden_size", "num_hidden_layers", "max_position_embeddings"),
    "gla": ("hidden_size", "num_hidden_layers", "max_position_embeddings", "intermediate_size"),
    "deltanet": ("hidden_size", "num_hidden_layers", "max_position_embeddings", "intermediate_size"),
}


def variant_model(variant: SizedVariant, scale: Scale, budget: Budget) -> dict[str, Any]:
    """The `model:` of a variant's recipe, sizes in tokens."""
    own = dict(variant.model)
    if own.get("sliding_window") is not None:
        own["sliding_window"] = scale.sizes[own["sliding_window"]]
    shape = {"max_position_embeddings": scale.sizes[variant.length], **budget.shape}
    if own.get("architecture") == "mistral":
        shape["num_key_value_heads"] = shape["num_attention_heads"]
    taken = SHAPE_FIELDS.get(own.get("architecture", "swat"), tuple(shape))
    return {**{name: shape[name] for name in taken}, **own}


def rows_of(budget: Budget, length: int) -> tuple[int, int | None]:
    """Rows of a step, and of a forward pass of one process (None: all), so that up to 8 processes can share them."""
    rows = max(1, budget.tokens_per_step // length)
    if budget.tokens_per_pass is None:
        return rows, None
    rows = max(8, round(rows / 8) * 8)
    most, share = max(1, budget.tokens_per_pass // length), rows // 8
    return rows, max(count for count in range(1, share + 1) if share % count == 0 and count <= most)


@dataclass(frozen=True)
class SizedExperiment(Experiment):
    """Compares such variants; which ones, at which scales, is the paper's affair."""

    @override
    def recipe(
        self, variant: SizedVariant, scale: Scale, seed: int, out: Path, sources: tuple[str, ...], tokenizer: str
    ) -> Recipe:
        # the same tokens and schedule for all variants of a budget, whatever their length
        budget, length = self.budget(scale), scale.sizes[variant.length]
        rows, per_pass = rows_of(budget, length)
        train = TrainRecipe(
            steps=budget.steps,
            batch_size=rows,
            micro_batch_size=per_pass,
            learning_rate=budget.learning_rate,
            warmup_steps=budget.warmup_steps,
            final_learning_rate_ratio=budget.final_learning_rate_ratio,
            log_every=max(1, budget.steps // 200),
            evaluate_every=max(1, budget.steps // 8),
            evaluate_batches=8,
            save_every=max(1, budget.steps // 4),
            keep=1,
        )
        data = DataRecipe(
            sources=sources,
            tokenizer=tokenizer,
            sequence_length=length,
            documents="concatenate",
            held_out=scale.held_out,
            cache=str(out / "tokens"),
        )
        name, model = f"{variant.name}-seed{seed}", variant_model(variant, scale, budget)
        return Recipe(name=name, seed=seed, out=str(out / "runs" / name), model=model, data=data, train=train)

    @override
    def window(self, variant: SizedVariant, scale: Scale) -> int | None:
        # a model without a window is evaluated with one of its training length
        return None if variant.evaluated is None else scale.sizes[variant.evaluated]
