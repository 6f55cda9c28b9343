"""The recipe of a model that a paper compares, with windows and lengths named by the scale."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swat_lm.papers.experiment import Variant
from swat_lm.papers.scales import Budget, Scale
from swat_lm.recipe import DataRecipe, Recipe, TrainRecipe

__all__ = ["SizedVariant", "variant_model", "variant_recipe"]


@dataclass(frozen=True)
class SizedVariant(Variant):
    """A model whose windows and lengths are sizes of the scale, by name."""

    length: str
    """Training length."""
    evaluated: str | None
    """Window of evaluation; None: as trained."""
    model: Mapping[str, Any]
    budget: str = "analysis"
    """Which of the scale's budgets it has."""


def variant_model(one: SizedVariant, scale: Scale) -> dict[str, Any]:
    """The `model:` of a variant's recipe, sizes in tokens."""
    budget, fields = scale.budgets[one.budget], dict(one.model)
    architecture = fields.get("architecture", "swat")
    window = fields.get("sliding_window")
    if window is not None:
        fields["sliding_window"] = scale.sizes[window]
    length = scale.sizes[one.length]
    if architecture == "mamba2":
        return {"hidden_size": budget.shape["hidden_size"], **fields}
    shared = {"max_position_embeddings": length, **budget.shape}
    if architecture in ("retnet", "gla", "deltanet", "mamba"):
        own = {"hidden_size": budget.shape["hidden_size"], "num_hidden_layers": budget.shape["num_hidden_layers"]}
        shared = own if architecture == "mamba" else {**own, "max_position_embeddings": length}
        if architecture in ("gla", "deltanet"):
            shared["intermediate_size"] = budget.shape["intermediate_size"]
    if architecture == "mistral":
        shared["num_key_value_heads"] = budget.shape["num_attention_heads"]
    return {**shared, **fields}


def variant_recipe(
    one: SizedVariant, scale: Scale, seed: int, out: Path, sources: tuple[str, ...], tokenizer: str
) -> Recipe:
    """The run of one variant: the same tokens and schedule for all variants of a budget, whatever their length."""
    budget, length = scale.budgets[one.budget], scale.sizes[one.length]
    rows, per_pass = rows_of(budget, length)
    train = TrainRecipe(
        steps=budget.steps,
        batch_size=rows,
        micro_batch_size=per_pass,
        learning_rate=budget.learning_rate,
        warmup_steps=budget.warmup_steps,
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
    name = f"{one.name}-seed{seed}"
    return Recipe(
        name=name, seed=seed, out=str(out / "runs" / name), model=variant_model(one, scale), data=data, train=train
    )


def rows_of(budget: Budget, length: int) -> tuple[int, int | None]:
    """Rows of a step, and of a forward pass of one process (None: all), so that up to 8 processes can share them."""
    rows = max(1, budget.tokens_per_step // length)
    if budget.tokens_per_pass is None:
        return rows, None
    rows = max(8, round(rows / 8) * 8)
    most, share = max(1, budget.tokens_per_pass // length), rows // 8
    return rows, max(count for count in range(1, share + 1) if share % count == 0 and count <= most)
