"""The models that each table and figure of the paper compares, as data, and the recipe of each at a scale.

Experiments share variants: one that two of them need is trained once.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swat_lm.papers.scales import Budget, Scale
from swat_lm.recipe import DataRecipe, Recipe, TrainRecipe

__all__ = ["EXPERIMENTS", "Experiment", "Variant", "find_experiment", "variant_model", "variant_recipe", "variants_of"]

SOFTMAX = {"score_function": "softmax", "slopes": "none"}


@dataclass(frozen=True)
class Variant:
    """One trained model; W, 4W, L, XL, BW and BL are sizes of the scale."""

    name: str
    label: str
    length: str
    """Training length."""
    window: str | None
    """Of training; None: full attention."""
    evaluated: str | None
    """Window of evaluation; None: as trained."""
    model: Mapping[str, Any]
    is_benchmark: bool = False
    """Whether it belongs to Table 1, with that table's budget."""


def variant(name: str, label: str, length: str, window: str | None, evaluated: str | None, **model: Any) -> Variant:
    """A variant of Tables 2 and 3: our model with these fields."""
    return Variant(name, label, length, window, evaluated, {"sliding_window": window, **model})


ANALYSIS = {
    one.name: one
    for one in (
        variant("vanilla-softmax-short", "vanilla, softmax, RoPE, W", "W", None, "W", **SOFTMAX),
        variant("vanilla-sigmoid-short", "vanilla, sigmoid, RoPE, W", "W", None, "W", slopes="none"),
        variant("sliding-softmax", "sliding, softmax, RoPE", "L", "W", None, **SOFTMAX),
        variant("sliding-alibi-12-0", "sliding, sigmoid, ALiBi-12:0", "L", "W", None, slopes="12:0", use_rotary=False),
        variant("sliding-alibi-8-4", "sliding, sigmoid, ALiBi-8:4", "L", "W", None, slopes="8:4", use_rotary=False),
        variant("sliding-alibi-6-6", "sliding, sigmoid, ALiBi-6:6", "L", "W", None, slopes="6:6", use_rotary=False),
        variant("sliding-alirope", "sliding, sigmoid, AliRope-6:6", "L", "W", None, slopes="6:6"),
        variant("alirope-wide", "sliding, sigmoid, AliRope-6:6, window L", "L", "L", None, slopes="6:6"),
        variant("vanilla-softmax-long", "vanilla, softmax, RoPE, L", "L", None, "L", **SOFTMAX),
        variant("vanilla-sigmoid-long", "vanilla, sigmoid, ALiBi-12:0, L", "L", None, "L", slopes="12:0",
                use_rotary=False),
        variant("sliding-softmax-4w", "sliding, softmax, RoPE, length 4W", "4W", "W", None, **SOFTMAX),
        variant("sliding-softmax-xl", "sliding, softmax, RoPE, window L, length XL", "XL", "L", None, **SOFTMAX),
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
class Experiment:
    """A table or figure of the paper."""

    name: str
    title: str
    variants: tuple[str, ...]
    """Names in ANALYSIS; empty for Table 1, whose models the scale names."""
    reads_texts: bool = True
    """Whether loss by length is measured."""


TABLE3 = tuple(name for name in ANALYSIS if name not in ("sliding-softmax-4w", "sliding-softmax-xl"))
MODULES = ("sliding-softmax", "sliding-alibi-12-0", "sliding-alibi-8-4", "sliding-alibi-6-6", "sliding-alirope")
EXPERIMENTS = {
    one.name: one
    for one in (
        Experiment("table1", "Table 1: benchmarks at equal size", (), reads_texts=False),
        Experiment(
            "table2",
            "Table 2: training and evaluation length",
            ("vanilla-softmax-short", "vanilla-softmax-long", "sliding-softmax", "sliding-softmax-4w",
             "sliding-softmax-xl"),
        ),
        Experiment("table3", "Table 3: ablation of score function, slopes and rotary", TABLE3),
        Experiment("figure2", "Figure 2: softmax models behind a window they were not trained with",
                   ("vanilla-softmax-long",)),
        Experiment("figure3", "Figure 3: variance of hidden states by layer and position",
                   ("vanilla-softmax-long", "sliding-softmax", "sliding-alirope"), reads_texts=False),
        Experiment("figure5", "Figure 5: training loss of the module ablations", MODULES, reads_texts=False),
    )
}  # fmt: skip


def find_experiment(name: str) -> Experiment:
    """An experiment by its name; raises ValueError naming the nearest."""
    if name in EXPERIMENTS:
        return EXPERIMENTS[name]
    near = difflib.get_close_matches(name, EXPERIMENTS, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"no experiment {name!r}{hint} Expected one of {', '.join(EXPERIMENTS)}")


def variants_of(experiment: Experiment, scale: Scale) -> dict[str, Variant]:
    """The variants an experiment needs at this scale."""
    if experiment.variants:
        return {name: ANALYSIS[name] for name in experiment.variants}
    return {
        name: Variant(name, TABLE1_LABELS[name], "BL", fields.get("sliding_window"), None, fields, is_benchmark=True)
        for name, fields in scale.table1.items()
    }


def budget_of(one: Variant, scale: Scale) -> Budget:
    """Which shape and training a variant has."""
    return scale.benchmarks if one.is_benchmark else scale.analysis


def variant_model(one: Variant, scale: Scale) -> dict[str, Any]:
    """The `model:` of a variant's recipe, sizes in tokens."""
    budget, fields = budget_of(one, scale), dict(one.model)
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
    one: Variant, scale: Scale, seed: int, out: Path, sources: tuple[str, ...], tokenizer: str, text_field: str = "text"
) -> Recipe:
    """The run of one variant: the same tokens and schedule for all variants of a budget, whatever their length."""
    budget, length = budget_of(one, scale), scale.sizes[one.length]
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
        text_field=text_field,
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
