"""transformers' tensor parallelism over two processes on the CPU: one launch, judged against the whole model."""

import json
import os
import subprocess
import sys

from .shared_heads import PLANS


def test_two_processes_share_the_heads(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [*command, "-m", "tests.model.shared_heads", str(tmp_path)], capture_output=True, text=True, env=environment
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    for rank in range(2):
        said = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert said == dict.fromkeys((*PLANS, "refused"), ""), "\n".join(said.values())
