"""Every recipe loads strictly, describes a model that can be built, and is what its name and comments say."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from swat_lm.model.architectures import (
    ARCHITECTURES,
    build_model,
    configure_model,
    count_model_parameters,
)
from swat_lm.model.cost import count_parameters
from swat_lm.model.modeling import SwatForCausalLM
from swat_lm.model.presets import preset_fields, preset_names
from swat_lm.model.recipe_fields import DEFAULTS, config_from_recipe, written_out
from swat_lm.named_recipes import recipe_names, recipe_path, recipe_summary
from swat_lm.recipe import Recipe, RecipeError, dump_recipe, load_recipe

ROOT = Path(__file__).parents[1]
OURS = ROOT / "swat_lm" / "recipes"
RECIPES = sorted([*OURS.glob("*.yaml"), *(ROOT / "swat_lm" / "papers" / "demo").glob("*.yaml")])
# vocabularies of the tokenizers that recipes name; tests have no network
VOCABULARIES = {
    "bytes": 259, "NousResearch/Llama-2-7b-hf": 32_000, "openai-community/gpt2": 50_257,
    "NousResearch/Meta-Llama-3-8B": 128_256, "google-bert/bert-base-cased": 28_996,
}  # fmt: skip


def test_every_recipe_is_found_by_its_name(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipe_names() == sorted(path.stem for path in OURS.glob("*.yaml"))
    for name in recipe_names():
        assert load_recipe(name) == load_recipe(OURS / f"{name}.yaml")
        assert load_recipe(name).name == name
        assert not recipe_summary(name).startswith(("#", "name", "inherits"))
        assert len(recipe_summary(name)) > 10
    with pytest.raises(ValueError, match=r"no recipe is called 'own-txt'; did you mean own-text\? recipes: deltanet"):
        recipe_path("own-txt")
    # `swat-lm info NAME` need not say which of the two it read
    for name in preset_names():
        recipe = load_recipe(name)
        assert configure_model(recipe.model, VOCABULARIES[recipe.data.tokenizer]) == config_from_recipe(
            {"preset": name}
        )


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_valid(path: Path, tmp_path: Path):
    recipe = load_recipe(path)
    if needs_fla(recipe) and importlib.util.find_spec("fla") is None:
        with pytest.raises(ValueError, match="pip install flash-linear-attention"):
            configure_model(recipe.model, VOCABULARIES[recipe.data.tokenizer])
        return
    config = configure_model(recipe.model, VOCABULARIES[recipe.data.tokenizer])
    with torch.device("meta"):
        model = build_model(config)
    assert count_model_parameters(config).total == sum(one.numel() for one in model.parameters())
    # state-space models know no length
    assert recipe.data.sequence_length == getattr(config, "max_position_embeddings", recipe.data.sequence_length)
    assert recipe.train.schedule == "cosine"

    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_recipe(recipe))
    assert load_recipe(resolved) == recipe

    with pytest.raises(RecipeError, match=r"unknown key train\.learning_rat"):
        load_recipe(path, ["train.learning_rat=1"])


def test_no_default_can_change_a_preset():
    pinned = 0
    for name in preset_names():
        fields = preset_fields(name)
        if "layers" not in fields:
            assert fields.keys() >= DEFAULTS.keys(), name
            pinned += 1
        assert written_out({"preset": name}).keys() >= DEFAULTS.keys()
    assert pinned == 12


@pytest.mark.parametrize("name", recipe_names())
def test_a_written_out_model_is_the_same_model(name: str):
    recipe = load_recipe(name)
    if recipe.model.get("architecture", "swat") == "swat":
        written, size = written_out(recipe.model), VOCABULARIES[recipe.data.tokenizer]
        assert config_from_recipe(written, size).to_dict() == config_from_recipe(recipe.model, size).to_dict()


def needs_fla(recipe: Recipe) -> bool:
    library = ARCHITECTURES.get(recipe.model.get("architecture", "swat"))
    return library is not None and bool(library.requires)


BASELINES = ("llama", "mistral", "mamba2", "gated-deltanet", "retnet", "gla", "deltanet", "mamba")


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_have_the_size_of_swat(name: str):
    swat, recipe = (load_recipe(f"{one}-340m") for one in ("swat", name))
    assert (recipe.data, recipe.train, recipe.seed) == (swat.data, swat.train, swat.seed)
    assert recipe.data.documents == "concatenate"
    if needs_fla(recipe):
        pytest.importorskip("fla")
    ours, theirs = (count_model_parameters(configure_model(one.model, 32_000)) for one in (swat, recipe))
    assert theirs.total == pytest.approx(ours.total, rel=0.02)
    assert theirs.embedding == ours.embedding


def test_paper_runs_are_all_there():
    named = {load_recipe(path).model.get("preset") for path in RECIPES} - {None}
    assert set(preset_names()) <= named


@pytest.mark.parametrize(("size", "billions"), [("340m", 15.0), ("760m", 30.0), ("248m", 19.7)])
def test_twins_differ_in_attention_only(size: str, billions: float):
    swat, *twins = (load_recipe(f"{kind}-{size}") for kind in ("swat", *TWINS))
    tokens = swat.train.steps * swat.train.batch_size * swat.data.sequence_length
    assert round(tokens / 1e9, 1) == billions
    for twin in twins:
        assert twin.data == swat.data
        assert twin.train == swat.train
        assert twin.out == f"runs/{twin.name}"
        ours, theirs = (config_from_recipe(one.model).to_dict() for one in (swat, twin))
        differing = {name for name in ours if ours[name] != theirs.get(name)}
        always, also = TWINS[twin.name.removesuffix(f"-{size}")]
        assert always <= differing <= always | also


@pytest.mark.parametrize(("size", "billions"), [("190m", 27.0), ("450m", 100.0), ("1.3b", 100.0)])
def test_taipan_reads_as_many_tokens_as_the_paper_s(size: str, billions: float):
    recipe = load_recipe(f"taipan-{size}")
    assert round(recipe.train.steps * recipe.train.batch_size * recipe.data.sequence_length / 1e9, 1) == billions
    assert recipe.train.final_learning_rate_ratio * recipe.train.learning_rate == pytest.approx(1e-5)
    parameters = count_parameters(config_from_recipe({"preset": f"taipan-{size}"})).total
    assert parameters == pytest.approx({"190m": 190e6, "450m": 450e6, "1.3b": 1.3e9}[size], rel=0.02)


TWINS = {
    "transformer": ({"score_function", "slopes"}, {"sliding_window", "layer_types"}),
    "softmax-window": ({"score_function", "slopes"}, set()),
    "sigmoid-window": ({"slopes", "score_bias", "qk_norm"}, {"slope_schedule", "slope_span"}),
}


def test_signs_of_table_one():
    expected = {"swat-340m": (True, True), "swat-340m-negative": (True, False), "swat-340m-positive": (False, True)}
    for name, (any_negative, any_positive) in expected.items():
        config = config_from_recipe(load_recipe(name).model)
        with torch.device("meta"):
            model = SwatForCausalLM(config)
        slopes = model.model.layers[0].self_attn._slopes
        assert (bool((slopes < 0).any()), bool((slopes > 0).any())) == (any_negative, any_positive)


def test_demo_twins_have_equal_size():
    folder = ROOT / "swat_lm" / "papers" / "demo"
    swat, twin = (load_recipe(folder / f"{name}.yaml") for name in ("swat", "twin"))
    assert (swat.data, swat.train, swat.seed) == (twin.data, twin.train, twin.seed)
    ours, theirs = (config_from_recipe(one.model, 259) for one in (swat, twin))
    assert count_parameters(ours).total == count_parameters(theirs).total
    assert ours.window(0) == 64
    assert theirs.window(0) is None
    assert theirs.attention_settings(0).slopes == "none"


def test_recipes_load_without_torch():
    program = (
        "import sys, types; package = types.ModuleType('swat_lm'); "
        f"package.__path__ = [{str(ROOT / 'swat_lm')!r}]; sys.modules['swat_lm'] = package; "
        f"from swat_lm.recipe import load_recipe; load_recipe({str(RECIPES[0])!r}); print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
