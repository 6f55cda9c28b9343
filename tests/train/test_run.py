import itertools
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from swat_lm.model.recipe_fields import DEFAULTS, config_from_recipe, written_out
from swat_lm.recipe import load_recipe
from swat_lm.train import DivergedError, Event, run
from swat_lm.train.checkpoint import find_checkpoints
from swat_lm.train.engine import Engine
from swat_lm.train.metrics import read_metrics
from swat_lm.train.setup import set_up
from tests.train.runs import assert_close, assert_same_run, metrics, snapshot, weights


def stop_at(step: int, number: int = signal.SIGINT):
    """An event listener that interrupts its own process after a step."""

    def listen(event: Event) -> None:
        if event.kind == "step" and event.step == step:
            os.kill(os.getpid(), number)

    return listen


def test_whole_run_leaves_what_it_promises(make_recipe):
    recipe = make_recipe("run", export=True, keep=2)
    events: list[Event] = []
    result = run(recipe, events.append)
    out = Path(recipe.out)

    assert (result.last_step, result.interrupted, result.out) == (8, False, out)
    assert result.checkpoint == out / "checkpoints" / "step-00000008"
    assert [path.name for path in find_checkpoints(out)] == ["step-00000006", "step-00000008"]
    kept = load_recipe(out / "recipe.yaml")
    assert replace(kept, model=recipe.model) == recipe
    # with what the recipe left open, so that another default is no other model
    assert kept.model == written_out(recipe.model)
    assert kept.model.keys() >= DEFAULTS.keys()
    assert config_from_recipe(kept.model, 259).to_dict() == config_from_recipe(recipe.model, 259).to_dict()
    assert not list(out.rglob(".tmp*"))

    lines = read_metrics(out / "metrics.jsonl")
    assert [one["step"] for one in lines] == list(range(1, 9))
    assert [one["step"] for one in lines if "held_out_loss" in one] == [4, 8]
    assert lines[-1]["loss"] == result.last_loss < lines[0]["loss"]
    assert lines[-1]["held_out_loss"] == result.held_out_loss
    # one byte per token, so the two units differ by ln 2 and by the end-of-text tokens only
    assert lines[-1]["held_out_bits_per_byte"] == pytest.approx(result.held_out_loss / 0.6931, rel=0.02)
    assert all(one["tokens_per_second"] > 0 and one["flops_per_second"] > one["tokens_per_second"] for one in lines)
    assert all(one["peak_memory_bytes"] > 1e6 for one in lines)
    # 4 rows of 64 tokens, of which the first and the first of each document are no targets
    assert all(4 * 50 < after["tokens"] - before["tokens"] <= 4 * 63 for before, after in itertools.pairwise(lines))

    kinds = [one.kind for one in events if one.kind != "prepare"]
    steps = ["step"] * 3 + ["save", "step", "evaluate", "step", "step", "save", "step", "step", "evaluate", "save"]
    assert kinds == ["start", *steps, "export", "finish"]
    last = [one for one in events if one.kind == "step"][-1]
    assert (last.step, last.steps, last.loss, last.seconds_left) == (8, 8, result.last_loss, 0)


