"""FSDP2 over two processes on the CPU: one launch of torchrun does several runs, judged here against one process."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from swat_lm.recipe import Recipe, dump_recipe
from swat_lm.train import run
from tests.train.runs import assert_close, metrics, weights
from tests.train.test_baselines import baseline

PROGRAM = """
import os, sys
from swat_lm.recipe import load_recipe
from swat_lm.train import run

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
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return {path.stem: [Path(f"{path}.rank{rank}").read_text() for rank in (0, 1)] for path in paths}


def test_two_processes_compute_what_one_does(make_recipe, tmp_path):
    single = make_recipe("single")
    run(single)

    def other(name: str, **train) -> Recipe:
        return make_recipe(name, **train)

    # begun by one process, to be finished by two
    begun = other("begun", steps=4)
    run(replace(begun, train=replace(begun.train, steps=4, schedule="constant")))
    begun = replace(begun, train=replace(begun.train, steps=8, schedule="constant"))
    straight = other("straight", schedule="constant")
    run(straight)
    llama = baseline(make_recipe, "llama-single", "llama")
    run(llama)

    recipes = [
        other("sharded", export=True),
        other("accumulated", micro_batch_size=1, activation_checkpointing=True),
        other("replicated", sharding="none", micro_batch_size=1),
        other("hybrid", sharding="hybrid", replicas=2),
        begun,
        other("to-continue", steps=4, schedule="constant"),
        other("odd", batch_size=5),
        replace(single, seed=7),
        baseline(make_recipe, "llama", "llama", export=True),
    ]
    said = launch(tmp_path, recipes)
    for name in ("sharded", "accumulated", "replicated", "hybrid", "begun"):
        assert said[name] == ["done 8"] * 2
    for name in ("sharded", "accumulated", "replicated", "hybrid"):
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

    # the export is whole, and errors found by the main process reach all
    assert_export_equals(tmp_path / "sharded" / "export", single)
    assert all("batch_size (5) must be a multiple of the number of processes (2)" in one for one in said["odd"])
    assert all("seed (before 0, now 7)" in one for one in said["single"])


def assert_export_equals(export: Path, recipe: Recipe) -> None:
    """Exported weights against those of a one-process run."""
    exported = load_file(export / "model.safetensors")
    expected = weights(recipe)
    for name, weight in exported.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-5)
    assert exported.keys() == expected.keys()
