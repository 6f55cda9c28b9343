"""`swat-lm evaluate length`: sinks beside a window, whole documents, and what is kept of an interruption."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from swat_lm.cli.length import choose_streams
from swat_lm.evaluate.curves import LengthCurve


def test_sinks_beside_a_window(cli, here: Path, monkeypatch: pytest.MonkeyPatch):
    softmax = ("model.score_function=softmax", "model.slopes=none", "model.sliding_window=null")
    assert cli("train", "run.yaml", "train.steps=2", "out=runs/soft", *softmax).code == 0
    asked = ("evaluate", "length", "runs/soft", "--data", "text", "--lengths", "16,64", "--batch-size", 1)
    bare = cli(*asked, "--window", 4, "--out", "bare")
    assert bare.code == 0, bare.err
    assert "perplexity" in bare.out

    # an interruption after the first stream
    from swat_lm.evaluate import partial

    whole, calls = partial.PartialResults.add, []

    def add(self: partial.PartialResults, results: dict) -> None:
        whole(self, results)
        calls.append(results)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(partial.PartialResults, "add", add)
    assert cli(*asked, "--window", 4, "--sinks", 2, "--out", "kept").code == 130
    assert [path.name for path in (here / "kept").iterdir()] == ["partial-4.json"]
    assert "partial results of another model" in cli(*asked, "--window", 4, "--sinks", 3, "--out", "kept").err
    kept = cli(*asked, "--window", 4, "--sinks", 2, "--out", "kept")
    assert kept.code == 0, kept.err
    assert sorted(path.name for path in (here / "kept").iterdir()) == ["length.json", "length.png"]
    curves = [LengthCurve.from_json((here / name / "length.json").read_text()) for name in ("bare", "kept")]
    assert f"{math.exp(curves[0].at(64).mean_loss):.2f}" in bare.out
    assert [curve.num_sinks for curve in curves] == [0, 2]
    assert "num_sinks" not in json.loads((here / "bare" / "length.json").read_text())
    assert curves[0].at(64).mean_loss != curves[1].at(64).mean_loss
    # four places of the window, two tokens; of each layer where these stood and how much was read; and the position
    layers = json.loads((here / "runs/soft/export/config.json").read_text())["num_hidden_layers"]
    assert curves[1].at(64).state_bytes == (curves[0].at(64).state_bytes - 8) * 6 // 4 + layers * 4 * 8 + 8

    several = cli(*asked, "--window", "4,8", "--sinks", 2, "--out", "several")
    assert several.code == 0, several.err
    windows = json.loads((here / "several" / "windows.json").read_text())
    assert [curve["num_sinks"] for curve in windows.values()] == [2, 2]
    assert windows["4"]["points"] == json.loads((here / "kept" / "length.json").read_text())["points"]

    recurrent = ("model.layers=[{kind: mamba2, ssm_head_dim: 8}]", "out=runs/mamba")
    assert cli("train", "run.yaml", "train.steps=2", *recurrent).code == 0
    for run, window, message in (
        ("runs/soft", "own", "no layer has one; give a window"),
        ("runs/soft", "4,none", "--sinks: first tokens are kept beside a window"),
        ("runs/mamba", "4", "no layer of attention whose window"),
    ):
        failed = cli("evaluate", "length", run, "--data", "text", "--window", window, "--sinks", 2, "--out", "new")
        assert (failed.code, failed.out) == (2, "")
        assert message in failed.err.splitlines()[-1]
        assert "preparing" not in failed.err
        assert not (here / "new").exists()


def test_long_documents_are_not_crowded_out():
    documents = [np.arange(length) for length in (5, 20, 20, 20, 20, 20, 20, 100, 20, 20, 90)]
    chosen = choose_streams(documents, [10, 80], True, 4)
    assert [len(document) for document in chosen] == [20, 20, 100, 90]
    assert len(choose_streams(documents, [10, 80], True, 64)) == 10
    assert len(choose_streams(documents, [80], True, 1)) == 1
    assert choose_streams(documents, [200, 300], True, 4) == documents
