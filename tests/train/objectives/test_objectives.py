"""The table of objectives: what each counts and minimises, what it refuses, and what of it a checkpoint keeps."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from swat_lm.data.batches import Batch
from swat_lm.recipe import RecipeError
from swat_lm.train import run
from swat_lm.train.metrics import read_metrics
from swat_lm.train.objectives import OBJECTIVES, LastTokens, MaskedNextToken, NextToken, make_objective
from tests.train.runs import assert_close, assert_same_run, metrics, ready


def by_hand(model, batch: Batch, learnt: torch.Tensor) -> torch.Tensor:
    """Sum over the learnt tokens of minus the log-probability that a plain forward pass gives them."""
    logits = model(batch.input_ids, position_ids=batch.position_ids, document_ids=batch.document_ids).logits
    log_probabilities = F.log_softmax(logits[:, :-1], dim=-1)
    chosen = log_probabilities.gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)
    return -(chosen * learnt[:, 1:]).sum()


def test_the_table_names_every_objective():
    expected = {"next_token": NextToken, "masked_next_token": MaskedNextToken, "last_tokens": LastTokens}
    assert expected == OBJECTIVES
    assert all(kind.name == name and kind.Settings() for name, kind in OBJECTIVES.items())


@pytest.mark.parametrize("documents", ["separate", "concatenate"])
def test_the_loss_is_that_of_marked_tokens_alone(marked_recipe, documents):
    recipe = marked_recipe("run")
    recipe = replace(recipe, data=replace(recipe.data, documents=documents))
    training = ready(recipe)
    model, batch = training.model.eval(), training.source.batch(3)
    assert batch.loss_mask is not None
    learnt = batch.loss_mask & (batch.labels >= 0)
    assert 0 < int(learnt.sum()) < batch.num_targets
    assert training.objective.num_targets(batch) == int(learnt.sum())
    found = training.objective.loss(model, batch, num_targets=7.0)
    torch.testing.assert_close(found.loss, by_hand(model, batch, learnt) / 7.0)
    assert found.metrics["marked_share"].item() == pytest.approx(batch.loss_mask.float().mean().item())
    assert torch.equal(training.objective.cross_entropy(model, batch, 7.0), found.loss)
    everything = NextToken(training.objective.settings)
    assert everything.num_targets(batch) == batch.num_targets
    torch.testing.assert_close(everything.loss(model, batch, 1.0).loss, by_hand(model, batch, batch.labels >= 0))


def test_prompts_have_no_gradient_of_their_own(marked_recipe):
    """A row without an answer teaches nothing."""
    training = ready(marked_recipe("run"))
    batch = training.source.batch(0)
    assert batch.loss_mask is not None
    batch = replace(batch, loss_mask=torch.zeros_like(batch.loss_mask))
    training.objective.loss(training.model, batch, 1.0).loss.backward()
    assert training.objective.num_targets(batch) == 0
    assert all(one.grad is None or not one.grad.any() for one in training.model.parameters())


def test_a_run_learns_answers_resumes_and_is_held_out_on_them(marked_recipe, tmp_path: Path):
    whole, parts = marked_recipe("whole", micro_batch_size=2), marked_recipe("parts")
    run(whole)
    first = replace(parts, train=replace(parts.train, steps=4, schedule="constant"))
    run(first)
    resumed = replace(first, train=replace(first.train, steps=8))
    run(resumed)
    straight = marked_recipe("straight", schedule="constant")
    run(straight)
    assert_same_run(straight, resumed)
    unsplit = marked_recipe("unsplit")
    run(unsplit)
    assert_close(metrics(whole.out), metrics(unsplit.out))
    logged = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert logged[-1]["loss"] < logged[0]["loss"]
    assert logged[-1]["tokens"] < 8 * 4 * 63 * 0.6
    training = ready(whole)
    assert training.held_out is not None
    held = training.held_out.evaluate(training.engine, training.model, training.objective)
    assert held.loss == pytest.approx(logged[-1]["held_out_loss"])
    batches = list(training.held_out.source.pass_over(num_batches=2))
    assert held.num_targets == sum(training.objective.num_targets(one) for one in batches)
    # bytes tell one each, and ends of text none
    ids = torch.cat([training.objective.labels(one).flatten() for one in batches])
    assert held.num_bytes == int(((ids >= 0) & (ids < 256)).sum())


def test_a_recall_task_is_the_same_under_both(make_recipe):
    runs = {}
    for objective in ("next_token", "masked_next_token"):
        recipe = make_recipe(f"task-{objective}", steps=3, objective=objective)
        data = replace(recipe.data, sources=("synthetic:mqar?pairs=4&keys=16&values=16",))
        run(replace(recipe, data=data))
        runs[objective] = metrics(recipe.out)
    assert runs["next_token"] == runs["masked_next_token"]


def test_last_tokens_are_learnt_from_as_latents_are(make_recipe, tmp_path: Path):
    """A Perceiver's run: the divisor counts what latents predict, in steps and on held-out rows, and all is said."""
    layers = [{"kind": "perceiver", "latents": 8}]
    chosen = {"objective": "last_tokens", "objective_settings": {"count": 8}}
    recipe = make_recipe("latents", steps=3, micro_batch_size=2, **chosen)
    recipe = replace(recipe, model={**recipe.model, "layers": layers})
    training = ready(recipe)
    batch = training.source.batch(0)
    learnt = batch.labels >= 0
    learnt[:, :-7] = False
    assert training.objective.num_targets(batch) == int(learnt.sum()) == 7 * len(learnt)
    found = training.objective.loss(training.model, batch, num_targets=5.0).loss
    logits = training.model.eval()(batch.input_ids).logits[:, :-1].log_softmax(-1)
    expected = -logits.gather(-1, batch.labels[:, -7:, None]).sum() / 5
    torch.testing.assert_close(found, expected)
    run(replace(recipe, out=str(tmp_path / "whole")))
    logged = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert logged[0]["loss"] == pytest.approx(5.6, abs=0.5)
    wrong = replace(recipe, out=str(tmp_path / "wrong"))
    wrong = replace(wrong, train=replace(wrong.train, objective="next_token", objective_settings={}))
    with pytest.raises(ValueError, match=r"labels: the layers hand on the last 8 tokens alone.*objective: last_tokens"):
        run(wrong)


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"objective": "masked_next_tokn"}, "unknown objective 'masked_next_tokn'; did you mean 'masked_next_token'?"),
        ({"objective": "zzz"}, "unknown objective 'zzz'; known are next_token, masked_next_token"),
        ({"objective": "masked_next_token"}, "plain text marks nothing: set data.format to prompt_answer or messages"),
        ({"objective_settings": {"weights": 1}}, "unknown key train.objective_settings.weights"),
        (
            {"objective_settings": {"auxiliary_weights": {"a": -1}}},
            "auxiliary_weights.a must be at least 0",
        ),
        ({"objective_settings": {"auxiliary_weights": 3}}, "auxiliary_weights must be a mapping"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(make_recipe, tmp_path: Path, train, said: str):
    with pytest.raises(ValueError) as caught:
        run(make_recipe("refused", **train))
    assert said in str(caught.value)
    assert not (tmp_path / "refused").exists()


def test_a_weight_of_a_loss_that_nobody_gives_is_refused(make_recipe):
    with pytest.raises(ValueError, match="no layer gives an auxiliary loss 'balance', nor any other"):
        run(make_recipe("run", objective_settings={"auxiliary_weights": {"balance": 1.0}}))


def test_another_objective_is_another_run_but_old_checkpoints_had_the_default(make_recipe):
    recipe = make_recipe("run", steps=4, schedule="constant")
    run(recipe)
    for manifest in Path(recipe.out).glob("checkpoints/*/checkpoint.json"):
        # as a version without objectives, or formats of rows, wrote it
        content = json.loads(manifest.read_text())
        for key in ("objective", "objective_settings"):
            del content["recipe"]["train"][key]
        for key in ("format", "prompt_field", "answer_field", "messages_field"):
            del content["recipe"]["data"][key]
        manifest.write_text(json.dumps(content))
    again = replace(recipe, train=replace(recipe.train, steps=5))
    assert run(again).last_step == 5
    other = replace(again, train=replace(again.train, objective_settings={"auxiliary_weights": {"a": 1.0}}))
    with pytest.raises(ValueError, match=r"train\.objective_settings\.auxiliary_weights\.a"):
        run(other)


def test_state_is_in_the_checkpoint_and_missing_state_is_the_default(make_recipe, speaking_kinds, tmp_path: Path):
    recipe = make_recipe("run", steps=4, schedule="constant", objective="counting", evaluate_every=2)
    run(recipe)
    # two evaluations of two batches each
    training = ready(recipe)
    assert training.objective.state_dict()["count"].tolist() == [4.0, 2.0]
    longer = replace(recipe, train=replace(recipe.train, steps=8))
    run(longer)
    assert ready(longer).objective.state_dict()["count"].tolist() == [8.0, 4.0]
    # a checkpoint of an objective without state, continued by one with
    plain = make_recipe("plain", steps=4, schedule="constant", evaluate_every=2)
    run(plain)
    for manifest in (tmp_path / "plain").glob("checkpoints/*/checkpoint.json"):
        manifest.write_text(manifest.read_text().replace('"next_token"', '"counting"'))
    stateful = replace(plain, train=replace(plain.train, objective="counting"))
    assert ready(stateful).objective.state_dict()["count"].tolist() == [0.0, 0.0]
    shutil.rmtree(tmp_path / "plain")


def test_settings_come_from_the_recipe(make_recipe):
    recipe = make_recipe("run", objective_settings={"auxiliary_weights": {"balance": 0.5}})
    assert make_objective(recipe).settings.auxiliary_weights == {"balance": 0.5}
    with pytest.raises(RecipeError, match=r"nearest valid key is train\.objective_settings\.auxiliary_weights"):
        make_objective(make_recipe("run", objective_settings={"auxiliary_weight": {}}))


def test_rows_without_an_answer_are_no_perfect_loss(marked_recipe, tmp_path):
    """A prompt longer than a row fills it, and what is marked lies in another."""
    long = tmp_path / "long.jsonl"
    long.write_text("".join(json.dumps({"prompt": "p" * 2000, "answer": str(n)}) + "\n" for n in range(12)))

    def of_long_prompts(out: str, **train):
        recipe = marked_recipe(out, batch_size=1, **train)
        return replace(recipe, data=replace(recipe.data, sources=(str(long),), documents="separate"))

    with pytest.raises(ValueError, match="in the held-out rows there is nothing for masked_next_token to predict"):
        run(of_long_prompts("held-out", evaluate_batches=1))
    assert not (tmp_path / "held-out" / "recipe.yaml").exists()
    with pytest.raises(ValueError, match=r"step \d: its rows hold nothing for masked_next_token to predict"):
        run(of_long_prompts("steps", evaluate_every=0))


def test_layers_that_see_their_targets_are_refused_before_anything_is_written(make_recipe):
    recipe = make_recipe("run")
    for number, kind in enumerate(("attention", "spade")):
        layers = ["attention"] * number + [{"kind": kind, "bidirectional": True, "slopes": "none"}] * (2 - number)
        changed = replace(recipe, model={**recipe.model, "layers": layers})
        message = rf"^train.objective: next_token cannot train layer {number} \({kind}\), which looks both ways"
        with pytest.raises(ValueError, match=message):
            run(changed)
        assert not Path(recipe.out).exists()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"kind": "sparsek", "k": 8, "sliding_window": 9},
            r"\(sparsek\): k \+ sliding_window are 17, so no key is",
        ),
        ({"kind": "ecp", "segment": 16}, r"\(ecp\): a segment of 16 tokens holds the whole row"),
        ({"kind": "longvq", "block": 8, "codes": 4}, r"\(longvq\): two blocks of 8 tokens hold the row, so no code"),
        (
            {"kind": "perceiver", "latents": 6, "history": "segments", "segment": 10},
            r"\(perceiver\): a segment of 10 tokens holds the whole history of 10",
        ),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else "",
)
def test_rows_that_leave_a_part_of_a_layer_idle_are_refused_before_anything_is_written(make_recipe, entry, message):
    recipe = make_recipe("run")
    last = [{"kind": "perceiver", "latents": 6}] if entry["kind"] == "perceiver" else ["attention"]
    model = {**recipe.model, "layers": [entry, *last], "num_hidden_layers": 2}
    changed = replace(recipe, model=model, data=replace(recipe.data, sequence_length=16))
    with pytest.raises(ValueError, match=rf"^data.sequence_length: 16 tokens are too few for layer 0 {message}"):
        run(changed)
    assert not Path(recipe.out).exists()
