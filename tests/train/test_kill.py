"""kill -9 in the middle of a run, then the same command again: the numbers of a run that was never disturbed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from swat_lm.recipe import dump_recipe
from swat_lm.train import run
from tests.train.runs import assert_same_run

PROGRAM = (
    "import sys; from swat_lm.recipe import load_recipe; from swat_lm.train import run; run(load_recipe(sys.argv[1]))"
)


def test_killed_run_goes_on_bit_for_bit(make_recipe, tmp_path):
    settings = {"steps": 60, "save_every": 8, "log_every": 1, "evaluate_every": 30, "keep": 2}
    killed, whole = make_recipe("killed", **settings), make_recipe("whole", **settings)
    (tmp_path / "killed.yaml").write_text(dump_recipe(killed))
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path / "killed.yaml")], env=environment)
    metrics = Path(killed.out, "metrics.jsonl")
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 12):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = metrics.read_text().count("\n")
    assert done < 60, "killed too late to test anything"

    result = run(killed)
    assert result.last_step == 60
    run(whole)
    assert_same_run(killed, whole)
