"""Sinks kept beside a window: against the definition written out, in any chunks, in constant memory."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from swat_lm.evaluate.curves import LengthCurve
from swat_lm.evaluate.diagnose import diagnose
from swat_lm.evaluate.length import loss_by_length, loss_on_same_text
from swat_lm.evaluate.reach import effective_reach
from swat_lm.evaluate.streaming_model import streaming_model
from swat_lm.evaluate.windows import kept_first_tokens, with_window
from swat_lm.model.configuration import SwatConfig
from swat_lm.model.modeling import SwatForCausalLM

SINKS, WINDOW = 3, 5
# two layers, keys and values, the window and the sinks, 16 channels of 4 bytes; the sinks' places and how much
# was read; and the position
STATE_BYTES = 2 * (2 * (WINDOW + SINKS) * 16 * 4 + 8 * (SINKS + 2)) + 8

SMALL = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def written_out(model: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """The definition with one query at a time: what is kept is laid out anew and rotated by its place there."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    body, size = model.model, model.config.head_dim
    hidden = body.embed_tokens(tokens)
    for layer in body.layers:
        normed, attention = layer.input_layernorm(hidden), layer.self_attn
        shape = (*normed.shape[:2], -1, size)
        query, key, value = (
            part(normed).view(shape) for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        rows = []
        for place in range(tokens.shape[1]):
            window = range(max(0, place - WINDOW + 1), place + 1)
            kept = [one for one in range(SINKS) if one < window[0]] + list(window)
            places = torch.arange(len(kept)).unsqueeze(0)
            cos, sin = body.rotary_emb(hidden, places)
            queries = query[:, [place] * len(kept)].transpose(1, 2)
            turned, keys = apply_rotary_pos_emb(queries, key[:, kept].transpose(1, 2), cos, sin)
            weights = (turned[:, :, -1:] @ keys.transpose(2, 3) / size**0.5).softmax(-1)
            rows.append((weights @ value[:, kept].transpose(1, 2)).transpose(1, 2).flatten(2))
        hidden = hidden + attention.o_proj(torch.cat(rows, dim=1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return body.norm(hidden)


@pytest.mark.parametrize("chunks", [(24,), (2, 1, 9, 12), (1,) * 24], ids=str)
def test_it_is_what_the_definition_says(model: LlamaForCausalLM, chunks: tuple[int, ...]):
    tokens = torch.randint(40, (2, 24))
    streaming = streaming_model(with_window(model, WINDOW, SINKS))
    state = streaming.start(2)
    found = torch.cat([streaming.extend(part, state) for part in tokens.split(chunks, dim=1)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(found, written_out(model, tokens), rtol=1e-4, atol=1e-5)
    assert streaming.state_bytes(state) == STATE_BYTES


def test_a_short_text_is_read_with_full_attention(model: LlamaForCausalLM):
    tokens = torch.randint(40, (2, 8))
    streaming = streaming_model(with_window(model, 8, SINKS))
    with torch.no_grad():
        whole = model.model(tokens).last_hidden_state
    torch.testing.assert_close(streaming.extend(tokens, streaming.start(2)), whole, rtol=1e-4, atol=1e-5)


def test_a_learned_sink_keeps_its_share():
    torch.manual_seed(0)
    config = SwatConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        score_function="softmax", slopes="none", sliding_window=None, learned_sink=True, initializer_range=0.3,
    )  # fmt: skip
    model = SwatForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.stack:
            layer.self_attn.sink.copy_(torch.tensor([0.5, 2.0]))
    for count in (2, 3):
        tokens = torch.randint(40, (count, 8))
        streaming = streaming_model(with_window(model, 8, SINKS))
        with torch.no_grad():
            whole = model.model(tokens).last_hidden_state
        torch.testing.assert_close(streaming.extend(tokens, streaming.start(count)), whole, rtol=1e-4, atol=1e-5)


def test_loss_by_length_is_measured_with_sinks(model: LlamaForCausalLM):
    documents = [torch.randint(40, (32,)).tolist() for _ in range(2)]
    plain = loss_on_same_text(model, documents, [8, 32], window=WINDOW)
    kept = loss_on_same_text(model, documents, [8, 32], window=WINDOW, num_sinks=SINKS)
    assert kept.at(32).mean_loss != pytest.approx(plain.at(32).mean_loss, rel=1e-4)
    assert kept.at(32).state_bytes == STATE_BYTES
    assert kept.window == WINDOW
    with pytest.raises(ValueError, match="sinks: 3 first tokens are kept beside a window, and no layer has one"):
        loss_on_same_text(model, documents, [8, 32], num_sinks=SINKS)


def test_streams_are_read_with_sinks(model: LlamaForCausalLM):
    documents = [torch.randint(40, (32,)).tolist() for _ in range(2)]
    streams = loss_by_length(model, documents, [8, 32], window=WINDOW, num_sinks=SINKS, chunk=7)
    same_text = loss_on_same_text(model, documents, [8, 32], window=WINDOW, num_sinks=SINKS)
    # at the greatest length both read the documents from their starts
    assert streams.at(32).mean_loss == pytest.approx(same_text.at(32).mean_loss, rel=1e-5)
    assert (streams.num_sinks, streams.window) == (SINKS, WINDOW)
    assert LengthCurve.from_json(streams.to_json()) == streams
    with pytest.raises(ValueError, match="sinks: 3 first tokens are kept beside a window, and no layer has one"):
        loss_by_length(model, documents, [8, 32], num_sinks=SINKS)


def test_any_attention_of_ours_may_keep_them(model: LlamaForCausalLM):
    sigmoid = SwatForCausalLM(
        SwatConfig(**SMALL, sliding_window=4, layers=[{"kind": "mamba2", "ssm_head_dim": 16}, "attention"])
    )
    twin = with_window(sigmoid, "keep", 2)
    assert [getattr(entry.settings, "sinks", None) for entry in twin.config.plan()] == [None, 2]
    # a window in each layer: sinks stay, and go with the window
    assert kept_first_tokens(with_window(twin, 8).config) == 2
    assert kept_first_tokens(with_window(twin, None).config) == 0
    assert kept_first_tokens(with_window(twin, 8, 0).config) == 0
    assert with_window(model, 8, 4).config.sinks == 4
    flat = SwatForCausalLM(SwatConfig(**SMALL, sliding_window=4, sinks=3))
    assert [with_window(flat, window).config.sinks for window in ("keep", 6, None)] == [3, 3, 0]
    with pytest.raises(ValueError, match="no layer has one; give a window"):
        with_window(flat, None, 2)
    with pytest.raises(ValueError, match="expected a number of first tokens"):
        loss_by_length(model, [[1, 2, 3, 4]], [4], window=2, num_sinks=-1)


def test_a_changed_model_can_be_saved_and_its_first_tokens_are_the_same_everywhere(tmp_path):
    layers = ["attention", {"kind": "attention", "sliding_window": None}]
    model = SwatForCausalLM(SwatConfig(**SMALL, sliding_window=4, sinks=2, layers=layers))
    for window, sinks, expected in ((None, None, [0, 0]), ("keep", 0, [0, 0]), (6, None, [2, 2]), (6, 1, [1, 1])):
        twin = with_window(model, window, sinks)
        assert [entry.settings.sinks for entry in twin.config.plan()] == expected
        twin.save_pretrained(tmp_path / f"{window}-{sinks}")
        again = SwatForCausalLM.from_pretrained(tmp_path / f"{window}-{sinks}")
        assert [entry.settings.sinks for entry in again.config.plan()] == expected


def test_what_attention_does_and_how_far_it_reaches_count_them():
    torch.manual_seed(0)
    config = {**SMALL, "score_function": "softmax", "slopes": "none", "initializer_range": 0.3}
    model = SwatForCausalLM(SwatConfig(**config, sliding_window=4, sinks=2))
    streams = [torch.randint(40, (30,)).numpy() for _ in range(2)]
    for layer in diagnose(model, streams).weights:
        assert layer is not None
        assert layer.row_sum == pytest.approx([1, 1], abs=1e-5)
        assert min(layer.first_token_mass) > 0.02
    found = effective_reach(model, streams)
    # the first two of 29 tokens, and nothing between them and the window's reach of 7
    assert found.share[found.first.index(16)] > 1e-3
    assert found.share[found.first.index(8)] == 0
