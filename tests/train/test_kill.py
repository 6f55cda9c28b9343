"""kill -9 in the middle of a run, then the same command again: the numbers of a run that was never disturbed.

The model is an interleaved plan, and what it has become is then used from the command line as any model is.
"""

import json
import time
from dataclasses import replace
from pathlib import Path

import torch

from swat_lm.recipe import dump_recipe
from swat_lm.train import run
from tests.forked import begin
from tests.train.runs import assert_same_run

PROGRAM = (
    "import sys; from swat_lm.recipe import load_recipe; from swat_lm.train import run; run(load_recipe(sys.argv[1]))"
)


LAYERS = [{"kind": "mamba2", "state_size": 16, "ssm_head_dim": 16}, "attention"]


def test_killed_run_goes_on_bit_for_bit_and_serves(make_recipe, tmp_path, cli, text):
    # what reverse chunks keep on disk while they are killed must be gone as well
    chunks = {"execution": "chunks", "execution_settings": {"chunk_size": 32, "carries": "disk"}}
    settings = {"steps": 60, "save_every": 8, "log_every": 1, "evaluate_every": 30, "keep": 2, "export": True, **chunks}
    recipes = make_recipe("killed", **settings), make_recipe("whole", **settings)
    killed, whole = (replace(one, model={**one.model, "layers": LAYERS}) for one in recipes)
    (tmp_path / "killed.yaml").write_text(dump_recipe(killed))
    said = tmp_path / "said.txt"
    process = begin(PROGRAM, tmp_path / "killed.yaml", output=said, threads=torch.get_num_threads())
    metrics = Path(killed.out, "metrics.jsonl")
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 12):
        assert process.is_alive(), f"the run ended before it could be killed: {said.read_text()}"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.join()
    done = metrics.read_text().count("\n")
    assert not list(Path(killed.out).glob("*carries*"))
    assert done < 60, "killed too late to test anything"

    result = run(killed)
    assert result.last_step == 60
    run(whole)
    assert_same_run(killed, whole)

    export, greedy = Path(killed.out, "export"), ("--temperature", 0, "--ignore-end")
    assert json.loads((export / "config.json").read_text())["layers"] == LAYERS
    once = cli("generate", export, "-p", "the ", "-n", 40, *greedy)
    state = tmp_path / "half.state"
    first = cli("generate", export, "-p", "the ", "-n", 20, *greedy, "--save-state", state)
    second = cli("generate", export, "-n", 20, *greedy, "--load-state", state)
    assert (once.code, first.code, second.code) == (0, 0, 0), second.err
    assert once.out == first.out.removesuffix("\n") + second.out
    measured = cli("evaluate", "length", export, "--data", text, "--lengths", "16,64", "--out", tmp_path / "length")
    assert measured.code == 0, measured.err
    assert "mamba2" in cli("info", export).out
