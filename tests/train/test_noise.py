"""Layers that draw noise in a run: micro-batches and processes draw what one pass over the whole step draws."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from swat_lm.data.batches import noise_seeds
from swat_lm.train import run
from swat_lm.train.metrics import read_metrics
from tests.train.conftest import MODEL
from tests.train.runs import ready

TAIPAN = {**MODEL, "layers": [{"kind": "taipan", "sliding_window": 8, "budget_weight": 2.0}, "mamba2"]}


def test_micro_batches_draw_the_same_noise(make_recipe):
    """And the budget, which is per row, is averaged over all of them; every number of the gate is shown by layer."""
    lines = []
    for size in (None, 1):
        recipe = replace(make_recipe(f"run-{size}", steps=3, evaluate_every=0, micro_batch_size=size), model=TAIPAN)
        run(recipe)
        lines.append(read_metrics(Path(recipe.out, "metrics.jsonl")))
    names = ("loss", "auxiliary_budget", "layers_selected", "layers_selected_0", "layers_selected_without_noise_0")
    for whole, parts in zip(*lines, strict=True):
        for name in names:
            assert parts[name] == pytest.approx(whole[name], rel=2e-5), name
        assert 0 < whole["layers_selected"] < 1
        assert whole["auxiliary_budget"] > 0


def test_every_row_of_every_step_has_a_seed_of_its_own(make_recipe):
    source = ready(make_recipe("run")).source
    whole = [source.batch(step) for step in range(40)]
    seeds = torch.cat([batch.noise_seed for batch in whole])
    assert len(seeds.unique()) == 160
    assert int(seeds.min()) >= 0
    for step in (0, 39):
        assert torch.equal(source.batch(step, range(1, 4, 2)).noise_seed, whole[step].noise_seed[1:4:2])
    assert not torch.equal(noise_seeds(torch.arange(4).numpy(), 1), noise_seeds(torch.arange(4).numpy(), 2))
