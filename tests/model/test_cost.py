"""Cost formulas against counted values: real parameters, PyTorch's FLOP counter, real state, gradients for reach."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from swat_lm import SwatForCausalLM
from swat_lm.model import cost
from swat_lm.model.presets import preset_names
from swat_lm.model.recipe_fields import config_from_recipe
from swat_lm.ops.reference import distances

from .models import tiny_config, tiny_model, tokens

# total, and without the input embedding
EXPECTED = {
    "340m": (373_867_520, 341_099_520), "760m": (777_856_512, 728_704_512), "248m": (247_101_696, 208_504_320),
    # tied, so the embedding counts as the output's
    "190m": (187_520_022,) * 2, "450m": (446_068_108,) * 2, "1.3b": (1_295_090_826,) * 2,
    # ECP and the Perceivers beside it, at the defaults of its code
    "130m": (129_556_992, 107_288_064), "122m": (122_482_176, 100_213_248), "123m": (123_006_976, 100_738_048),
}  # fmt: skip


@pytest.mark.parametrize("name", preset_names())
def test_presets_have_exactly_these_parameters(name):
    config = config_from_recipe({"preset": name})
    with torch.device("meta"):
        model = SwatForCausalLM(config)
    counted = sum(parameter.numel() for parameter in model.parameters())
    counts = cost.count_parameters(config)
    # gains of queries and keys
    gains = 2 * config.num_hidden_layers * config.head_dim if name.startswith("sigmoid-window") else 0
    expected = tuple(number + gains for number in EXPECTED[name.rsplit("-", 1)[1]])
    assert (counts.total, counts.without_input_embedding) == expected
    assert counted == counts.total
    assert counts.embedding == model.model.embed_tokens.weight.numel()


def test_presets_are_those_that_are_promised():
    kinds = ("sigmoid-window", "softmax-window", "swat", "transformer")
    taipan = [f"taipan-{size}" for size in ("190m", "450m", "1.3b")]
    swat = sorted(f"{kind}-{size}" for kind in kinds for size in ("248m", "340m", "760m"))
    assert set(preset_names()) >= {*swat, *taipan}
    for name in taipan:
        plan = config_from_recipe({"preset": name}).plan()
        assert [entry.kind.name for entry in plan] == (["mamba2"] * 6 + ["taipan"]) * (len(plan) // 7)
        assert {(entry.settings.sliding_window, entry.settings.capacity, entry.settings.score_function)
                for entry in plan[6::7]} == {(2048, 0.15, "softmax")}  # fmt: skip
    segments = config_from_recipe({"preset": "ecp-130m"}).plan()
    assert {(entry.kind.name, entry.settings.window, entry.settings.tied) for entry in segments} == {("ecp", 512, True)}
    histories = {"ar-122m": {"drop"}, "v1-122m": {"whole"}, "v2-122m": {"segments"}, "v3-123m": {"compress", "whole"}}
    for name, expected in histories.items():
        plan = config_from_recipe({"preset": f"perceiver-{name}"}).plan()
        assert {entry.settings.history for entry in plan[:-1]} == expected
        assert plan[-1].settings.history == "drop"
    for name in swat:
        config = config_from_recipe({"preset": name})
        settings = config.attention_settings(0)
        kind = name.rsplit("-", 1)[0]
        assert settings.score_function == ("sigmoid" if kind in ("swat", "sigmoid-window") else "softmax")
        assert settings.slopes == {"swat": "balanced", "sigmoid-window": "negative"}.get(kind, "none")
        assert settings.score_bias == ("-log(window)" if kind == "sigmoid-window" else 0.0)
        assert settings.qk_norm == (kind == "sigmoid-window")
        assert (settings.sliding_window is None) == name.startswith("transformer")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        {"qk_norm": True, "output_norm": True, "score_function": "softmax", "learned_sink": True, "head_dim": 12},
        {"learned_slopes": True, "learned_score_bias": True, "output_gate": True, "layer_scale": 0.1},
        {"norm": "layer", "feed_forward": "plain", "mlp_bias": True, "layers": ["attention", "mamba2"]},
    ],
)
def test_parameters(changes):
    model = tiny_model(**changes)
    assert cost.count_parameters(model.config).total == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("window", [1, 3, 16, 40, None])
@pytest.mark.parametrize("past", [0, 2, 9])
def test_visible_pairs(window, past):
    _, visible = distances(1, 16, 16 + past, None, None, window, torch.device("cpu"))
    assert cost.visible_pairs(16, window, past) == int(visible.sum())


@pytest.mark.parametrize("windows", [[7, 7], [3, None]])
def test_flops_are_what_pytorch_counts(windows):
    model, ids = tiny_model(sliding_window=windows), tokens(2, 30)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(ids)
    assert forward.get_total_flops() == 2 * cost.forward_flops(model.config, 30)
    with FlopCounterMode(display=False) as training:
        model(ids, labels=ids, return_logits=False).loss.backward()
    assert training.get_total_flops() == 60 * cost.training_flops_per_token(model.config, 30)


def test_decoding_flops_are_what_pytorch_counts_on_full_rings():
    model = tiny_model(sliding_window=4)
    state = model.init_state(2)
    model.prefill(tokens(2, 9), state)
    with FlopCounterMode(display=False) as counter:
        model.decode_step(tokens(2, 1), state)
    assert counter.get_total_flops() == 2 * cost.decoding_flops_per_token(model.config, 9)
    assert cost.decoding_flops_per_token(model.config, 1) < cost.decoding_flops_per_token(model.config, 9)
    assert cost.decoding_flops_per_token(model.config, 10**6) == cost.decoding_flops_per_token(model.config, 9)


def test_state_bytes_are_those_of_a_real_state():
    model = tiny_model(sliding_window=[4, 9])
    state = model.init_state(3)
    assert cost.state_bytes(model.config, batch=3, dtype_bytes=4) == state.num_bytes - 3 * 8
    full = tiny_config(sliding_window=[4, None])
    assert cost.state_bytes(full, context=100) == 2 * 2 * (4 + 100) * 2 * 8
    with pytest.raises(ValueError, match="context"):
        cost.state_bytes(full)


def test_bytes_read_per_decoded_token():
    config = tiny_config(sliding_window=4)
    weights = cost.count_parameters(config).without_input_embedding
    read = cost.decoding_bytes_per_token(config, context=100, batch=3, weight_bytes=4, dtype_bytes=4)
    assert read == 4 * (weights + 3 * 32) + cost.state_bytes(config, batch=3, dtype_bytes=4)


@pytest.mark.parametrize("windows", [[1, 1, 1], [4, 4, 4], [2, 5, 3]])
def test_reach_by_gradient(windows):
    config = tiny_config(num_hidden_layers=3, sliding_window=windows)
    model = tiny_model(num_hidden_layers=3, sliding_window=windows).double()
    embedded = model.model.embed_tokens(tokens(1, 30)).detach().requires_grad_()
    model(inputs_embeds=embedded).logits[0, -1].pow(2).sum().backward()
    touched = (embedded.grad[0] != 0).any(dim=-1)
    expected = cost.reach(config)
    assert expected == 1 + sum(window - 1 for window in windows)
    assert touched.tolist() == [False] * (30 - expected) + [True] * expected


def test_reach_of_full_attention_is_everything():
    assert cost.reach(tiny_config(sliding_window=[4, None])) is None
