import dataclasses
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from swat_lm.recipe import DataRecipe, Recipe, RecipeError, TrainRecipe, describe, dump_recipe, load_recipe

MINIMAL = """\
model:
  hidden_size: 64
data:
  sources: [book.txt]
"""


@pytest.fixture
def write(tmp_path: Path):
    def write_recipe(text: str, name: str = "small.yaml") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write_recipe


def test_minimal_recipe_takes_name_and_out_from_the_file(write):
    recipe = load_recipe(write(MINIMAL))
    assert (recipe.name, recipe.out, recipe.seed) == ("small", "runs/small", 0)
    assert recipe.data == DataRecipe(sources=("book.txt",))
    assert recipe.train == TrainRecipe()
    assert recipe.model == {"hidden_size": 64}


def test_overrides_are_yaml_and_reach_into_the_model(write):
    overrides = [
        "train.steps=1000000",
        "train.learning_rate=1e-3",
        "data.sources=[a, b.jsonl.gz]",
        "model.sliding_window=null",
        "model.rope.theta=1e4",
        "train.grad_clip=null",
        "train.betas=[0.8, 1e-1]",
        "train.loggers=tensorboard",
        "name=other",
    ]
    recipe = load_recipe(write(MINIMAL), overrides)
    assert recipe.train.steps == 1_000_000
    assert recipe.train.learning_rate == 1e-3
    assert recipe.data.sources == ("a", "b.jsonl.gz")
    assert recipe.model == {"hidden_size": 64, "sliding_window": None, "rope": {"theta": 1e4}}
    assert recipe.train.grad_clip is None
    assert recipe.train.betas == (0.8, 0.1)
    assert recipe.train.loggers == ("tensorboard",)
    assert recipe.out == "runs/other"


# what YAML reads otherwise than it stands: comments, numbers, dates, yes and no, quotes, blanks, its own signs
AS_TYPED = (
    "runs/try #2", "#2", "notes #2/", "007", "1e3", "1_000", "0x10", "12:30", "2024-01-01", "x~", "yes", "no", "on",
    "off", "true", "a: b", "a:", "*x", "&x", "!x", "@x", "%x", "`x", "- x", "? x", "> x", "| x", "{x}", "[x", "x]",
    "[x] y", "'x'", '"x"', "'x", " x", "x ", "x\ty", "x\ny", "a, b", "a\\nb", "x=y", "---", "...", "<<", ".nan", "=",
    "auto ", "\u4f60",
)  # fmt: skip


@pytest.mark.parametrize("text", AS_TYPED)
def test_a_name_or_path_arrives_as_typed(write, text: str):
    keys = ("name", "out", "data.sources", "data.tokenizer", "data.text_field", "data.cache", "train.resume")
    recipe = load_recipe(write(MINIMAL), [f"{key}={text}" for key in keys])
    data, train = recipe.data, recipe.train
    found = (recipe.name, recipe.out, *data.sources, data.tokenizer, data.text_field, data.cache, train.resume)
    assert found == (text,) * len(keys)
    # and is written so that it is read as the same
    again = load_recipe(write(dump_recipe(recipe), "again.yaml"))
    assert again == recipe
    if not any(sign in text for sign in "#[]{},*&!@%`'\":-?>|\t\n \udcff=.<"):
        assert load_recipe(write(MINIMAL), [f"data.sources=[{text}, b]"]).data.sources == (text, "b")


