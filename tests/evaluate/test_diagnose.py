"""Diagnosis: weights are those of the attention itself, statistics are their definitions, models stay as they were."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from swat_lm.cli.diagnosis import diagnosis_table
from swat_lm.evaluate.diagnose import attention_weights, diagnose, weight_sums
from swat_lm.evaluate.diagnosis_plots import plot_diagnosis

from .models import STREAMABLE, VOCABULARY, tiny_gpt2, tiny_llama, tiny_mamba2, tiny_qwen3_next, tiny_swat


def streams(count: int, length: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, VOCABULARY, (count, length)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"slopes": "1:1", "score_bias": -1.5, "num_key_value_heads": 1, "qk_norm": True},
        {"score_function": "softmax", "slopes": "none", "learned_sink": True},
        {"learned_slopes": True, "learned_score_bias": True, "score_bias": -1.5, "slope_schedule": "window"},
        {"attn_logit_softcapping": 0.3, "attention_multiplier": 0.9},
        {"use_rotary": False, "sliding_window": None},
        {"sinks": 3, "score_function": "softmax", "slopes": "none", "learned_sink": True},
        {"sinks": 2, "score_bias": -0.5},
        {"sinks": 3, "score_function": "softmax", "slopes": "none", "sink_positions": "absolute"},
        {"slopes": "none", "layers": [{"kind": "attention", "bidirectional": True, "relative_bias": "own"}] * 2},
    ],
    ids=str,
)
def test_weights_are_those_of_the_operator(changes: dict):
    model, seen = tiny_swat(**{"window": 5, **changes} if "sliding_window" not in changes else changes), []
    attention = model.model.stack[1].self_attn
    if attention.relative_bias is not None:
        torch.nn.init.normal_(attention.relative_bias.table.weight)
    if changes.get("learned_sink"):
        torch.nn.init.normal_(attention.sink)

    def hook(module, arguments, output):
        hidden, chunk = arguments[:2]
        weights = attention_weights(module, hidden, chunk)
        _, _, value = module.project(hidden)
        value = value.repeat_interleave(
            module.settings.num_attention_heads // module.settings.num_key_value_heads, dim=2
        )
        mixed = torch.einsum("bhts,bshd->bthd", weights, value)
        seen.append((module.o_proj(mixed.flatten(2)), output[0], weights))

    attention.register_forward_hook(hook)
    with torch.no_grad():
        model(input_ids=torch.from_numpy(np.stack(streams(2, 17))), use_cache=False)
    ((expected, given, weights),) = seen
    torch.testing.assert_close(given, expected, atol=1e-4, rtol=1e-4)
    window = model.config.window(1) or 17
    assert (weights[:, :, 16, changes.get("sinks", 0) : 17 - window] == 0).all()


def test_statistics_are_their_definitions():
    weights = torch.tensor([[[0.5, 0, 0, 0], [0.995, 0.005, 0, 0], [0.2, 0.3, 0.5, 0], [0, 0.001, 1.0, 0.5]]])
    first, rows, low, high, distance = weight_sums(weights, 3)[:, 0].tolist()
    # query 3 does not see the first token, query 0 is left out
    assert first == pytest.approx((0.995 + 0.2) / 2)
    assert rows == pytest.approx((1 + 1 + 1.501) / 3)
    assert (low, high) == pytest.approx((2 / 8, 2 / 8))
    assert distance == pytest.approx((0.995 + 0.4 + 0.3 + 0.002 + 1.0) / 3.501)


def test_statistics_count_what_comes_after():
    """Both ways within a window of 2: distances without a sign, and shares of all that is seen."""
    weights = torch.tensor([[[0.5, 0.5, 0, 0], [0.2, 0.3, 0.5, 0], [0, 0.995, 0.005, 0.4], [0, 0, 1.0, 0.5]]])
    first, rows, low, high, distance = weight_sums(weights, 2, both_ways=True)[:, 0].tolist()
    assert first == pytest.approx(0.2)
    assert rows == pytest.approx((1 + 1.4 + 1.5) / 3)
    assert (low, high) == pytest.approx((1 / 8, 2 / 8))
    assert distance == pytest.approx((0.7 + 1.395 + 1.0) / 3.9)
    entry = {"kind": "attention", "bidirectional": True, "relative_bias": "own", "sliding_window": 3}
    model = tiny_swat(slopes="none", score_function="softmax", layers=[entry] * 2)
    for layer in model.model.stack:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
        torch.nn.init.zeros_(layer.self_attn.relative_bias.table.weight)
    found = diagnose(model, streams(1, 4)).weights[0]
    assert found.row_sum == pytest.approx([1.0] * len(found.row_sum))
    # every query weighs all that it sees alike: queries 1 and 2, which see the first token, see all 4
    assert found.first_token_mass == pytest.approx([0.25] * len(found.row_sum))
    assert found.first_token_uniform == pytest.approx(0.25)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "gemma2"])
def test_softmax_models(kind: str):
    model, texts = STREAMABLE[kind](), streams(3, 20)
    before = model.config._attn_implementation
    found = diagnose(model, texts)
    assert model.config._attn_implementation == before
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())
    assert found.has_weights
    for one in found.weights:
        assert one is not None
        assert one.score_function == "softmax"
        assert one.row_sum == pytest.approx([1] * 2, abs=1e-4)
        assert one.slopes is None
    assert found.weights[0] is not None
    if kind == "llama":
        model.set_attn_implementation("eager")
        with torch.no_grad():
            maps = model(input_ids=torch.from_numpy(np.stack(texts)), output_attentions=True, output_hidden_states=True)
        assert found.weights[1] is not None
        expected = maps.attentions[1][:, :, 1:, 0].mean(dim=(0, 2))
        assert found.weights[1].first_token_mass == pytest.approx(expected.tolist(), abs=1e-5)
        assert found.weights[1].first_token_uniform == pytest.approx(sum(1 / k for k in range(2, 21)) / 19)
        variance = maps.hidden_states[1].var(dim=-1, correction=0).mean(dim=0)
        assert found.hidden_variance[1] == pytest.approx(variance.tolist(), rel=1e-3)
    if kind == "mistral":
        assert found.weights[0].first_token_uniform == pytest.approx(sum(1 / k for k in range(2, 8)) / 6)
        assert max(found.weights[0].mean_distance) < 7


def test_sigmoid_models():
    model = tiny_swat(score_bias=-6.0, slopes="negative", initializer_range=0.02)
    found = diagnose(model, streams(2, 20))
    one = found.weights[0]
    assert one is not None
    assert one.score_function == "sigmoid"
    assert one.slopes == pytest.approx((-0.5, -0.25))
    # all weights are near sigmoid(-6)
    assert min(one.near_zero) > 0.99
    assert max(one.row_sum) < 0.02
    saturated = diagnose(tiny_swat(score_bias=9.0, initializer_range=0.02), streams(1, 20)).weights[0]
    assert saturated is not None
    assert min(saturated.near_one) > 0.9
    # unnormalised sums grow until the window is full
    norms = diagnose(tiny_swat(score_bias=9.0), streams(8, 20)).output_norm[0]
    assert norms[6] > norms[0]
    assert len(found.hidden_variance) == 3
    assert len(found.output_norm) == 2


def test_layers_without_weights(tmp_path: Path):
    found = diagnose(tiny_mamba2(), streams(1, 20))
    assert not found.has_weights
    assert found.output_norm[0][3] > 0
    pictures = plot_diagnosis(found, tmp_path)
    assert sorted(path.name for path in pictures) == ["output_norm.png", "variance.png"]
    mixed = diagnose(tiny_qwen3_next(), streams(1, 20))
    assert [one is None for one in mixed.weights] == [True, False]


def test_pictures_and_json(tmp_path: Path):
    for name, build in (("swat", tiny_swat), ("llama", tiny_llama)):
        found = diagnose(build(), streams(1, 20))
        (tmp_path / name).mkdir()
        for path in plot_diagnosis(found, tmp_path / name, title=name):
            assert path.read_bytes().startswith(b"\x89PNG")
        found.save(tmp_path / name / "diagnosis.json")
        values = json.loads((tmp_path / name / "diagnosis.json").read_text())
        assert len(values["weights"]) == 2
        assert len(values["hidden_variance"][2]) == 20
    assert (tmp_path / "swat" / "saturated.png").exists()
    assert (tmp_path / "llama" / "first_token.png").exists()


def test_bad_streams():
    with pytest.raises(ValueError, match="of equal length and at least 2 tokens"):
        diagnose(tiny_swat(), [np.arange(4), np.arange(5)])
    with pytest.raises(ValueError, match="no position beyond token 128"):
        diagnose(tiny_gpt2(), streams(1, 129))


def test_gates_are_counted():
    """The share of tokens that look back, and their share of attention, as the layer itself forms them."""
    plan = [{"kind": "taipan", "capacity": 0.3}, "mamba2", {"kind": "taipan", "execution": "sparse"}]
    model, seen = tiny_swat(layers=plan, num_hidden_layers=3), []
    for layer in (model.model.stack[0], model.model.stack[2]):
        torch.nn.init.normal_(layer.mixer.gate.out_proj.weight)
        layer.mixer.register_forward_hook(lambda _, __, output: seen.append(output[1]))
    found = diagnose(model, streams(2, 40))
    assert found.gates[1] is None
    assert [gate.capacity for gate in found.gates if gate is not None] == [0.3, 0.15]
    assert found.has_weights
    for index, (gate, norms) in enumerate(zip(found.gates, found.output_norm, strict=True)):
        if gate is None:
            continue
        shares = torch.cat(seen[(0 if index == 0 else 1) :: 2])
        assert 0.1 < gate.selected < 0.9
        assert gate.selected == pytest.approx((shares > 0).double().mean().item())
        assert gate.share == pytest.approx(shares[shares > 0].mean().item(), rel=1e-5)
        assert (np.array(norms) == 0).any() == bool((shares == 0).all(dim=0).any())
    cells = [list(column.cells) for column in diagnosis_table(found).columns]
    assert cells[-3] == [f"{100 * found.gates[0].selected:.1f} %", "-", f"{100 * found.gates[2].selected:.1f} %"]
