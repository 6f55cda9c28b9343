"""The commands about recall, reach and attention, used as a stranger would, also wrongly."""

import json
from pathlib import Path
from typing import Any

import pytest


def test_recall_reach_diagnose(cli, here: Path):
    assert cli("train", "run.yaml", "train.steps=2").code == 0
    run = here / "runs" / "run"
    asked = ("evaluate", "recall", run, "--task", "passkey", "--task", "synthetic:kv", "--samples", 2)
    recalled = cli(*asked, "--distances", "61", "--out", "recalled")
    assert recalled.code == 0, recalled.err
    curves = json.loads((here / "recalled" / "recall.json").read_text())
    assert [(curve["task"], curve["points"][0]["distance"]) for curve in curves] == [
        ("passkey", 61),
        ("synthetic:kv", 61),
    ]
    assert "window 8, reach 15" in recalled.out
    # around the window and the reach, where the task can be put together
    assert cli("evaluate", "recall", run, "--task", "synthetic:kv", "--samples", 1).code == 0
    for wrong, message in (
        (("--distances", "61,x"), "--distances: expected whole numbers"),
        (("--task", "mqr"), "expected one of passkey"),
        (("--distances", "60", "--task", "synthetic:kv"), "expected an odd number"),
        (("--data", "run.yaml"), "run.yaml"),
        (("--window", "4,8"), "this command takes one window"),
        (("--task", "passkey", "--out", "recalled"), "already holds recall.json"),
    ):
        failed = cli("evaluate", "recall", run, *wrong)
        assert failed.code == 2
        assert message in failed.err
        assert failed.err.splitlines()[-1].startswith("error: ")
        assert "Traceback" not in failed.err

    reached = cli("evaluate", "reach", run, "--data", "text", "--length", 20, "--most", 2, "--out", "reached")
    assert reached.code == 0, reached.err
    assert json.loads((here / "reached" / "reach.json").read_text())["reach"] == 15
    assert "99 %" in reached.out

    looked = cli("evaluate", "diagnose", run, "--data", "text", "--length", 32, "--most", 2, "--out", "looked")
    assert looked.code == 0, looked.err
    assert "sigmoid" in looked.out
    assert (here / "looked" / "variance.png").exists()
    assert cli("evaluate", "diagnose", run, "--data", "text", "--out", "looked").code == 2


def test_an_interrupted_recall_goes_on(cli, here: Path, monkeypatch: pytest.MonkeyPatch):
    assert cli("train", "run.yaml", "train.steps=2").code == 0
    tasks = ("--task", "passkey", "--task", "synthetic:kv", "--samples", 2, "--distances", "61,71")
    asked = ("evaluate", "recall", here / "runs" / "run", *tasks, "--batch-size", 1)
    assert cli(*asked, "--out", "straight").code == 0

    from swat_lm.evaluate import recall

    score, batches = recall.score_batch, []

    def interrupted(*arguments: Any) -> Any:
        batches.append(arguments)
        if len(batches) == 6:
            raise KeyboardInterrupt
        return score(*arguments)

    monkeypatch.setattr(recall, "score_batch", interrupted)
    assert cli(*asked, "--out", "stopped").code == 130
    assert sorted(path.name for path in (here / "stopped").iterdir()) == ["partial-0.json", "partial-1.json"]
    other = cli(*asked, "--seed", 1, "--out", "stopped")
    assert (other.code, "partial results of another model" in other.err) == (2, True)
    batches.clear()
    assert cli(*asked, "--out", "stopped").code == 0
    # of two tasks with four items each, five were done
    assert len(batches) == 3
    assert sorted(path.name for path in (here / "stopped").iterdir()) == ["recall.json", "recall.png"]
    assert (here / "stopped" / "recall.json").read_text() == (here / "straight" / "recall.json").read_text()
