"""`train.execution`: the same run however layers are run, changed on the way, and what it refuses."""

from dataclasses import replace
from pathlib import Path

import pytest

from swat_lm.recipe import RecipeError, TrainRecipe, dump_recipe, load_recipe
from swat_lm.train import run
from swat_lm.train.execution import execution_of
from swat_lm.train.objectives import OBJECTIVES, NextToken
from tests.train.runs import assert_close, assert_same_run, metrics

CHUNKS = {"execution": "chunks", "execution_settings": {"chunk_size": 24, "carries": "disk"}}


def test_a_run_goes_on_under_another_execution_and_bit_for_bit_under_its_own(make_recipe, tmp_path):
    plain = make_recipe("plain", schedule="constant")
    run(plain)
    begun = make_recipe("begun", schedule="constant", steps=4)
    run(begun)
    run(replace(begun, train=replace(begun.train, steps=8, **CHUNKS)))
    assert_close(metrics(begun.out), metrics(plain.out))
    whole, parts = (make_recipe(name, schedule="constant", **CHUNKS) for name in ("whole", "parts"))
    run(replace(parts, train=replace(parts.train, steps=4)))
    run(parts)
    run(whole)
    assert_same_run(parts, whole)
    # in smaller chunks too, and what lay on disk is gone
    run(replace(parts, train=replace(parts.train, steps=9, execution_settings={"chunk_size": 8})))
    assert not [path for path in Path(parts.out).rglob("*") if "carries" in path.name]


def test_the_old_spelling_is_checkpoint(tmp_path, make_recipe):
    recipe = make_recipe("old", activation_checkpointing=True)
    (tmp_path / "old.yaml").write_text(dump_recipe(recipe))
    assert execution_of(load_recipe(tmp_path / "old.yaml").train) == "checkpoint"
    with pytest.raises(RecipeError, match=r"activation_checkpointing means train.execution=checkpoint; got chunks"):
        load_recipe(tmp_path / "old.yaml", ["train.execution=chunks"])
    assert execution_of(TrainRecipe(execution="checkpoint")) == "checkpoint"


def test_what_cannot_run_so_is_refused_before_anything_is_written(make_recipe, monkeypatch):
    recipe = make_recipe("run", **CHUNKS)

    def refused(match: str, **changes) -> None:
        with pytest.raises(ValueError, match=match):
            run(replace(recipe, **changes))
        assert not Path(recipe.out).exists()

    full = {**recipe.model, "layers": ["attention", {"kind": "attention", "sliding_window": None}]}
    refused(r"train.execution: chunks cannot run this model: layer 1 \(attention\) keeps the key of all", model=full)
    small = replace(recipe.train, execution_settings={"chunk_size": 7})
    refused(r"chunk_size: 7 is below the window of layer 0 \(attention\), 8", train=small)
    unknown = replace(recipe.train, execution_settings={"chunk": 7})
    refused(r"unknown key train.execution_settings.chunk; the nearest valid key is .*chunk_size", train=unknown)
    none = replace(recipe.train, execution="plain")
    refused("train.execution_settings: plain takes no settings; chunk_size belongs to chunks", train=none)
    other = replace(recipe.train, execution_settings={"block_size": 7})
    refused("chunks takes chunk_size, carries, folder; block_size belongs to blockwise", train=other)
    library = {"architecture": "llama", **{k: v for k, v in recipe.model.items() if k != "sliding_window"}}
    refused("chunks runs the layers of swat-lm, and a model of a library has its own", model=library)

    class Prefix(NextToken):
        name = "prefix"

        @classmethod
        def refuses_execution(cls, execution: str) -> str | None:
            return "reads a prefix in both directions" if execution == "chunks" else None

    monkeypatch.setitem(OBJECTIVES, "prefix", Prefix)
    both = replace(recipe.train, objective="prefix")
    refused("chunks does not serve prefix, which reads a prefix in both directions", train=both)


def test_a_full_disk_ends_a_run_with_its_checkpoints_whole(make_recipe, monkeypatch):
    recipe = make_recipe("run", steps=4, save_every=2, **CHUNKS)
    free = iter([10**9] * 3 + [100])
    monkeypatch.setattr(
        "swat_lm.model.execution.carries.shutil.disk_usage", lambda folder: type("Usage", (), {"free": next(free)})
    )
    with pytest.raises(OSError, match=rf"carries need \d+ bytes in {recipe.out}, where 100 are free"):
        run(recipe)
    assert [path.name for path in Path(recipe.out, "checkpoints").iterdir()] == ["step-00000002"]
    monkeypatch.undo()
    assert run(recipe).last_step == 4
