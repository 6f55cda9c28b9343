"""Checks of what leaves the process: configurations, weights, and the state of streams."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from swat_lm import SwatConfig, SwatForCausalLM
from swat_lm.layers import LAYERS
from swat_lm.model.state import load_state, save_state
from tests.layers.in_slots import Traffic, events
from tests.layers.subject import Check, Subject, one_pass, tokens


def a_model_is_saved_and_loaded_bit_for_bit(subject: Subject, folder: Path) -> None:
    """Weights, plan and numbers; also in bfloat16, and when decoding has laid the weights out otherwise."""
    model, ids = subject.model(torch.float32), tokens(2, 12)
    expected = one_pass(model, ids)
    model.save_pretrained(folder / "plain")
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    model.arrange_for_decoding()
    model.save_pretrained(folder / "arranged")
    for name in ("plain", "arranged"):
        loaded = AutoModelForCausalLM.from_pretrained(folder / name)
        assert isinstance(loaded, SwatForCausalLM)
        assert loaded.state_dict().keys() == weights.keys()
        assert all(torch.equal(value, weights[key]) for key, value in loaded.state_dict().items())
        assert torch.equal(one_pass(loaded.eval(), ids), expected)
        assert loaded.config.plan() == model.config.plan()
    half = SwatForCausalLM.from_pretrained(folder / "plain", dtype=torch.bfloat16)
    assert torch.equal(one_pass(half.eval(), ids), one_pass(subject.model(torch.float32).bfloat16(), ids))


def a_configuration_goes_through_json(subject: Subject, folder: Path) -> None:
    """As it was written, and again; and its kinds work with no setting but the width."""
    config = subject.config()
    config.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    assert written["layers"] == subject.layers
    again = SwatConfig.from_pretrained(folder)
    assert again.plan() == config.plan()
    assert again.to_dict() == {**config.to_dict(), "transformers_version": again.to_dict()["transformers_version"]}
    assert SwatConfig(**{**written, "layers": subject.layers}).plan() == config.plan()
    for entry in config.plan():
        assert LAYERS[entry.kind.name] is entry.kind
        assert entry.layer_type in ("full_attention", "sliding_attention", "linear_attention")
        bare = SwatConfig(hidden_size=64, vocab_size=40, num_hidden_layers=1, layers=[entry.kind.name])
        assert SwatForCausalLM(bare)(tokens(1, 5)).logits.isfinite().all()


def a_stream_goes_to_disk_and_on_bit_for_bit(subject: Subject, folder: Path) -> None:
    """Sequences that stand apart, with holes, in the model's precision and in bfloat16; a foreign state is refused."""
    for number, dtype in enumerate((torch.float64, torch.bfloat16)):
        model = subject.model(dtype)
        if dtype == torch.float64:
            traffic = Traffic(model, 3, seed=2)
            traffic.run(["read_with_holes", *events(2, 8), "step_all"])
            state = traffic.state
        else:
            state = model.init_state(3)
            model.prefill(tokens(3, 9), state, slot=torch.tensor([2, 0, 1]), lengths=torch.tensor([9, 0, 4]))
            model.decode_step(tokens(3, 1), state)
        path = folder / f"stream-{number}.safetensors"
        state.logits = torch.randn(3, 40)
        save_state(state, path)
        assert [one.name for one in folder.iterdir() if one.name.startswith(".")] == []
        loaded = load_state(path)
        assert torch.equal(loaded.logits, state.logits)
        ours, theirs = loaded.snapshot(torch.arange(3)), state.snapshot(torch.arange(3))
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype
            assert torch.equal(ours[name], tensor), name
        assert loaded.num_bytes == state.num_bytes
        for part in tokens(3, 12, seed=6).split([1, 1, 4, 1, 5], dim=1):
            if part.shape[1] == 1:
                assert torch.equal(model.decode_step(part, loaded), model.decode_step(part, state))
            else:
                assert torch.equal(model.extend(part, loaded), model.extend(part, state))
    other = subject.model(layers=[*subject.layers, subject.layers[0]], num_hidden_layers=len(model.model.layers) + 1)
    with pytest.raises(ValueError, match=r"state: expected \d+ layers, it holds \d+; it belongs to another model"):
        other.prefill(tokens(3, 2), load_state(path))


CHECKS: tuple[Check, ...] = (
    a_model_is_saved_and_loaded_bit_for_bit,
    a_configuration_goes_through_json,
    a_stream_goes_to_disk_and_on_bit_for_bit,
)