def test_export_loads_as_any_model_does(make_recipe):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe = make_recipe("run", steps=2, export=True)
    result = run(recipe)
    assert result.export is not None
    model = AutoModelForCausalLM.from_pretrained(result.export)
    tokenizer = AutoTokenizer.from_pretrained(result.export)
    assert type(model).__name__ == "SwatForCausalLM"
    trained = weights(recipe)
    assert all(torch.equal(trained[name], weight) for name, weight in model.state_dict().items())
    assert load_file(result.export / "model.safetensors").keys() <= trained.keys()
    prompt = tokenizer("the red fox", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape == (1, len("the red fox") + 3)
    assert "2 optimizer steps" in (result.export / "README.md").read_text()


def test_same_seed_twice_is_bitwise_equal_and_another_is_not(make_recipe):
    one, other, third = make_recipe("one"), make_recipe("other"), replace(make_recipe("third"), seed=1)
    for recipe in (one, other, third):
        run(recipe)
    assert_same_run(one, other)
    assert metrics(one.out)[0] != metrics(third.out)[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_saves_and_goes_on_bit_for_bit(make_recipe, number):
    whole, parts = make_recipe("whole"), make_recipe("parts")
    run(whole)
    events: list[Event] = []
    stop = stop_at(5, number)

    def listen(event: Event) -> None:
        events.append(event)
        stop(event)

    first = run(parts, listen)
    # the step under way when the signal came is finished; the signal came after step 5
    assert (first.interrupted, first.last_step) == (True, 6)
    assert first.checkpoint is not None
    assert first.checkpoint.name == "step-00000006"
    assert events[-1].kind == "interrupt"

    second = run(parts)
    assert (second.interrupted, second.last_step) == (False, 8)
    assert_same_run(whole, parts)


def test_lines_after_the_checkpoint_are_written_once(make_recipe):
    # dies after step 5, with its last checkpoint at step 3
    recipe, whole = make_recipe("run"), make_recipe("whole")

    def fail(event: Event) -> None:
        if event.kind == "step" and event.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe, fail)
    assert [one[0] for one in metrics(recipe.out)] == [1, 2, 3, 4]
    run(recipe)
    run(whole)
    assert_same_run(recipe, whole)


def test_finished_run_has_nothing_left_to_do_and_a_longer_one_goes_on(make_recipe):
    recipe = make_recipe("run", steps=4, schedule="constant")
    run(recipe)
    again = run(replace(recipe, train=replace(recipe.train, export=True)))
    assert (again.last_step, again.last_loss, again.interrupted) == (4, None, False)
    assert again.export is not None
    assert again.export.is_dir()
    longer = run(replace(recipe, train=replace(recipe.train, steps=6)))
    assert longer.last_step == 6
    assert [one[0] for one in metrics(recipe.out)] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ValueError, match=r"step 6, beyond train.steps \(5\)"):
        run(replace(recipe, train=replace(recipe.train, steps=5)))


def test_accumulation_and_checkpointing_change_nothing_but_rounding(make_recipe):
    # rows hold different numbers of targets, so dividing per micro-batch would show
    whole = make_recipe("whole", steps=4)
    variants = [make_recipe("parts", steps=4, micro_batch_size=1)]
    variants += [make_recipe("recomputed", steps=4, activation_checkpointing=True)]
    chunks = {"execution": "chunks", "execution_settings": {"chunk_size": 24}}
    variants += [make_recipe("chunks", steps=4, micro_batch_size=2, **chunks)]
    blocks = {"execution": "blockwise", "execution_settings": {"block_size": 24}}
    variants += [make_recipe("blocks", steps=4, **blocks)]
    run(whole)
    for recipe in variants:
        run(recipe)
        assert_close(metrics(whole.out), metrics(recipe.out))


