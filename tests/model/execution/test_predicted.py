"""What a training step is predicted to need is what it needs, to within 20 %, and nothing is allocated to find out."""

import pytest
import torch

from swat_lm import SwatConfig, SwatForCausalLM
from swat_lm.model.execution.live_bytes import LiveBytes
from swat_lm.model.execution.predicted import Predicted

FULL = {"kind": "attention", "sliding_window": None, "score_function": "softmax", "slopes": "none"}
NARROW = {**FULL, "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 32}
EXECUTIONS: dict[str, dict] = {
    "plain": {},
    "checkpoint": {},
    "blockwise": {"block_size": 128, "key_block_size": 128},
    "chunks": {"chunk_size": 64},
}


def configuration(layers=None, **changes) -> SwatConfig:
    values = {
        "vocab_size": 500, "hidden_size": 64, "intermediate_size": 160,
        "num_hidden_layers": 1 if layers is None else len(layers),
        "num_attention_heads": 2, "sliding_window": 24, "layers": layers,
    }  # fmt: skip
    return SwatConfig(**values | changes)


def measured(config: SwatConfig, name: str, settings: dict, rows: int, length: int, narrow: bool = False) -> int:
    torch.manual_seed(0)
    model = SwatForCausalLM(config).train()
    model.set_execution(name, **settings)
    ids = torch.randint(0, config.vocab_size, (rows, length))
    with LiveBytes() as live:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
            loss = model(ids, labels=ids).loss
        loss.backward()
    return live.peak


@pytest.mark.parametrize(
    ("name", "layers", "rows", "length", "narrow"),
    [
        ("plain", None, 2, 700, False),
        ("checkpoint", ["attention", FULL], 1, 900, True),
        # narrow, so that the fused kernel's part shows
        ("checkpoint", [NARROW, NARROW], 1, 1100, False),
        ("blockwise", [FULL], 1, 400, False),
        ("blockwise", [{**FULL, "slopes": "negative"}], 1, 400, False),
        ("chunks", ["mamba2"], 1, 500, False),
        ("chunks", None, 2, 500, True),
        ("chunks", [{"kind": "attention", "sliding_window": 16, "sinks": 2}], 1, 150, False),
        ("checkpoint", [{"kind": "spade", "sliding_window": 16, "state_size": 8}], 1, 300, False),
        ("plain", [{"kind": "attention", "bidirectional": True, "slopes": "none"}], 1, 300, False),
    ],
)
def test_peaks_are_as_predicted(name: str, layers: list | None, rows: int, length: int, narrow: bool):
    config, settings = configuration(layers), EXECUTIONS[name]
    need = Predicted(config, name, settings, rows=rows, narrow=narrow).need(length)
    found = measured(config, name, settings, rows, length, narrow)
    assert need.one_pass == pytest.approx(found, rel=0.2), need.one_pass / found
    parameters = SwatForCausalLM(config).num_parameters()
    assert (need.weights, need.optimizer) == (4 * parameters, 8 * parameters)


def test_carries_on_disk_are_not_counted_and_the_longest_row_fits(tmp_path, monkeypatch):
    monkeypatch.setattr("swat_lm.model.execution.predicted.MANY", 4)
    config = configuration()
    settings = {"chunk_size": 64, "carries": "disk"}
    disk = Predicted(config, "chunks", settings)
    found = measured(config, "chunks", {**settings, "folder": str(tmp_path)}, 1, 900)
    assert disk.need(900).one_pass == pytest.approx(found, rel=0.2)
    assert disk.carry == 2 * 24 * 64 * 4
    plain = Predicted(config, "plain")
    assert plain.longest(plain.need(700).total, near=300) == pytest.approx(700, rel=0.05)
    # of two shards, each holds half of what is held for good
    halves, whole = Predicted(config, "plain", shards=2).need(700), plain.need(700)
    assert halves.weights == whole.weights // 2
    assert halves.total < whole.total
    with pytest.raises(ValueError, match="keeps the key of all tokens"):
        Predicted(configuration([FULL]), "chunks")


def test_what_depends_on_numbers_is_said():
    sparse = Predicted(configuration(["mamba2", {"kind": "taipan", "sliding_window": 16, "execution": "sparse"}]))
    with pytest.raises(
        ValueError, match=r"plain cannot be predicted: what a layer computes depends on numbers.*nonzero"
    ):
        sparse.need(64)


def test_a_line_begins_where_two_parts_of_the_loss_live_together(monkeypatch):
    # logits that outweigh a narrow layer, in parts of 256 tokens
    monkeypatch.setattr("swat_lm.model.loss.CHUNK_ELEMENTS", 2**17)
    monkeypatch.setattr("swat_lm.model.execution.predicted.MANY", 2)
    config, settings = configuration(vocab_size=512, hidden_size=16, intermediate_size=32), {"block_size": 64}
    blocks = Predicted(config, "blockwise", settings)
    for length in (200, 400, 900):
        found = measured(config, "blockwise", settings, 1, length)
        assert blocks.need(length).one_pass == pytest.approx(found, rel=0.1), length
