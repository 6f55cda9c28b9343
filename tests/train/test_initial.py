"""`model.init`: a run begins with another model's weights, agrees with it, and needs it no more once it has saved."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from swat_lm.data import train_tokenizer
from swat_lm.recipe import Recipe, load_recipe
from swat_lm.train import run
from swat_lm.train.checkpoint import find_checkpoints
from swat_lm.train.trained_text import find_trained_text
from tests.train.conftest import MODEL
from tests.train.runs import assert_same_run, ready, weights


@pytest.fixture
def trained(make_recipe) -> Recipe:
    """A finished run with an export."""
    recipe = make_recipe("trained", steps=4, export=True, evaluate_every=0)
    run(recipe)
    return recipe


def begun(make_recipe, init: str | Path, name: str = "begun", model: dict | None = None, **train) -> Recipe:
    settings = {"init": str(init), **(model or {})}
    return replace(make_recipe(name, **{"schedule": "constant", **train}), model=settings)


@pytest.mark.parametrize("place", ["run", "checkpoint", "export", "run with export only"])
def test_first_weights_are_those_of_the_other_model(make_recipe, trained: Recipe, place: str):
    out = Path(trained.out)
    expected = weights(trained)
    if place == "run with export only":
        shutil.rmtree(out / "checkpoints")
    init = {"checkpoint": out / "checkpoints" / "step-00000004", "export": out / "export"}.get(place, out)
    recipe = begun(make_recipe, init)
    training = ready(recipe)
    found = training.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert training.config["hidden_size"] == MODEL["hidden_size"]
    assert training.start is None
    # the optimizer is new
    assert not training.optimizer.state


def test_an_older_checkpoint_may_be_named(make_recipe, trained: Recipe):
    older = find_checkpoints(Path(trained.out))[0]
    assert older.name == "step-00000003"
    found = ready(begun(make_recipe, older)).model.state_dict()
    newest = weights(trained)
    assert any(not torch.equal(found[name], newest[name]) for name in newest)


def test_a_run_records_it_and_resumes_without_it(make_recipe, trained: Recipe, tmp_path: Path):
    moved = tmp_path / "moved"
    shutil.copytree(trained.out, moved)
    whole, parts = begun(make_recipe, moved, "whole"), begun(make_recipe, moved, "parts", steps=4)
    run(whole)
    run(parts)
    assert load_recipe(Path(parts.out) / "recipe.yaml").model["init"] == str(moved)
    manifest = find_checkpoints(Path(parts.out))[-1] / "checkpoint.json"
    assert json.loads(manifest.read_text())["recipe"]["model"]["init"] == str(moved)
    shutil.rmtree(moved)
    resumed = replace(parts, train=replace(parts.train, steps=8))
    run(resumed)
    assert_same_run(whole, resumed)
    # nothing was saved: then it is needed
    with pytest.raises(ValueError, match=r"model\.init: no checkpoint at .*moved"):
        run(begun(make_recipe, moved, "new"))
    assert not (tmp_path / "new").exists()


def test_what_the_other_model_was_trained_on_counts(make_recipe, trained: Recipe, tmp_path: Path):
    (tmp_path / "other.txt").write_text("something else altogether, " * 400)
    for init in (trained.out, Path(trained.out) / "export"):
        recipe = begun(make_recipe, init, f"on-{Path(init).name}", steps=2)
        run(replace(recipe, data=replace(recipe.data, sources=(str(tmp_path / "other.txt"),))))
        earlier, joined = find_trained_text(Path(trained.out)), find_trained_text(Path(recipe.out))
        assert earlier is not None
        assert joined is not None
        assert set(earlier.documents) <= set(joined.documents)


def test_what_the_recipe_says_of_the_model_may_be_said_again(make_recipe, trained: Recipe):
    again = {**MODEL, "slopes": "balanced", "rope_theta": 10_000.0, "attention_backend": "reference"}
    training = ready(begun(make_recipe, trained.out, model=again))
    assert training.config["attention_backend"] == "reference"
    assert training.config["sliding_window"] == MODEL["sliding_window"]


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"hidden_size": 64}, "hidden_size (checkpoint 32, recipe 64)"),
        ({"sliding_window": 16}, "sliding_window (checkpoint 8, recipe 16)"),
        ({"num_hidden_layers": 3}, "num_hidden_layers (checkpoint 2, recipe 3)"),
        ({"num_attention_heads": 6, "hidden_size": 48}, "num_attention_heads (checkpoint 4, recipe 6)"),
        ({"score_function": "softmax"}, "score_function (checkpoint 'sigmoid', recipe 'softmax')"),
        ({"layers": ["mamba2"]}, "layers (checkpoint None, recipe ['mamba2'])"),
        ({"architecture": "llama"}, "holds a model of architecture swat, the recipe's is llama"),
        ({"hidden_sise": 32}, "unknown key 'hidden_sise'; did you mean 'hidden_size'?"),
        ({"init": 3}, "model.init must name a run's folder, a checkpoint or an exported model; got 3"),
    ],
)
def test_another_model_is_refused_before_anything_is_written(make_recipe, trained: Recipe, tmp_path, model, said: str):
    with pytest.raises(ValueError) as caught:
        run(begun(make_recipe, trained.out, model=model))
    assert said in str(caught.value)
    assert not (tmp_path / "begun").exists()


def test_another_tokenizer_is_refused(make_recipe, trained: Recipe, text: Path, tmp_path: Path):
    for size, said in (
        (300, "has a vocabulary of 259, the tokenizer"),
        (259, "learnt the tokens of another tokenizer"),
    ):
        folder = tmp_path / f"tokenizer-{size}"
        train_tokenizer([str(text)], size, folder)
        recipe = begun(make_recipe, trained.out)
        recipe = replace(recipe, data=replace(recipe.data, tokenizer=str(folder)))
        with pytest.raises(ValueError) as caught:
            run(recipe)
        assert said in str(caught.value)
        assert f"set data.tokenizer={trained.out}/export" in str(caught.value)
    recipe = begun(make_recipe, trained.out, steps=2)
    own = replace(recipe, data=replace(recipe.data, tokenizer=f"{trained.out}/export"))
    assert run(own).last_step == 2


def test_places_without_a_model_are_named(make_recipe, trained: Recipe, tmp_path: Path):
    with pytest.raises(ValueError, match=r"model\.init: no run or model at nowhere, and the hub gave no model"):
        run(begun(make_recipe, "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"model\.init: .*empty holds no model"):
        run(begun(make_recipe, tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"train\.resume .* both say which weights to begin with"):
        run(begun(make_recipe, trained.out, resume=trained.out))
    checkpoint = find_checkpoints(Path(trained.out))[-1]
    next(checkpoint.glob("*.distcp")).write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.init: checkpoint .* is damaged"):
        run(begun(make_recipe, checkpoint))
    # of a run, the newest whole one is taken
    assert ready(begun(make_recipe, trained.out)).start is None


def test_a_librarys_model_too(make_recipe):
    model = {
        "architecture": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }  # fmt: skip
    other = replace(make_recipe("llama", steps=2, export=True), model=model)
    run(other)
    expected = load_file(Path(other.out, "export", "model.safetensors"))
    for init in (other.out, Path(other.out, "export")):
        found = ready(begun(make_recipe, init, f"of-{Path(init).name}")).model.state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match=r"hidden_size \(checkpoint 32, recipe 48\)"):
        ready(begun(make_recipe, other.out, "wide", model={"hidden_size": 48}))
