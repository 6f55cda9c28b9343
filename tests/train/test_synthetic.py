"""Training on a recall task: the loss on answers falls below guessing, and the rows resume where they were."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from swat_lm.recipe import DataRecipe, Recipe, TrainRecipe
from swat_lm.train import run
from swat_lm.train.metrics import read_metrics

from .runs import weights

MODEL = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "sliding_window": 16, "score_bias": "-log(window)",
}  # fmt: skip


def recipe_for(out: Path, steps: int, **changes) -> Recipe:
    train = TrainRecipe(
        steps=steps, batch_size=64, learning_rate=5e-3, warmup_steps=3, weight_decay=0.0, schedule="constant",
        evaluate_every=steps, evaluate_batches=2, save_every=0, **changes,
    )  # fmt: skip
    data = DataRecipe(sources=("synthetic:mqar?pairs=2&keys=4&values=4",), sequence_length=8, held_out=0.1)
    return Recipe(name="task", out=str(out), model=MODEL, data=data, train=train)


def test_loss_on_answers_falls_below_guessing(tmp_path: Path):
    recipe = recipe_for(tmp_path / "run", 70)
    result = run(recipe)
    assert result.held_out_loss is not None
    assert result.held_out_loss < 0.75 * math.log(4)
    logged = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert logged[0]["loss"] > math.log(4)
    # two answers in each row, nothing else
    assert logged[-1]["tokens"] == 70 * 64 * 2
    assert "held_out_bits_per_byte" not in logged[-1]


def test_rows_go_on_where_they_were(tmp_path: Path):
    whole, parts = recipe_for(tmp_path / "whole", 6), recipe_for(tmp_path / "parts", 6)
    run(whole)
    run(replace(parts, train=replace(parts.train, steps=3, evaluate_every=6)))
    run(parts)
    left, right = weights(whole), weights(parts)
    assert all(torch.equal(left[name], right[name]) for name in left)
    other = replace(parts.data, sources=("synthetic:kv?keys=4&values=4",))
    with pytest.raises(ValueError, match="data"):
        run(replace(parts, data=other))


def test_a_bad_task_leaves_no_folder(tmp_path: Path):
    recipe = recipe_for(tmp_path / "run", 6)
    with pytest.raises(ValueError, match="no task of that name"):
        run(replace(recipe, data=replace(recipe.data, sources=("synthetic:mqr",))))
    assert not (tmp_path / "run").exists()
