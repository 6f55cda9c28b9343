"""A saved state goes on with the weights that made it, and with no others."""

import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from swat_lm import SwatForCausalLM
from swat_lm.model.fingerprint import fingerprint
from swat_lm.model.state import load_state, save_state

from .models import tiny_config, tiny_model, tokens


def saved(model, path, count=9):
    state = model.init_state(1)
    model.prefill(tokens(1, count), state)
    save_state(state, path)
    return path


def test_equal_models_have_equal_fingerprints(tmp_path):
    model = tiny_model()
    known = fingerprint(model)
    model.save_pretrained(tmp_path / "model")
    model.arrange_for_decoding()
    model._known_fingerprint = None
    for same in (model, tiny_model(), tiny_model(attention_backend="reference")):
        assert fingerprint(same) == known
    assert fingerprint(SwatForCausalLM.from_pretrained(tmp_path / "model")) == known
    with torch.inference_mode():
        assert fingerprint(tiny_model()) == known


def test_a_span_that_no_schedule_reads_is_no_other_model():
    """Checkpoints name the default of their day."""
    assert fingerprint(tiny_model(slope_span=16.0)) == fingerprint(tiny_model())
    with pytest.raises(ValueError, match=r"slope_span: 8.0 belongs to"):
        tiny_config(slope_span=8.0)
    scheduled = [tiny_model(slopes="negative", slope_schedule="window", **span) for span in ({}, {"slope_span": 16.0})]
    assert fingerprint(scheduled[0]) != fingerprint(scheduled[1])
    assert scheduled[0].config.slope_span == [64.0, 4.0]


@torch.no_grad()
def test_other_models_have_others():
    known = {fingerprint(tiny_model())}
    for changes in ({"seed": 1}, {"rope_theta": 5e5}, {"slopes": "none"}, {"tie_word_embeddings": True}):
        known.add(fingerprint(tiny_model(**changes)))
    known.add(fingerprint(tiny_model().bfloat16()))
    known.add(fingerprint(tiny_model().bfloat16().float()))
    assert len(known) == 7
    # one element of any weight; and the same sums in other places
    for name, weight in tiny_model().named_parameters():
        other = tiny_model()
        other.get_parameter(name).view(-1)[weight.numel() // 3] += 1e-3
        known.add(fingerprint(other))
        if weight.dim() == 2:
            other = tiny_model()
            other.get_parameter(name).copy_(weight.flip(0))
            known.add(fingerprint(other))
            other.get_parameter(name).copy_(weight.flip(1))
            known.add(fingerprint(other))
    assert len(known) == 7 + sum(3 if weight.dim() == 2 else 1 for weight in tiny_model().parameters())


def test_it_is_formed_anew_only_when_the_weights_change(monkeypatch):
    model, formed = tiny_model(), []
    whole = "swat_lm.model.fingerprint.whole_fingerprint"
    monkeypatch.setattr(whole, lambda model: formed.append(model) or str(len(formed)))
    assert [fingerprint(model), fingerprint(model)] == ["1", "1"]
    model.arrange_for_decoding()
    assert fingerprint(model) == "1"
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert fingerprint(model) == "1"
    # as an adapter is merged: no counter sees it
    model.model.stack[0].self_attn.q_proj.weight.data += 0.01
    assert fingerprint(model) == "2"
    with torch.no_grad():
        model.lm_head.weight[50, 20] = 0
    assert fingerprint(model) == "3"
    model.double()
    assert fingerprint(model) == "4"


def test_a_large_weight_is_read_in_rows(monkeypatch):
    model = tiny_model()
    whole = fingerprint(model)
    model._known_fingerprint = None
    monkeypatch.setattr("swat_lm.model.fingerprint.MOST_ELEMENTS", 64)
    assert fingerprint(model) != whole
    assert fingerprint(tiny_model()) == fingerprint(model) != fingerprint(tiny_model(seed=1))


@pytest.mark.parametrize("use", ["extend", "decode_step", "check_state"])
def test_a_state_of_other_weights_is_refused(tmp_path, use):
    path = saved(tiny_model(), tmp_path / "x.state")
    calls = {
        "extend": lambda model, state: model.extend(tokens(1, 2), state),
        "decode_step": lambda model, state: model.decode_step(tokens(1, 1), state),
        "check_state": lambda model, state: model.check_state(state),
    }
    calls[use](tiny_model(), load_state(path))
    for other in (tiny_model(seed=1), tiny_model(slopes="none")):
        with pytest.raises(ValueError, match=r"made by other weights of the same shape .*read its text again"):
            calls[use](other, load_state(path))
    for dtype in (torch.bfloat16, torch.float64):
        with pytest.raises(ValueError, match=rf"holds float32, the model's weights are {str(dtype)[6:]}: go on with"):
            calls[use](tiny_model().to(dtype), load_state(path))
    with pytest.raises(ValueError, match=r"expected 3 layers, it holds 2; it belongs to another model"):
        calls[use](tiny_model(num_hidden_layers=3), load_state(path))
    # handed on unread, it stays bound
    save_state(load_state(path), path)
    with pytest.raises(ValueError, match="made by other weights"):
        calls[use](tiny_model(seed=1), load_state(path))


def test_a_living_state_is_bound_as_well():
    model, other = tiny_model(), tiny_model(seed=1)
    state = model.init_state(1)
    # nothing read yet
    other.check_state(state)
    model.prefill(tokens(1, 5), state)
    with pytest.raises(ValueError, match="made by other weights"):
        other.decode_step(tokens(1, 1), state)
    tiny_model().decode_step(tokens(1, 1), state)
    model.decode_step(tokens(1, 1), state)
    model.bfloat16()
    for step in (model.decode_step, model.extend):
        with pytest.raises(ValueError, match="holds float32, the model's weights are bfloat16"):
            step(tokens(1, 1), state)
    # under autocast, keys are not of the weights' dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tiny_model().decode_step(tokens(1, 1), tiny_model().init_state(1, dtype=torch.bfloat16))


def test_a_state_of_before_goes_on_to_the_same_numbers_with_one_warning(tmp_path):
    model = tiny_model()
    path = saved(model, tmp_path / "x.state")
    expected = model.decode_step(tokens(1, 1), load_state(path))
    with safe_open(path, "pt") as file:
        metadata = {name: value for name, value in file.metadata().items() if name != "fingerprint"}
    assert metadata["format"] == "swat-lm stream state 2"
    save_file(load_file(path), path, metadata)
    with pytest.warns(UserWarning, match=r"x\.state: this state does not say which model made it") as said:
        state = load_state(path)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model.decode_step(tokens(1, 1), state), expected)
        save_state(state, path)
        load_state(path)


def test_a_state_whose_model_is_gone_says_so(tmp_path):
    state = SwatForCausalLM(tiny_config()).eval().init_state(1)
    with pytest.warns(UserWarning, match="save a state while its model is there"):
        save_state(state, tmp_path / "x.state")
