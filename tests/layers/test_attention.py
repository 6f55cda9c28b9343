"""Options of windowed attention, each by the behaviour it causes; the state it states is the state it keeps."""

import math

import pytest
import torch

from swat_lm.layers import LAYERS, AttentionLayer, AttentionSettings, WindowAttention
from swat_lm.layers.base import StateTensor
from swat_lm.layers.both_ways import attend_both_ways
from swat_lm.layers.chunk import Chunk
from swat_lm.layers.rotary import RotaryFrequencies
from swat_lm.model.inputs import plan_chunk
from swat_lm.model.pasts import CarryPast
from swat_lm.model.slots import Slots
from swat_lm.ops.rotary import half_angles, inverse_frequencies, rotary_angles, rotate_paired

SHAPE = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 5}


def attention(**changes) -> WindowAttention:
    torch.manual_seed(0)
    rotary = RotaryFrequencies(inverse_frequencies(8, 1e4), 1.0, "default") if changes.pop("rotary", False) else None
    norm_eps = changes.pop("norm_eps", 1e-6)
    mixer = WindowAttention(AttentionSettings(**{**SHAPE, **changes}), 16, rotary, norm_eps=norm_eps)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixer.double()


def hidden(num_tokens: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, num_tokens, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def mix(mixer: WindowAttention, x: torch.Tensor) -> torch.Tensor:
    return mixer(x, Chunk(torch.arange(x.shape[1])[None])).hidden


def test_the_table_names_the_layer():
    assert LAYERS["attention"] is AttentionLayer
    assert AttentionLayer.layer_type(AttentionLayer.Settings(sliding_window=None)) == "full_attention"
    assert AttentionLayer.layer_type(AttentionLayer.Settings(sliding_window=7)) == "sliding_attention"


def test_window_limits_what_is_seen():
    mixer, x = attention(), hidden(12).requires_grad_()
    mix(mixer, x)[0, -1].sum().backward()
    assert (x.grad[0].abs().sum(-1) > 0).tolist() == [False] * 7 + [True] * 5


def test_negative_slopes_favour_recent_keys_and_positive_slopes_old_ones():
    shares = {}
    for kind in ("negative", "none", "positive"):
        mixer = attention(slopes=kind, sliding_window=None)
        # equal products for all keys, so that only the distance decides
        torch.nn.init.zeros_(mixer.q_proj.weight)
        weights = []
        for place in range(8):
            x = torch.zeros(1, 8, 16, dtype=torch.float64)
            x[0, place] = 1.0
            weights.append(mix(mixer, x)[0, -1].norm())
        shares[kind] = weights[-1] / weights[0]
    assert shares["negative"] > 1.5 > 1.01 > shares["none"] > 0.99 > 0.7 > shares["positive"]


def test_score_bias_keeps_sigmoid_sums_near_one():
    # scores of zero: every key weighs sigmoid(bias), and -log(window) makes the sum over a full window about 1
    window = 64
    outputs = {}
    for bias in (0.0, -math.log(window)):
        mixer = attention(sliding_window=window, slopes="none", score_bias=bias)
        torch.nn.init.zeros_(mixer.q_proj.weight)
        x = hidden(1).expand(-1, window, -1)
        value = mixer.o_proj(mixer.v_proj(x[:, -1]).repeat(1, 2))
        outputs[bias] = (mix(mixer, x)[:, -1] / value).mean().item()
    assert outputs[0.0] == pytest.approx(window / 2)
    assert outputs[-math.log(window)] == pytest.approx(window / (1 + window))


def test_qk_norm_makes_scores_blind_to_the_size_of_the_input():
    x = hidden(9)
    with_norm, without = attention(qk_norm=True, norm_eps=0.0), attention()
    for mixer, blind in ((with_norm, True), (without, False)):
        torch.nn.init.zeros_(mixer.v_proj.weight)
        mixer.v_proj.weight.data[0, 0] = 1.0
        scaled = x.clone()
        scaled[..., 1:] *= 3.0
        scaled[..., 0] = x[..., 0]
        # the first channel carries the value and is hidden from queries and keys
        for projection in (mixer.q_proj, mixer.k_proj):
            projection.weight.data[:, 0] = 0.0
        same = torch.allclose(mix(mixer, scaled), mix(mixer, x), rtol=1e-9)
        assert same == blind


def test_output_norm_fixes_the_size_of_every_head():
    mixer = attention(output_norm=True, norm_eps=0.0)
    mixer.o_proj.weight.data.copy_(torch.eye(16))
    torch.nn.init.ones_(mixer.output_norm.weight)
    heads = mix(mixer, 1e-3 * hidden(9)).unflatten(-1, (2, 8))
    torch.testing.assert_close(heads.square().mean(-1), torch.ones(2, 9, 2, dtype=torch.float64))


def test_learned_sink_takes_weight_away():
    mixer, plain = (attention(score_function="softmax", slopes="none", learned_sink=sink) for sink in (True, False))
    plain.load_state_dict(mixer.state_dict(), strict=False)
    x = hidden(9)
    mixer.sink.data.fill_(-1e9)
    torch.testing.assert_close(mix(mixer, x), mix(plain, x))
    mixer.sink.data.fill_(1e9)
    assert not mix(mixer, x).any()
    # one more key of that score and of value zero: the only key at the first place keeps 1 / (1 + e^(0.3 - score))
    mixer.sink.data.fill_(0.3)
    query = mixer.q_proj(x)[:, 0].unflatten(-1, (2, 8))
    score = (query * mixer.k_proj(x)[:, 0].unsqueeze(1)).sum(-1) / 8**0.5
    kept = (1 / (1 + torch.exp(0.3 - score))).repeat_interleave(8, dim=-1)
    expected = mixer.o_proj(mixer.v_proj(x)[:, 0].repeat(1, 2) * kept)
    torch.testing.assert_close(mix(mixer, x)[:, 0], expected)
    mix(mixer, x).sum().backward()
    assert mixer.sink.grad.abs().min() > 0


def test_what_is_learned_per_head_starts_as_the_settings_say():
    settings = AttentionSettings(
        **SHAPE, learned_slopes=True, learned_score_bias=True, score_bias="-log(window)", slope_schedule="window"
    )
    mixer = WindowAttention(settings, 16)
    torch.testing.assert_close(mixer.slopes.detach(), torch.tensor([-64 / 5, 64 / 5]))
    torch.testing.assert_close(mixer.score_bias.detach(), torch.full((2,), -math.log(5)))


def test_learned_slopes_and_biases_are_those_of_the_operator_with_gradients():
    learned = {"learned_slopes": True, "learned_score_bias": True}
    mixer, plain = attention(**learned), attention()
    plain.load_state_dict(mixer.state_dict(), strict=False)
    mixer.slopes.data.copy_(plain._slopes)
    mixer.score_bias.data.fill_(0.0)
    x = hidden(12)
    assert torch.equal(mix(mixer, x), mix(plain, x))
    mix(mixer, x).square().sum().backward()
    for parameter in (mixer.slopes, mixer.score_bias):
        before = parameter.data.clone()
        for head in range(2):
            sums = []
            for step in (1e-5, -1e-5):
                parameter.data[head] = before[head] + step
                sums.append(mix(mixer, x).square().sum().item())
            parameter.data.copy_(before)
            assert parameter.grad[head].item() == pytest.approx((sums[0] - sums[1]) / 2e-5, rel=1e-6)


def test_a_gate_closes_heads():
    mixer, plain = attention(output_gate=True), attention()
    plain.load_state_dict(mixer.state_dict(), strict=False)
    x = hidden(7)
    mixer.gate_proj.weight.data.zero_()
    torch.testing.assert_close(mix(mixer, x), mix(plain, x) / 2)
    mixer.gate_proj.weight.data[1] = 1.0
    gate = torch.sigmoid(x.sum(-1, keepdim=True))
    heads = plain.heads_output(plain.mix(*plain.project(x), Chunk(torch.arange(7)[None]), None))
    expected = torch.cat([heads[..., :8] / 2, heads[..., 8:] * gate], dim=-1)
    torch.testing.assert_close(mix(mixer, x), mixer.o_proj(expected))


def test_state_spec_is_the_state():
    kept = [StateTensor(name, (1, 8), "window", 5) for name in ("key", "value")]
    assert attention(sliding_window=5).state_spec() == tuple(kept)
    assert kept[0].num_elements() == 40
    growing = attention(sliding_window=None).state_spec()[0]
    assert (growing.shape, growing.kind) == ((1, 8), "growing")
    assert growing.num_elements(10) == 80
    with pytest.raises(ValueError, match="grows with the sequence"):
        growing.num_elements()


@pytest.mark.parametrize("changes", [{}, {"score_function": "softmax", "learned_sink": True}, {"output_norm": True}])
def test_slots_and_carries_continue_one_pass(changes):
    mixer, x = attention(rotary=True, **changes), hidden(14)
    whole = mix(mixer, x)
    carry = CarryPast({one.name: one for one in mixer.state_spec()})
    slots = Slots([mixer.state_spec()], 2, torch.float64, "cpu")
    start = 0
    for length in (3, 1, 6, 1, 1, 2):
        part, chunk = x[:, start : start + length], Chunk(torch.arange(start, start + length)[None])
        mixed, carry, _ = mixer(part, chunk, carry)
        torch.testing.assert_close(mixed, whole[:, start : start + length])
        rows = slots.rows(length)
        with torch.no_grad():
            mixed = mixer(part, chunk, slots.pasts(rows)[0]).hidden
        slots.advance(rows)
        torch.testing.assert_close(mixed, whole[:, start : start + length])
        start += length
    assert [tensor.shape[1] for tensor in carry.tensors()] == [4, 4]


def test_backends_agree():
    x = hidden(11)
    torch.testing.assert_close(
        mix(attention(attention_backend="reference"), x), mix(attention(attention_backend="blocked"), x)
    )


def test_a_step_rotates_alike_before_the_operator_and_in_it():
    """On a GPU the kernel rotates, with halves of the angles that other devices use whole."""
    mixer, position = attention(), torch.tensor([3, 11])
    cos, sin = (x[:, :, None].repeat(1, 1, 1, 2) for x in rotary_angles(position[:, None], 8, dtype=torch.float64))
    whole = cos, torch.cat((-sin[..., :4], sin[..., 4:]), dim=-1)
    query, key, value = (torch.randn(2, 1, heads, 8, dtype=torch.float64) for heads in (2, 1, 1))
    outputs = []
    for in_operator in (False, True):
        slots = Slots([mixer.state_spec()], 2, torch.float64, "cpu")
        slots.position.copy_(position)
        for kept in slots.layers[0].values():
            kept.fill_(1.0)
        past = slots.step_pasts()[0]
        with torch.no_grad():
            if in_operator:
                mixed = mixer.attend_step(query, key, value, past, half_angles(*whole))
            else:
                rotated = rotate_paired(query, *whole), rotate_paired(key, *whole)
                mixed = mixer.attend_step(*rotated, value, past)
        outputs.append((mixed, *slots.layers[0].values()))
    for ours, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_all_weights_sum_to_is_as_exact_in_packed_rows_both_ways():
    """The logarithm that a sink's share follows from has the precision of scores in a narrow model too."""
    made = attention(bidirectional=True, score_function="softmax", slopes="none", learned_sink=True).bfloat16()
    row, documents = hidden(24, 1).bfloat16(), torch.tensor([[0] * 20 + [1] * 4])
    with torch.no_grad():
        alone = attend_both_ways(made, *made.project(row[:, :20]), Chunk(torch.arange(20)[None]))[1]
        chunk = plan_chunk(1, 24, 0, row.device, document_ids=documents)
        packed = attend_both_ways(made, *made.project(row), chunk)[1]
    assert packed.dtype == alone.dtype == torch.float32
    assert torch.allclose(packed[:, :20], alone, atol=1e-5)