def test_bf16_trains_close_to_fp32(make_recipe):
    exact, rounded = make_recipe("exact", steps=4), make_recipe("rounded", steps=4, precision="bf16")
    run(exact)
    run(rounded)
    losses = [[one[2] for one in metrics(recipe.out)] for recipe in (exact, rounded)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
    assert all(weight.dtype == torch.float32 for weight in weights(rounded).values())


def test_divergence_names_step_and_last_good_checkpoint(make_recipe):
    recipe = make_recipe("run", save_every=1)
    original, poisoned = torch.Tensor.backward, False

    def backward(self, *arguments, **options):
        original(self * float("nan") if poisoned else self, *arguments, **options)

    def spoil(event: Event) -> None:
        nonlocal poisoned
        poisoned = poisoned or (event.kind == "save" and event.step == 3)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", backward)
        with pytest.raises(DivergedError, match=r"step 4: loss .*, gradient norm nan; .*step-00000003"):
            run(recipe, spoil)
    assert find_checkpoints(Path(recipe.out))[-1].name == "step-00000003"
    assert run(recipe).last_step == 8


def test_huge_learning_rate_is_stopped(make_recipe):
    with pytest.raises(DivergedError, match="no checkpoint yet"):
        run(make_recipe("run", steps=40, learning_rate=1e30, warmup_steps=0, save_every=0, grad_clip=None))


def test_damaged_newest_checkpoint_is_passed_over_by_name(make_recipe):
    recipe, whole = make_recipe("run"), make_recipe("whole")
    run(whole)
    run(recipe)
    data = next((Path(recipe.out) / "checkpoints" / "step-00000008").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:100])
    with pytest.warns(UserWarning, match=r"step-00000008 is damaged.*continuing from .*step-00000006"):
        run(recipe)
    assert_same_run(recipe, whole)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda one: replace(one, model={**one.model, "hidden_size": 64}), r"hidden_size \(checkpoint 32, recipe 64\)"),
        (lambda one: replace(one, seed=5), r"seed \(before 0, now 5\)"),
        (lambda one: replace(one, train=replace(one.train, batch_size=8)), "train.batch_size"),
        (lambda one: replace(one, data=replace(one.data, sequence_length=32)), "data.sequence_length"),
        (lambda one: replace(one, train=replace(one.train, resume="never")), "already holds step-00000004"),
        (lambda one: replace(one, train=replace(one.train, loggers=("wandb",))), "pip install wandb"),
        (lambda one: replace(one, model={**one.model, "vocab_size": 100}), "vocab_size 100 is smaller"),
    ],
)
def test_refused_recipes_leave_the_run_as_it_was(make_recipe, monkeypatch, change, named):
    recipe = make_recipe("run", steps=4)
    run(recipe)
    before = snapshot(Path(recipe.out))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=named):
        run(change(recipe))
    assert snapshot(Path(recipe.out)) == before


def test_a_misspelt_source_leaves_no_run_folder(make_recipe, tmp_path):
    recipe = make_recipe("run")
    recipe = replace(recipe, data=replace(recipe.data, sources=(str(tmp_path / "nothing"),)))
    with pytest.raises(ValueError, match="nothing"):
        run(recipe)
    assert not Path(recipe.out).exists()


def test_run_from_another_runs_checkpoint(make_recipe):
    first = make_recipe("first", steps=4)
    result = run(first)
    fork = make_recipe("fork", steps=7, resume=str(result.checkpoint), learning_rate=1e-4, batch_size=8)
    assert run(fork, stop_at(5)).last_step == 6
    assert run(fork).last_step == 7
    assert [one[0] for one in metrics(fork.out)] == [5, 6, 7]
    assert metrics(fork.out)[0][2] < metrics(first.out)[0][2]
    kept = load_recipe(Path(fork.out) / "recipe.yaml")
    assert (replace(kept, model=fork.model), kept.model) == (fork, written_out(fork.model))


def test_held_out_rows_are_the_same_for_every_seed(make_recipe):
    rows = []
    for recipe in (make_recipe("one"), replace(make_recipe("other"), seed=9)):
        Path(recipe.out).mkdir()
        training = set_up(Engine(recipe.train), recipe)
        assert training.held_out is not None
        rows.append((training.source.batch(0), next(training.held_out.source.pass_over())))
    assert not torch.equal(rows[0][0].input_ids, rows[1][0].input_ids)
    assert torch.equal(rows[0][1].input_ids, rows[1][1].input_ids)


def test_no_held_out_documents_means_no_evaluation(make_recipe):
    recipe = make_recipe("run", steps=4)
    result = run(replace(recipe, data=replace(recipe.data, held_out=0.0)))
    assert result.held_out_loss is None
    assert not any("held_out_loss" in one for one in read_metrics(Path(recipe.out) / "metrics.jsonl"))
