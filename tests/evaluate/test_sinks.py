"""Sinks kept beside a window: against the definition written out, in any chunks, in constant memory."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from swat_lm.evaluate.curves import LengthCurve
from swat_lm.evaluate.length import loss_by_length, loss_on_same_text
from swat_lm.evaluate.sinks import SinkStreamingModel
from swat_lm.model.configuration import SwatConfig
from swat_lm.model.modeling import SwatForCausalLM

SINKS, WINDOW = 3, 5


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
    streaming = SinkStreamingModel(model, SINKS, WINDOW)
    state = streaming.start(2)
    found = torch.cat([streaming.extend(part, state) for part in tokens.split(chunks, dim=1)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(found, written_out(model, tokens), rtol=1e-4, atol=1e-5)
    # two layers, keys and values, the window and the sinks, 16 channels of 4 bytes, and the position
    assert streaming.state_bytes(state) == 2 * 2 * (WINDOW + SINKS) * 16 * 4 + 8


def test_a_short_text_is_read_with_full_attention(model: LlamaForCausalLM):
    tokens = torch.randint(40, (2, 8))
    streaming = SinkStreamingModel(model, SINKS, 8)
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
        streaming = SinkStreamingModel(model, SINKS, 8)
        with torch.no_grad():
            whole = model.model(tokens).last_hidden_state
        torch.testing.assert_close(streaming.extend(tokens, streaming.start(count)), whole, rtol=1e-4, atol=1e-5)


def test_loss_by_length_is_measured_with_sinks(model: LlamaForCausalLM):
    documents = [torch.randint(40, (32,)).tolist() for _ in range(2)]
    plain = loss_on_same_text(model, documents, [8, 32], window=WINDOW)
    kept = loss_on_same_text(model, documents, [8, 32], window=WINDOW, num_sinks=SINKS)
    assert kept.at(32).mean_loss != pytest.approx(plain.at(32).mean_loss, rel=1e-4)
    assert kept.at(32).state_bytes == 2 * 2 * (WINDOW + SINKS) * 16 * 4 + 8
    assert kept.window == WINDOW
    with pytest.raises(ValueError, match="num_sinks: sinks are kept beside a window"):
        loss_on_same_text(model, documents, [8, 32], num_sinks=SINKS)


def test_streams_are_read_with_sinks(model: LlamaForCausalLM):
    documents = [torch.randint(40, (32,)).tolist() for _ in range(2)]
    streams = loss_by_length(model, documents, [8, 32], window=WINDOW, num_sinks=SINKS, chunk=7)
    same_text = loss_on_same_text(model, documents, [8, 32], window=WINDOW, num_sinks=SINKS)
    # at the greatest length both read the documents from their starts
    assert streams.at(32).mean_loss == pytest.approx(same_text.at(32).mean_loss, rel=1e-5)
    assert (streams.num_sinks, streams.window) == (SINKS, WINDOW)
    assert LengthCurve.from_json(streams.to_json()) == streams
    with pytest.raises(ValueError, match="num_sinks: sinks are kept beside a window"):
        loss_by_length(model, documents, [8, 32], num_sinks=SINKS)


def test_other_models_are_refused(model: LlamaForCausalLM):
    sigmoid = SwatForCausalLM(
        SwatConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(ValueError, match="softmax attention without slopes only"):
        SinkStreamingModel(sigmoid, 2, 4)
    with pytest.raises(ValueError, match="at least 1 sink"):
        SinkStreamingModel(model, 0, 4)
