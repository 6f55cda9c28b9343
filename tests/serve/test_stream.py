"""Streams: any way of feeding a prompt gives the same tokens, and the state is constant."""

import pytest
import torch

from swat_lm import SwatConfig, SwatForCausalLM
from swat_lm.serve.sampling import Sampling
from swat_lm.serve.stream import generate_tokens, read_prompt

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def model() -> SwatForCausalLM:
    torch.manual_seed(0)
    config = SwatConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        sliding_window=8, initializer_range=0.3,
    )  # fmt: skip
    return SwatForCausalLM(config).eval()


def continued(model: SwatForCausalLM, pieces: list[list[int]], count: int, chunk: int = 512) -> list[int]:
    state = model.init_state()
    logits = read_prompt(model, pieces, state, chunk)
    assert logits is not None
    return list(generate_tokens(model, logits, state, GREEDY, count))


def test_pieces_and_chunks_change_nothing(model: SwatForCausalLM):
    prompt = torch.randint(0, 259, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = model.generate(
        torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, 60:].tolist()
    assert continued(model, [prompt], 20) == expected
    assert continued(model, [prompt[:1], [], prompt[1:31], prompt[31:]], 20) == expected
    assert continued(model, [prompt], 20, chunk=7) == expected


def test_state_stays_constant_over_many_windows(model: SwatForCausalLM):
    state = model.init_state()
    logits = read_prompt(model, [[1, 2, 3]], state)
    assert logits is not None
    sizes = {state.num_bytes for _ in generate_tokens(model, logits, state, GREEDY, 100)}
    assert sizes == {model.init_state().num_bytes}
    # the last token has been given out, not read
    assert int(state.position) == 3 + 99


def test_ends(model: SwatForCausalLM):
    state = model.init_state()
    logits = read_prompt(model, [[1]], state)
    assert logits is not None
    assert list(generate_tokens(model, logits, state, GREEDY, 0)) == []
    first = int(logits.argmax())
    assert list(generate_tokens(model, logits, state, GREEDY, None, stop=[first])) == [first]
    assert read_prompt(model, [[], []], state) is None
