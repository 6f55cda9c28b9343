"""What SWAT's tables and figures share: the models that they compare, scales, terms.

A variant that two experiments need is trained once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import override

from swat_lm.papers.experiment import Experiment, Variant
from swat_lm.papers.scales import Budget, Scale
from swat_lm.papers.swat.scales import SCALES
from swat_lm.recipe import DataRecipe, Recipe, TrainRecipe

__all__ = ["ANALYSIS", "TABLE1_LABELS", "SizedVariant", "SwatExperiment"]

SOFTMAX = {"score_function": "softmax", "slopes": "none"}


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


def analysed(
    name: str, label: str, length: str, window: str | None, evaluated: str | None, **model: Any
) -> SizedVariant:
    """A variant of Tables 2 and 3: our model with these fields."""
    return SizedVariant(name, label, length, evaluated, {"sliding_window": window, **model})


ANALYSIS = {
    variant.name: variant
    for variant in (
        analysed("vanilla-softmax-short", "vanilla, softmax, RoPE, W", "W", None, "W", **SOFTMAX),
        analysed("vanilla-sigmoid-short", "vanilla, sigmoid, RoPE, W", "W", None, "W", slopes="none"),
        analysed("sliding-softmax", "sliding, softmax, RoPE", "L", "W", None, **SOFTMAX),
        analysed("sliding-alibi-12-0", "sliding, sigmoid, ALiBi-12:0", "L", "W", None, slopes="12:0", use_rotary=False),
        analysed("sliding-alibi-8-4", "sliding, sigmoid, ALiBi-8:4", "L", "W", None, slopes="8:4", use_rotary=False),
        analysed("sliding-alibi-6-6", "sliding, sigmoid, ALiBi-6:6", "L", "W", None, slopes="6:6", use_rotary=False),
        analysed("sliding-alirope", "sliding, sigmoid, AliRope-6:6", "L", "W", None, slopes="6:6"),
        analysed("alirope-wide", "sliding, sigmoid, AliRope-6:6, window L", "L", "L", None, slopes="6:6"),
        analysed("vanilla-softmax-long", "vanilla, softmax, RoPE, L", "L", None, "L", **SOFTMAX),
        analysed("vanilla-sigmoid-long", "vanilla, sigmoid, ALiBi-12:0, L", "L", None, "L", slopes="12:0",
                use_rotary=False),
        analysed("sliding-softmax-4w", "sliding, softmax, RoPE, length 4W", "4W", "W", None, **SOFTMAX),
        analysed("sliding-softmax-xl", "sliding, softmax, RoPE, window L, length XL", "XL", "L", None, **SOFTMAX),
    )
}  # fmt: skip

TABLE1_LABELS = {
    "llama": "Transformer++ (Llama)",
    "mistral": "softmax window (Mistral)",
    "mamba2": "Mamba2",
    "gated-deltanet": "Gated DeltaNet",
    "retnet": "RetNet",
    "gla": "GLA",
    "deltanet": "DeltaNet",
    "mamba": "Mamba",
    "swat-negative": "SWAT (-)",
    "swat-positive": "SWAT (+)",
    "swat-balanced": "SWAT (-+)",
}


@dataclass(frozen=True)
class SwatExperiment(Experiment):
    """Variants of ANALYSIS at SWAT's scales."""

    names: tuple[str, ...] = ()

    @property
    @override
    def scales(self) -> Mapping[str, Scale]:
        return SCALES

    @override
    def variants(self, scale: Scale) -> Mapping[str, SizedVariant]:
        return {name: ANALYSIS[name] for name in self.names}

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

    @override
    def lead(self, scale: Scale) -> str:
        return (
            f"SWAT, arXiv 2502.18845. Windows and lengths are written in the paper's terms: W = {scale.sizes['W']:,} "
            f"here (128 there), L = {scale.sizes['L']:,} (1,024), XL = {scale.sizes['XL']:,} (4,096)."
        )
