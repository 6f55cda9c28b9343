import json
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

from swat_lm.model.recipe_fields import config_from_recipe
from swat_lm.recipe import DataRecipe, Recipe, TrainRecipe, describe
from swat_lm.train.checkpoint import Checkpoint, CheckpointError
from swat_lm.train.initial import plain_values
from swat_lm.train.run_folder import (
    CHANGEABLE,
    check_continuation,
    check_model,
    choose_start,
    describe_new_schedule,
    hold_folder,
)

RECIPE = Recipe(name="r", out="somewhere", model={"hidden_size": 8}, data=DataRecipe(sources=("a", "b")))


def plain(recipe: Recipe) -> dict:
    return json.loads(json.dumps(asdict(recipe)))


CHECKPOINT = Checkpoint(
    Path("out/checkpoints/step-00000005"), 5, 10, 0.0, plain(RECIPE), {"hidden_size": 8, "dtype": "float32"}, "key"
)


def fake_checkpoint(out: Path, step: int, resume: str = "auto") -> Path:
    """A whole checkpoint without tensors."""
    folder = out / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    recipe = replace(RECIPE, train=TrainRecipe(resume=resume))
    manifest = {"format": 1, "step": step, "tokens": 0, "seconds": 0.0, "recipe": plain(recipe), "model": {}}
    (folder / "checkpoint.json").write_text(json.dumps({**manifest, "data": "", "files": {}}))
    return folder


def test_changeable_keys_exist():
    assert {one.key for one in describe(Recipe)} >= CHANGEABLE
    assert not any(key.startswith("model") for key in CHANGEABLE)


def test_same_recipe_continues():
    check_continuation(CHECKPOINT, plain(RECIPE), "key")


def test_length_and_reporting_may_change():
    train = TrainRecipe(steps=9000, keep=9, log_every=3, micro_batch_size=4, loggers=("wandb",), evaluate_every=7)
    data = replace(RECIPE.data, cache="elsewhere", workers=3)
    check_continuation(CHECKPOINT, plain(replace(RECIPE, name="x", out="y", train=train, data=data)), "key")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (replace(RECIPE, seed=3), r"seed \(before 0, now 3\)"),
        (replace(RECIPE, data=replace(RECIPE.data, sequence_length=64)), "data.sequence_length"),
        (replace(RECIPE, data=DataRecipe(sources=("a",))), "data.sources"),
        (replace(RECIPE, train=TrainRecipe(batch_size=64, learning_rate=0.5)), "batch_size.*learning_rate"),
    ],
)
def test_what_decides_the_run_may_not_change(changed, named):
    with pytest.raises(ValueError, match=named):
        check_continuation(CHECKPOINT, plain(changed), "key")


def test_changed_text_is_noticed():
    with pytest.raises(ValueError, match="other content"):
        check_continuation(CHECKPOINT, plain(RECIPE), "other key")


def test_other_architecture_is_named_field_by_field():
    check_model(CHECKPOINT, {"hidden_size": 8, "dtype": "bfloat16"})
    with pytest.raises(
        ValueError, match=r"hidden_size \(checkpoint 8, recipe 16\), layers \(checkpoint None, recipe 2\)"
    ):
        check_model(CHECKPOINT, {"hidden_size": 16, "layers": 2})


def test_settings_that_came_later_are_as_before_there_was_a_word_for_them(tmp_path):
    now = plain_values(config_from_recipe({"slopes": "negative"}, 259))
    before = {name: value for name, value in now.items() if name not in ("slope_span", "output_gate", "layer_scale")}
    (tmp_path / "recipe.yaml").write_text("")
    checkpoint = replace(CHECKPOINT, folder=tmp_path / "checkpoints" / "step-00000004", model=before)
    check_model(checkpoint, now)
    with pytest.raises(ValueError, match=r"output_gate \(checkpoint False, recipe True\).*own recipe is .*\.yaml\)"):
        check_model(checkpoint, {**now, "output_gate": True})


def test_the_former_span_is_another_architecture_only_where_a_schedule_reads_it():
    now, scheduled = (
        plain_values(config_from_recipe({"slopes": "negative", **more}, 259))
        for more in ({}, {"slope_schedule": "window"})
    )
    check_model(replace(CHECKPOINT, model={**now, "slope_span": 16.0}), now)
    layers = {**now, "layers": [{"kind": "attention", "slope_schedule": "window"}]}
    for model in (scheduled, layers):
        with pytest.raises(ValueError, match=r"slope_span \(checkpoint 16.0, recipe \[64.0, 4.0\]\)"):
            check_model(replace(CHECKPOINT, model={**model, "slope_span": 16.0}), model)


def test_the_training_length_is_architecture_only_where_rotary_angles_are_scaled():
    for rope, refused in (
        ({"rope_type": "default"}, False),
        ({"rope_type": "dynamic", "factor": 2.0}, True),
        ({"sliding_attention": {"rope_type": "default"}, "full_attention": {"rope_type": "dynamic"}}, True),
    ):
        before = {"hidden_size": 8, "rope_parameters": rope, "max_position_embeddings": 2048}
        checkpoint, now = replace(CHECKPOINT, model=before), {**before, "max_position_embeddings": 64}
        if refused:
            with pytest.raises(ValueError, match=r"max_position_embeddings \(checkpoint 2048, recipe 64\)"):
                check_model(checkpoint, now)
        else:
            check_model(checkpoint, now)