def test_what_texts_may_be_instead(write):
    with pytest.raises(RecipeError, match="what follows # would be a comment"):
        load_recipe(write(MINIMAL), ["data.sources=[a, #1\n b]"])
    recipe = load_recipe(write(MINIMAL), ["data.cache=null", "data.sources=['a, b', \"c #1\", d#2]", "name=null"])
    assert (recipe.data.cache, recipe.data.sources, recipe.name) == (None, ("a, b", "c #1", "d#2"), "null")
    recipe = load_recipe(write(MINIMAL), ["model.slopes=8:4", "model.rope={base: 1e4}", "model.note='a #1'"])
    assert recipe.model == {"hidden_size": 64, "slopes": "8:4", "rope": {"base": 1e4}, "note": "a #1"}


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.lerning_rate=1", ["train.lerning_rate", "nearest valid key is train.learning_rate"]),
        ("learning_rate=1", ["nearest valid key is train.learning_rate"]),
        ("dta.sources=x", ["unknown key dta", "nearest valid key is data"]),
        ("train.zzz=1", ["unknown key train.zzz", "train.steps"]),
        ("train.steps=abc", ["train.steps", "a whole number", "'abc' (text)"]),
        ("train.steps=1.5", ["train.steps", "a whole number", "1.5 (number)"]),
        ("train.steps=true", ["train.steps", "a whole number", "true/false"]),
        ("train.steps=0", ["train.steps must be at least 1; got 0"]),
        ("train.steps=", ["train.steps must be a whole number; got null"]),
        ("train.steps=20", ["train.warmup_steps (100)", "train.steps (20)", "train.warmup_steps=2"]),
        ("train.schedule=linear", ["one of cosine, wsd, constant", "'linear'"]),
        ("train.schedule=wsd", ["train.decay_steps (0)", "wsd", "200"]),
        ("train.decay_steps=5", ["train.decay_steps (5)", "cosine"]),
        ("train.micro_batch_size=5", ["train.batch_size (32)", "multiple", "(5)"]),
        ("train.replicas=2", ["train.replicas (2)", "train.sharding=hybrid"]),
        ("train.learning_rate=.nan", ["train.learning_rate", "finite"]),
        ("train.learning_rate=0", ["train.learning_rate must be above 0"]),
        ("train.betas=[0.9, 1.0]", ["train.betas", "at least 0 and below 1", "1.0"]),
        ("train.betas=[0.9]", ["train.betas", "2 entries"]),
        ("train.compile=1", ["train.compile must be true or false"]),
        ("train.loggers=[wandb, tensorbord]", ["train.loggers[1]", "tensorboard, wandb, trackio", "'tensorbord'"]),
        ("data.held_out=1", ["data.held_out must be at least 0 and below 1; got 1"]),
        (f"seed={2**63}", ["seed must be at least 0 and below 9223372036854775808"]),
        (f"data.split_seed={10**25}", ["data.split_seed must be at least 0 and below 9223372036854775808"]),
        ("data.sequence_length=1", ["data.sequence_length must be at least 2"]),
        ("data.sources=[]", ["data.sources is empty"]),
        ("data.sources=[a, [3]]", ["data.sources[1] must be text; got ['3']"]),
        ("data.sources=[a #1, b]", ["not valid YAML"]),
        ("data.sources=", ["data.sources holds an empty name"]),
        ("data.tokenizer=", ["a text is expected, and none came"]),
        ("data.cache= ", ["a text is expected, and none came"]),
        ("train.steps=100 # or more", ["what follows # would be a comment"]),
        ("train.schedule=cosine #2", ["what follows # would be a comment"]),
        ("train={steps: 200} # longer", ["what follows # would be a comment"]),
        ("model.score_function=softmax #2", ["what follows # would be a comment"]),
        ("model.slopes=#2", ["what follows # would be a comment"]),
        # in YAML 1.1 these are 64, 3,600 and a day
        ("train.steps=0100", ["train.steps must be a whole number; got '0100' (text)"]),
        ("train.steps=1:00:00", ["train.steps must be a whole number; got '1:00:00' (text)"]),
        ("train.steps=2024-01-01", ["train.steps must be a whole number; got '2024-01-01' (text)"]),
        ("model=3", ["model must be a mapping"]),
        ("train=3", ["train must be a mapping"]),
        ("train.steps.x=3", ["train.steps.x"]),
        ("steps", ["write key=value"]),
        ("=3", ["write key=value"]),
        ("train.steps=[1", ["not valid YAML"]),
    ],
)
def test_bad_override_names_itself_and_the_key(write, override, parts):
    path = write(MINIMAL + "train:\n  batch_size: 32\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, [override])
    for part in parts:
        assert part in str(caught.value)
    # the user must find what is at fault: the override itself, or the file for rules over several keys
    assert override in str(caught.value) or str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (MINIMAL + "held_out: 0.1\n", [":5: ", "unknown key held_out", "data.held_out"]),
        (MINIMAL + "train:\n  seed: 3\n", [":6: ", "train.seed", "valid key is seed"]),
        (MINIMAL + "train:\n  on: 3\n", ["train: keys must be words; got True"]),
        (MINIMAL + "train:\n  stepz: 3\n", [":6: ", "train.stepz", "train.steps"]),
        (MINIMAL + "model:\n  x: 1\n", [":5: ", "model is written twice", ":1"]),
        (MINIMAL + "train:\n  warmup_steps: 2000\n", [":5: ", "train.warmup_steps (2000)"]),
        (MINIMAL + "train: [\n", ["not valid YAML"]),
        (MINIMAL + "\tseed: 3\n", [":5: ", "not valid YAML"]),
        ("", ["must hold a mapping", "null"]),
        ("- a\n", ["must hold a mapping", "list"]),
        ("model: {}\n", ["missing key data"]),
        ("model: {}\ndata: {}\n", [":2: ", "missing key data.sources"]),
        ("model: {}\ndata:\n", [":2: ", "data must be a mapping", "null"]),
        ("model: {1: 2}\ndata: {sources: a}\n", ["model: keys must be words"]),
        (MINIMAL + "inherits: small.yaml\n", ["inherits from itself"]),
        (MINIMAL + "inherits: 3\n", [":5: ", "inherits must be a file name"]),
    ],
)
def test_bad_file_names_the_line(write, text, parts):
    path = write(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_missing_and_unreadable_files(write, tmp_path):
    write(MINIMAL)
    with pytest.raises(RecipeError, match=r"no recipe at .*smal\.yaml; the nearest is .*small\.yaml"):
        load_recipe(tmp_path / "smal.yaml")
    with pytest.raises(RecipeError, match="is a folder"):
        load_recipe(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"a\xff")
    with pytest.raises(RecipeError, match=r"not UTF-8 text \(byte 1\)"):
        load_recipe(tmp_path / "binary.yaml")


def test_inherits_merges_mappings_and_replaces_lists(write):
    write(MINIMAL + "train: {steps: 500, learning_rate: 1e-2}\n", "base.yaml")
    child = write(
        "inherits: base.yaml\nmodel: {num_heads: 2}\ndata: {sources: [c]}\ntrain: {steps: 700}\n", "twin.yaml"
    )
    recipe = load_recipe(child)
    assert recipe.name == "twin"
    assert recipe.model == {"hidden_size": 64, "num_heads": 2}
    assert recipe.data.sources == ("c",)
    assert (recipe.train.steps, recipe.train.learning_rate) == (700, 1e-2)
    write(MINIMAL + "train: {stepz: 1}\n", "base.yaml")
    with pytest.raises(RecipeError, match=r"base\.yaml:5: unknown key train\.stepz"):
        load_recipe(child)


def test_recipes_of_ours_go_by_name(write, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours = load_recipe("own-text")
    assert (ours.name, ours.model["hidden_size"]) == ("own-text", 192)
    # heirs of one recipe are runs of their own; a file of the user's with the same name is no circle
    for name in ("mine.yaml", "own-text.yaml"):
        heir = load_recipe(write("inherits: own-text\nmodel: {hidden_size: 96}\n", name))
        assert (heir.name, heir.out) == (name.removesuffix(".yaml"), f"runs/{name.removesuffix('.yaml')}")
        assert (heir.model["hidden_size"], heir.data) == (96, ours.data)
    # a folder is no recipe, a file is
    (tmp_path / "own-text").mkdir()
    assert load_recipe("own-text").model["hidden_size"] == 192
    write(MINIMAL, "swat-340m")
    assert load_recipe("swat-340m").model["hidden_size"] == 64
    assert load_recipe(write("inherits: swat-340m\n", "heir.yaml")).model["hidden_size"] == 64


@pytest.mark.parametrize(
    ("named", "hint"),
    [
        ("own-txt", "no recipe at own-txt; did you mean own-text?"),
        ("Own-Text", "did you mean own-text?"),
        ("swat-430m", "did you mean swat-340m, swat-760m or swat-248m?"),
        ("mine", "did you mean mine.yaml?"),
        ("other", "did you mean recipes/other.yaml?"),
        ("zzz", "; `swat-lm recipes` lists those that come with swat-lm"),
        ("recipes/own-text.yaml", "; own-text comes with swat-lm: give its name alone, without folder and suffix"),
        ("own-text.yaml", "; own-text comes with swat-lm: give its name alone, without folder and suffix"),
        ("recipes/swat-340.yaml", "which go by their names alone, did you mean swat-340m,"),
        ("nmie.yaml", "; the nearest is mine.yaml"),
        ("heir.yaml", "; did you mean own-text?"),
    ],
)
def test_a_mistyped_recipe_names_the_nearest(write, tmp_path: Path, monkeypatch, named: str, hint: str):
    monkeypatch.chdir(tmp_path)
    write(MINIMAL, "mine.yaml")
    write("inherits: own-txet\n", "heir.yaml")
    (tmp_path / "recipes").mkdir()
    write(MINIMAL, "recipes/other.yaml")
    with pytest.raises(RecipeError) as raised:
        load_recipe(named)
    assert hint in str(raised.value)


def test_python_made_recipes_are_checked_too():
    with pytest.raises(RecipeError, match="steps must be at least 1"):
        TrainRecipe(steps=0)
    with pytest.raises(RecipeError, match="sources"):
        DataRecipe(sources=())
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainRecipe().steps = 3  # type: ignore[misc]


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(sources=["0E0"], learning_rate=1.0, model={"0E0": "1e5"}, loggers=[], seed=0)
@given(
    sources=st.lists(st.text(min_size=1).filter(lambda s: bool(s.strip())), min_size=1, max_size=3),
    learning_rate=st.floats(min_value=1e-30, max_value=1e30),
    model=st.dictionaries(
        st.text(min_size=1), st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
    ),
    loggers=st.lists(st.sampled_from(["tensorboard", "wandb", "trackio"])),
    seed=st.integers(min_value=0, max_value=2**63 - 1),
)
def test_dumped_recipe_loads_back_equal(tmp_path, sources, learning_rate, model, loggers, seed):
    recipe = Recipe(
        name="a: b",
        out="x #y",
        seed=seed,
        model=model,
        data=DataRecipe(sources=tuple(sources)),
        train=TrainRecipe(learning_rate=learning_rate, loggers=tuple(loggers)),
    )
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8", newline="")
    assert load_recipe(path) == recipe


def test_every_key_is_described():
    described = describe(Recipe)
    assert {"name", "model", "data.sources", "train.learning_rate"} <= {one.key for one in described}
    assert all(one.help.endswith(".") and one.type and one.default for one in described)
    keys = {one.key: one for one in described}
    assert keys["train.schedule"].type == "one of cosine, wsd, constant"
    assert keys["train.micro_batch_size"].default == "null"
    assert keys["train.compile"].default == "false"


def test_an_override_that_breaks_a_rule_with_other_keys_is_named(write):
    text = MINIMAL + "train:\n  warmup_steps: 100\n"
    with pytest.raises(RecipeError, match=r"^override 'train\.steps=60': train\.warmup_steps \(100\)"):
        load_recipe(write(text), ["train.steps=60"])
    # one that has nothing to do with it is not
    with pytest.raises(RecipeError, match=r"\.yaml:\d+: train\.warmup_steps \(2000\)"):
        load_recipe(write(text.replace("100", "2000")), ["train.learning_rate=0.1"])
