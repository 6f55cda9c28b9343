"""transformers' tensor parallelism over two processes on the CPU: one launch, judged against the whole model."""

import json

from tests.forked import run_two

from .shared_heads import PLANS


def test_two_processes_share_the_heads(tmp_path):
    run_two("from tests.model import shared_heads; shared_heads.main()", tmp_path, folder=tmp_path)
    for rank in range(2):
        said = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert said == dict.fromkeys((*PLANS, "refused"), ""), "\n".join(said.values())