def test_auto_takes_the_newest_or_nothing(tmp_path):
    assert choose_start(tmp_path, "auto") == (None, [])
    fake_checkpoint(tmp_path, 5)
    fake_checkpoint(tmp_path, 10)
    found, _ = choose_start(tmp_path, "auto")
    assert found is not None
    assert found.step == 10


def test_a_renamed_checkpoint_alone_is_no_reason_to_start_anew(tmp_path):
    best = fake_checkpoint(tmp_path, 5).rename(tmp_path / "checkpoints" / "step-best")
    with pytest.raises(ValueError, match=rf"no checkpoint but step-best.*train.resume={best}"):
        choose_start(tmp_path, "auto")
    found, _ = choose_start(tmp_path, str(best))
    assert found is not None
    assert found.step == 5


def test_never_refuses_to_overwrite(tmp_path):
    assert choose_start(tmp_path, "never") == (None, [])
    fake_checkpoint(tmp_path, 5)
    with pytest.raises(ValueError, match=r"already holds step-00000005.*train.resume=auto"):
        choose_start(tmp_path, "never")


def test_path_starts_a_new_run_from_another(tmp_path):
    early = fake_checkpoint(tmp_path / "old", 5)
    fake_checkpoint(tmp_path / "old", 10)
    new = tmp_path / "new"
    for path, step in ((early, 5), (tmp_path / "old", 10)):
        found, _ = choose_start(new, str(path))
        assert found is not None
        assert found.step == step


def test_path_continues_the_run_that_began_there(tmp_path):
    origin = fake_checkpoint(tmp_path / "old", 5)
    fake_checkpoint(tmp_path / "new", 7, resume=str(origin))
    found, _ = choose_start(tmp_path / "new", str(origin))
    assert found is not None
    assert found.step == 7
    with pytest.raises(ValueError, match="already holds step-00000007"):
        choose_start(tmp_path / "new", str(tmp_path / "old"))


@pytest.mark.parametrize("what", ["absent", "empty"])
def test_path_without_checkpoint_is_named(tmp_path, what):
    path = tmp_path / what
    if what == "empty":
        path.mkdir()
    with pytest.raises(CheckpointError, match=str(path)):
        choose_start(tmp_path / "new", str(path))


def test_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write to the output folder .*file/run"):
        hold_folder(tmp_path / "file" / "run")
    # what the file system refuses after some folders are made
    with pytest.raises(OSError, match=r"cannot write to the output folder"):
        hold_folder(tmp_path / "new" / ("x" * 300))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_in_which_nothing_was_written_goes_again(tmp_path):
    hold_folder(tmp_path / "new" / "run").release()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "own").mkdir()
    hold_folder(tmp_path / "own").release()
    assert list(tmp_path.rglob("*")) == [tmp_path / "own"]
    held = hold_folder(tmp_path / "new" / "run")
    (tmp_path / "new" / "run" / "recipe.yaml").write_text("")
    held.release()
    assert (tmp_path / "new" / "run" / "recipe.yaml").exists()
    # another run in the same parent keeps it
    first, second = hold_folder(tmp_path / "runs" / "a"), hold_folder(tmp_path / "runs" / "b")
    first.release()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["b"]
    second.release()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == []


def test_one_run_at_a_time_writes_to_a_folder(tmp_path):
    first = hold_folder(tmp_path)
    (tmp_path / ".tmp-of-the-first").mkdir()
    with pytest.raises(OSError, match="another run is writing to"):
        hold_folder(tmp_path)
    assert (tmp_path / ".tmp-of-the-first").exists()
    first.release()
    hold_folder(tmp_path).release()


def test_every_train_key_was_considered():
    # a new key must be put on one side or the other: those that decide the run are listed here
    decisive = {"batch_size", "learning_rate", "warmup_steps", "schedule", "weight_decay", "betas", "eps", "grad_clip"}
    decisive |= {"objective", "objective_settings"}
    changeable = {key.removeprefix("train.") for key in CHANGEABLE if key.startswith("train.")}
    # with the execution that they are of
    changeable |= {"execution_settings"}
    assert {one.name for one in fields(TrainRecipe)} == decisive | changeable


@pytest.mark.parametrize(
    ("schedule", "steps", "decay", "says"),
    [("cosine", 80, 0, True), ("cosine", 60, 0, False), ("constant", 80, 0, False), ("wsd", 80, 10, False)],
)
def test_another_schedule_is_spoken_of(schedule: str, steps: int, decay: int, says: bool):
    before = TrainRecipe(steps=60, warmup_steps=2, schedule=schedule, decay_steps=decay)
    checkpoint = replace(CHECKPOINT, recipe=plain(replace(RECIPE, train=before)), step=50)
    said = describe_new_schedule(checkpoint, replace(RECIPE, train=replace(before, steps=steps)))
    assert (said is not None) == says
    # in its decay the rate has begun to fall
    if schedule == "wsd":
        later = replace(checkpoint, step=55)
        assert describe_new_schedule(later, replace(RECIPE, train=replace(before, steps=steps)))
