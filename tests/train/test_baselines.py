"""Baselines from libraries under the same trainer: they learn, stop, go on bit for bit and export as themselves."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from swat_lm.train import Event, run
from tests.model.test_architectures import TINY
from tests.train.runs import assert_same_run, metrics, weights


def baseline(make_recipe, out: str, name: str, **train):
    recipe = make_recipe(out, **{"steps": 4, "save_every": 2, "evaluate_every": 2, "log_every": 1, **train})
    data = replace(recipe.data, documents="concatenate", sequence_length=32)
    return replace(recipe, model={"architecture": name, **TINY[name]}, data=data)


@pytest.mark.parametrize("name", TINY)
def test_baseline_is_stopped_goes_on_and_loads(make_recipe, name):
    whole, parts = baseline(make_recipe, "whole", name, export=True), baseline(make_recipe, "parts", name)
    result = run(whole)

    def stop(event: Event) -> None:
        if event.kind == "step" and event.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    assert run(parts, stop).interrupted
    assert run(parts).last_step == 4
    assert_same_run(whole, parts)
    assert metrics(whole.out)[-1][2] < metrics(whole.out)[0][2]

    assert result.export is not None
    model = AutoModelForCausalLM.from_pretrained(result.export)
    assert type(model).__module__.startswith("transformers.")
    trained = weights(whole)
    assert all(torch.equal(trained[key], weight) for key, weight in model.state_dict().items())
    assert (model.config.eos_token_id, model.config.vocab_size) == (257, 259)


def test_what_a_baseline_cannot_do_is_refused_before_anything_is_written(make_recipe):
    recipe = baseline(make_recipe, "run", "mamba2")
    apart = replace(recipe, data=replace(recipe.data, documents="separate"))
    misspelt = replace(recipe, model={**recipe.model, "state_sise": 8})
    with pytest.raises(ValueError, match="mamba2 cannot keep the documents packed in one row apart"):
        run(apart)
    assert not Path(recipe.out).exists()
    with pytest.raises(ValueError, match="did you mean 'state_size'"):
        run(misspelt)
    run(recipe)
    other = replace(recipe, model={**recipe.model, "state_size": 16})
    with pytest.raises(ValueError, match=r"state_size \(checkpoint 8, recipe 16\)"):
        run(other)
