"""FSDP2 over two processes on the CPU: one launch of torchrun does several runs, judged here against one process."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from swat_lm.layers import LAYERS
from swat_lm.recipe import Recipe, dump_recipe
from swat_lm.train import run
from swat_lm.train.metrics import read_metrics
from swat_lm.train.objectives import OBJECTIVES
from tests.train.runs import assert_close, metrics, ready, weights
from tests.train.speaking import Counting, SpeakingLayer
from tests.train.test_baselines import baseline

PROGRAM = """
import os, sys
from swat_lm.recipe import load_recipe
from swat_lm.train import run
from tests.train import speaking

speaking.register()
for path in sys.argv[1:]:
    try:
        result = run(load_recipe(path))
        said = f"done {result.last_step}"
    except (ValueError, OSError) as error:
        said = f"{type(error).__name__}: {error}"
    with open(f"{path}.rank{os.environ['RANK']}", "w") as file:
        file.write(said)
"""


def launch(folder: Path, recipes: list[Recipe]) -> dict[str, list[str]]:
    """Run the recipes one after another on two processes; returns what each process said of each, by name."""
    program = folder / "program.py"
    program.write_text(PROGRAM)
    paths = [folder / f"{recipe.name}.yaml" for recipe in recipes]
    for path, recipe in zip(paths, recipes, strict=True):
        path.write_text(dump_recipe(recipe))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    ran = subprocess.run(
        [*command, *map(str, paths)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return {path.stem: [Path(f"{path}.rank{rank}").read_text() for rank in (0, 1)] for path in paths}


BLOCKS = {"execution": "blockwise", "execution_settings": {"block_size": 24}}
CHUNKS = {"execution": "chunks", "execution_settings": {"chunk_size": 24, "carries": "disk"}}


def speaking_runs(make_recipe, tmp_path: Path) -> tuple[Recipe, list[Recipe]]:
    """Pairs of prompt and answer through layers that say all a layer can: one run whole, others to be split."""
    rows = [{"prompt": f"{n} and {n % 7}?", "answer": f"{n * (n % 7)}"} for n in range(150)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def speaks(name: str, **train) -> Recipe:
        recipe = make_recipe(name, objective="masked_next_token", **train)
        data = replace(recipe.data, sources=(str(path),), format="prompt_answer")
        return replace(recipe, data=data, model={**recipe.model, "layers": ["speaking", "attention"]})

    split = [
        speaks("speaking-sharded", export=True),
        speaks("speaking-accumulated", micro_batch_size=1, activation_checkpointing=True),
        speaks("speaking-replicated", sharding="none", micro_batch_size=1, **CHUNKS),
    ]
    return speaks("speaking"), split


def quantised(make_recipe, name: str, **train) -> Recipe:
    """LongVQ, whose codebook absorbs what all rows of a step have said."""
    recipe = make_recipe(name, **train)
    layer = {"kind": "longvq", "codes": 12, "block": 8, "key_size": 8, "state_size": 4}
    return replace(recipe, model={**recipe.model, "layers": [layer]})


def beside(out: str | Path) -> list[float]:
    """What layers and objective showed beside the loss, at every step."""
    logged = read_metrics(Path(out, "metrics.jsonl"))
    return [one[name] for one in logged for name in ("auxiliary_balance", "layers_score", "marked_share")]


def test_two_processes_compute_what_one_does(make_recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(LAYERS, "speaking", SpeakingLayer)
    monkeypatch.setitem(OBJECTIVES, "counting", Counting)
    speaking, speaking_split = speaking_runs(make_recipe, tmp_path)
    run(speaking)
    single = make_recipe("single")
    run(single)

    def other(name: str, **train) -> Recipe:
        return make_recipe(name, **train)

    # begun by one process, to be finished by two
    begun = other("begun", steps=4)
    run(replace(begun, train=replace(begun.train, steps=4, schedule="constant")))
    # layers block by block over weights that are sharded
    begun = replace(begun, train=replace(begun.train, steps=8, schedule="constant", micro_batch_size=1, **BLOCKS))
    straight = other("straight", schedule="constant")
    run(straight)
    llama = baseline(make_recipe, "llama-single", "llama")
    run(llama)

    codebook = quantised(make_recipe, "quantised")
    run(codebook)

    recipes = [
        other("sharded", export=True),
        other("accumulated", micro_batch_size=1, activation_checkpointing=True),
        other("replicated", sharding="none", micro_batch_size=1),
        other("hybrid", sharding="hybrid", replicas=2, **BLOCKS),
        begun,
        other("to-continue", steps=4, schedule="constant"),
        other("odd", batch_size=5),
        replace(single, seed=7),
        baseline(make_recipe, "llama", "llama", export=True),
        *speaking_split,
        quantised(make_recipe, "quantised-split", micro_batch_size=1, activation_checkpointing=True),
        replace(other("initial"), model={"init": single.out}),
        other("chunks", micro_batch_size=1, **CHUNKS),
        other("counting", objective="counting"),
    ]
    said = launch(tmp_path, recipes)
    for name in ("sharded", "accumulated", "replicated", "hybrid", "begun", "chunks"):
        assert said[name] == ["done 8"] * 2
    for name in ("sharded", "accumulated", "replicated", "hybrid", "chunks"):
        assert_close(metrics(single.out), metrics(tmp_path / name))
    assert_close(metrics(straight.out), metrics(begun.out))

    # begun by two, finished by one
    to_continue = replace(recipes[5], train=replace(recipes[5].train, steps=8))
    assert run(to_continue).last_step == 8
    assert_close(metrics(straight.out), metrics(to_continue.out))

    # a model of a library too
    assert said["llama"] == ["done 4"] * 2
    assert_close(metrics(llama.out), metrics(tmp_path / "llama"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llama" / "export")
    assert type(model).__module__.startswith("transformers.")

    # nor does what a codebook learns of
    assert said["quantised-split"] == ["done 8"] * 2
    assert_close(metrics(codebook.out), metrics(tmp_path / "quantised-split"), rel=1e-4)
    used = [
        [line["layers_codes_used_1"] for line in read_metrics(Path(out, "metrics.jsonl"))]
        for out in (codebook.out, tmp_path / "quantised-split")
    ]
    assert used[1] == pytest.approx(used[0], rel=1e-2)
    split_codes, codes = weights(replace(codebook, out=str(tmp_path / "quantised-split"))), weights(codebook)
    for name in ("codes", "counts", "totals"):
        one = f"model.layers.1.mixer.codebook.{name}"
        torch.testing.assert_close(split_codes[one], codes[one], rtol=1e-3, atol=1e-5)

    # the export is whole, and errors found by the main process reach all
    assert_export_equals(tmp_path / "sharded" / "export", single)
    assert all("batch_size (5) must be a multiple of the number of processes (2)" in one for one in said["odd"])
    assert all("seed (before 0, now 7)" in one for one in said["single"])

    # another model's weights to begin with, and an objective's state, on any number of processes
    alone = replace(other("initial-alone"), model={"init": single.out})
    run(alone)
    assert said["initial"] == said["counting"] == ["done 8"] * 2
    assert_close(metrics(alone.out), metrics(tmp_path / "initial"))
    assert metrics(alone.out)[0][2] < metrics(single.out)[0][2]
    assert ready(recipes[-1]).objective.state_dict()["count"].tolist() == [4.0, 2.0]

    # auxiliary losses, statistics, options of the optimizer and marked targets do not depend on who computes what
    expected = weights(speaking)
    for recipe in speaking_split:
        assert said[recipe.name] == ["done 8"] * 2
        assert_close(metrics(speaking.out), metrics(recipe.out), rel=1e-4)
        assert beside(recipe.out) == pytest.approx(beside(speaking.out), rel=1e-3)
        found = weights(recipe)
        assert found["model.layers.0.seen"] == expected["model.layers.0.seen"] > 0
        for name in ("model.layers.0.gain", "model.layers.0.router.weight"):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5)
    exported = load_file(tmp_path / "speaking-sharded" / "export" / "model.safetensors")
    assert exported["model.layers.0.seen"] == expected["model.layers.0.seen"]


def assert_export_equals(export: Path, recipe: Recipe) -> None:
    """Exported weights against those of a one-process run."""
    exported = load_file(export / "model.safetensors")
    expected = weights(recipe)
    for name, weight in exported.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-5)
    assert exported.keys() == expected.keys()
