"""Streams of any causal model: a position's loss is the same whatever chunks computed it, or the model is refused."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from swat_lm.evaluate.streaming_model import CachedStreamingModel, SwatStreamingModel, streaming_model

from .models import STREAMABLE, VOCABULARY, tiny_gemma2, tiny_gpt2, tiny_llama, tiny_mamba, tiny_mistral, tiny_swat


def random_tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(3))


def read_losses(streaming, tokens: torch.Tensor, chunk: int) -> torch.Tensor:
    state, losses = streaming.start(len(tokens)), []
    for start in range(0, tokens.shape[1], chunk):
        hidden = streaming.extend(tokens[:, start : start + chunk], state)
        losses.append(streaming.losses(hidden, tokens[:, start + 1 : start + chunk + 1]))
    return torch.cat(losses, dim=1)


@pytest.mark.parametrize("kind", STREAMABLE)
def test_losses_do_not_depend_on_the_chunks(kind: str):
    model, tokens = STREAMABLE[kind](), random_tokens(2, 40)
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits
    whole = cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(2, 39)
    streaming = streaming_model(model)
    for chunk in (1, 7, 16, 1000):
        torch.testing.assert_close(read_losses(streaming, tokens, chunk), whole, atol=2e-4, rtol=2e-4)
    hits = streaming.hits(streaming.extend(tokens, streaming.start(2)), tokens[:, 1:])
    assert torch.equal(hits, logits[:, :-1].argmax(-1) == tokens[:, 1:])


@pytest.mark.parametrize("kind", STREAMABLE)
def test_bfloat16(kind: str):
    model, tokens = STREAMABLE[kind]().to(torch.bfloat16), random_tokens(1, 30)
    streaming = streaming_model(model)
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits.float()
    whole = cross_entropy(logits[0, :-1], tokens[0, 1:])
    assert read_losses(streaming, tokens, 11).mean().item() == pytest.approx(whole.item(), rel=0.05)


def test_kinds_of_readers():
    assert isinstance(streaming_model(tiny_swat()), SwatStreamingModel)
    assert isinstance(streaming_model(tiny_llama()), CachedStreamingModel)
    assert streaming_model(tiny_llama()).head is not None
    # its logits are capped after the head
    assert streaming_model(tiny_gemma2()).head is None


@pytest.mark.parametrize("build", [tiny_llama, tiny_mistral, tiny_swat])
def test_state_bytes(build):
    streaming = streaming_model(build())
    state = streaming.start(3)
    counts = []
    for _ in range(4):
        streaming.extend(random_tokens(3, 10), state)
        counts.append(streaming.state_bytes(state))
    if build is tiny_llama:
        # keys and values of two layers, one head of 16, fp32
        assert counts == [2 * 2 * 16 * 4 * tokens for tokens in (10, 20, 30, 40)]
    elif build is tiny_mistral:
        assert counts == [2 * 2 * 16 * 4 * 6] * 4
    else:
        assert len(set(counts)) == 1


def test_a_model_that_forgets_between_chunks_is_refused():
    streaming = streaming_model(tiny_mamba())
    with pytest.raises(ValueError, match="MambaForCausalLM gives other results in chunks than in one pass"):
        streaming.start(1)


def test_training_mode_is_left_alone():
    model = tiny_gpt2(resid_pdrop=0.5)
    model.train()
    streaming = streaming_model(model)
    streaming.start(1)
    assert model.training


def test_bad_batches():
    streaming = streaming_model(tiny_llama())
    with pytest.raises(ValueError, match="batch_size: expected at least 1"):
        streaming.start(0)
    with pytest.raises(ValueError, match="expected 2 streams, got 3"):
        streaming.extend(random_tokens(3, 4), streaming.start(2))
