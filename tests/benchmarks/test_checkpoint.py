"""The benchmark of a real checkpoint, on a tiny one: its plans, states far into a stream, what is recorded."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import checkpoint
from swat_lm import SwatConfig, SwatForCausalLM
from swat_lm.evaluate.length import loss_by_length


@pytest.fixture
def model() -> SwatForCausalLM:
    torch.manual_seed(0)
    config = SwatConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        sliding_window=None, score_function="softmax", slopes="none",
    )  # fmt: skip
    return SwatForCausalLM(config).eval()


def test_a_far_state_is_one_that_was_read(model: SwatForCausalLM):
    for plan in checkpoint.PLANS.values():
        twin = checkpoint.planned(model, plan)
        assert twin.model.layers[0].self_attn.q_proj.weight is not None
        far = checkpoint.filled(twin, 1500)
        read = twin.init_state(1)
        twin.extend(torch.randint(40, (1, 1500)), read)
        for own, other in zip(far.layers, read.layers, strict=True):
            assert {name: tensor.shape[2:] for name, tensor in own.items()} == {
                name: tensor.shape[2:] for name, tensor in other.items()
            }
            for name in ("sink_place", "sink_span"):
                assert name not in own or torch.equal(own[name], other[name])
        assert twin.decode_step(torch.tensor([[1]]), far).isfinite().all()


def test_it_measures_and_records(
    model: SwatForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    model.save_pretrained(tmp_path / "model")
    documents = [torch.randint(40, (64,)).tolist() for _ in range(2)]
    for name in ("full", "w128s4", "third", "stream"):
        plan = checkpoint.PLANS.get(name, checkpoint.PLANS["w128s4"])
        curve = loss_by_length(checkpoint.planned(model, plan), documents, [16, 64])
        curve.save(tmp_path / "curves" / name / "length.json")
    monkeypatch.setattr(checkpoint, "CONTEXT", 96)
    monkeypatch.setattr(checkpoint, "RECORD", tmp_path / "record.json")
    monkeypatch.setattr(checkpoint, "PICTURE", tmp_path / "record.png")
    monkeypatch.setattr(checkpoint.measure, "REPOSITORY", tmp_path)
    asked = ["checkpoint", str(tmp_path / "model"), str(tmp_path / "curves"), "--commit", "abc", "--record"]
    monkeypatch.setattr(sys, "argv", [*asked, "--rounds", "2", "--steps", "2", "--threads", "1"])
    checkpoint.main()
    found = json.loads((tmp_path / "record.json").read_text())
    assert [plan["name"] for plan in found["plans"]] == ["full", "w128s4", "third"]
    assert found["plans"][0]["decoding"]["times_full"] == 1
    assert (tmp_path / "record.png").stat().st_size > 1000

    (tmp_path / "curves" / "w256s0").mkdir()
    (tmp_path / "curves" / "w128s4" / "length.json").rename(tmp_path / "curves" / "w256s0" / "length.json")
    with pytest.raises(SystemExit):
        checkpoint.main()
    assert "w256s0 was measured with 4 first tokens kept, expected 0" in capsys.readouterr().err
