"""What layers say beside their output: auxiliary losses, statistics, metrics, and options of the optimizer."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from swat_lm.interruption import Interruption
from swat_lm.layers.base import Auxiliary
from swat_lm.recipe import Recipe
from swat_lm.train import run
from swat_lm.train.auxiliary import StepAuxiliary, count_divisors
from swat_lm.train.engine import Engine
from swat_lm.train.loop import Run
from swat_lm.train.metrics import read_metrics
from swat_lm.train.optimizer import make_optimizer, set_hyperparameters
from tests.train.runs import assert_close, assert_same_run, metrics, ready, weights
from tests.train.speaking import SpeakingLayer

pytestmark = pytest.mark.usefixtures("speaking_kinds")
BESIDE = ("auxiliary_balance", "layers_score")


def speaking(recipe: Recipe) -> Recipe:
    return replace(recipe, model={**recipe.model, "layers": ["speaking", "attention"]})


def beside(recipe: Recipe) -> list[list[float]]:
    return [[one[name] for name in BESIDE] for one in read_metrics(Path(recipe.out, "metrics.jsonl"))]


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def accumulated(recipe: Recipe) -> tuple[dict[str, torch.Tensor], StepAuxiliary, dict[str, torch.Tensor]]:
    """One step's gradients by the loop's own code."""
    training = ready(recipe)
    step = Run(training, None, [], Interruption())
    batch = training.source.batch(0)
    numbers, auxiliary = step.accumulate_gradients(
        training.engine.micro_batches(batch), training.objective.num_targets(batch)
    )
    return gradients(training.model), auxiliary, numbers


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_auxiliary_loss_is_its_sum_over_its_divisor_however_the_step_is_split(make_recipe, checkpointing: bool):
    weight = {"auxiliary_weights": {"balance": 0.3}}
    recipe = speaking(make_recipe("run", objective_settings=weight, activation_checkpointing=checkpointing))
    training = ready(recipe)
    batch, model = training.source.batch(0), training.model
    output = model(
        batch.input_ids,
        position_ids=batch.position_ids,
        document_ids=batch.document_ids,
        labels=batch.labels,
        num_items_in_batch=training.objective.num_targets(batch),
    )
    total, divisor = output.auxiliary[0].losses["balance"]
    counted = int((batch.position_ids % 3 == 0).sum())
    assert int(divisor) == counted
    (output.loss + 0.3 * total / counted).backward()
    expected = gradients(model)
    for micro in (None, 2, 1):
        split = replace(recipe, train=replace(recipe.train, micro_batch_size=micro))
        found, auxiliary, numbers = accumulated(split)
        assert found.keys() == expected.keys()
        for name, one in expected.items():
            torch.testing.assert_close(found[name], one, rtol=2e-4, atol=1e-6, msg=name)
        assert auxiliary.statistics[0]["seen"].item() == counted
        torch.testing.assert_close(numbers["loss"], output.loss.detach())
        torch.testing.assert_close(numbers["auxiliary_balance"], (total / counted).detach())


def test_counting_divisors_draws_no_random_numbers_and_leaves_no_gradient(make_recipe):
    recipe = speaking(make_recipe("run", micro_batch_size=1))
    training = ready(recipe)
    before = torch.get_rng_state()
    parts = training.engine.micro_batches(training.source.batch(0))
    divisors = count_divisors(training.engine, training.objective, training.model, parts)
    assert torch.equal(before, torch.get_rng_state())
    assert not gradients(training.model)
    batch = training.source.batch(0)
    assert [int(one) for one in divisors.values()] == [int((batch.position_ids % 3 == 0).sum())]
    plain = ready(make_recipe("plain", micro_batch_size=1))
    assert count_divisors(plain.engine, plain.objective, plain.model, parts) == {}


def test_runs_log_it_absorb_it_keep_it_and_judge_without_it(make_recipe):
    whole = speaking(make_recipe("whole", schedule="constant", export=True))
    run(whole)
    split = speaking(make_recipe("split", schedule="constant", micro_batch_size=1, activation_checkpointing=True))
    run(split)
    assert_close(metrics(whole.out), metrics(split.out), rel=1e-4)
    for one, other in zip(beside(whole), beside(split), strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    assert beside(whole)[-1][0] < beside(whole)[0][0]
    # the layer counted every step's tokens, and its checkpoint keeps the count
    training = ready(whole)
    expected = sum(int((training.source.batch(step).position_ids % 3 == 0).sum()) for step in range(8))
    assert weights(whole)["model.layers.0.seen"].item() == expected
    assert weights(split)["model.layers.0.seen"].item() == expected
    parts = speaking(make_recipe("parts", schedule="constant", steps=4))
    run(parts)
    resumed = replace(parts, train=replace(parts.train, steps=8))
    run(resumed)
    assert_same_run(whole, resumed)
    # held-out rows are judged by cross-entropy alone, whatever the weight
    assert training.held_out is not None
    held = training.held_out.evaluate(training.engine, training.model, training.objective)
    assert held.loss == pytest.approx(metrics(whole.out)[-1][-1])


def test_weight_zero_trains_as_without(make_recipe):
    quiet = speaking(make_recipe("quiet", steps=3, objective_settings={"auxiliary_weights": {"balance": 0}}))
    run(quiet)
    before = ready(replace(quiet, out=quiet.out + "-new"))
    router = "model.layers.0.router.weight"
    assert torch.equal(weights(quiet)[router], before.engine.whole_weights(before.model)[router])


def test_a_layer_must_speak_always_or_never(make_recipe):
    engine = Engine(make_recipe("run").train)
    step = StepAuxiliary(engine, {}, {})
    with pytest.raises(AssertionError, match="balance"):
        step.add([Auxiliary(losses={"balance": (torch.ones(()), 1.0)})])


def test_a_divisor_of_zero_gives_zero(make_recipe):
    step = StepAuxiliary(Engine(make_recipe("run").train), {}, None)
    added = step.add([Auxiliary(losses={"balance": (torch.zeros((), requires_grad=True), 0)})])
    assert added is not None
    assert added.item() == 0


def test_options_make_groups_of_their_own(make_recipe):
    recipe = speaking(make_recipe("run", weight_decay=0.1))
    model = ready(recipe).model
    optimizer = make_optimizer(model, recipe.train)
    set_hyperparameters(optimizer, recipe.train, 2e-3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        names[id(one)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for one in group["params"]
    }
    assert found.keys() == set(names.values())
    assert found["model.layers.0.router.weight"] == (2e-3, 0.0)
    assert found["model.layers.0.gain"] == (pytest.approx(6e-3), 0.5)
    assert found["model.layers.0.mlp.up_proj.weight"] == (2e-3, 0.1)
    assert found["model.norm.weight"] == (2e-3, 0.0)
    assert len(optimizer.param_groups) == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"routr.weight": {}}, "'routr.weight', which is no parameter"),
        ({"gain": {"lr": 1.0}}, "expected weight_decay or learning_rate_factor and a number of at least 0; got lr=1.0"),
        ({"gain": {"weight_decay": -1}}, "got weight_decay=-1"),
    ],
)
def test_options_that_do_not_exist_are_refused(make_recipe, monkeypatch, options, said: str):
    monkeypatch.setattr(SpeakingLayer, "optimizer_options", lambda self: options)
    recipe = speaking(make_recipe("run"))
    with pytest.raises(ValueError) as caught:
        run(recipe)
    assert said in str(caught.value)


def test_mamba_keeps_its_decays_and_the_two_usual_groups(make_recipe):
    recipe = make_recipe("run")
    model = {**recipe.model, "layers": [{"kind": "mamba2", "ssm_head_dim": 16, "state_size": 8}]}
    recipe = replace(recipe, model=model)
    training = ready(recipe)
    decayed, kept = training.optimizer.param_groups
    names = {id(one): name for name, one in training.model.named_parameters()}
    assert {name.rpartition(".")[2] for one in kept["params"] if (name := names[id(one)])} >= {"A_log", "D", "dt_bias"}
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
