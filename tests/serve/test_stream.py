"""Streams: any way of feeding a prompt gives the same tokens, the state is constant, and goes on where it stopped."""

import pytest
import torch

from swat_lm import SwatConfig, SwatForCausalLM
from swat_lm.model.state import load_state, save_state
from swat_lm.serve.requests import RequestError
from swat_lm.serve.sampling import Sampling
from swat_lm.serve.stream import Stream


class Bytes:
    """A tokenizer of one byte a token."""

    def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        return bytes(token % 256 for token in tokens).decode(errors="replace")


def greedy(count: int | None) -> Sampling:
    return Sampling(temperature=0, max_tokens=count)


@pytest.fixture(scope="module")
def model() -> SwatForCausalLM:
    torch.manual_seed(0)
    config = SwatConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        sliding_window=8, initializer_range=0.3,
    )  # fmt: skip
    return SwatForCausalLM(config).eval()


def drawn(stream: Stream, sampling: Sampling) -> list[int]:
    return [event.choice.token for event in stream.write(sampling) if event.choice]


def continued(model: SwatForCausalLM, pieces: list[list[int]], count: int, chunk: int = 512) -> list[int]:
    stream = Stream(model, Bytes(), chunk=chunk)
    stream.read(pieces)
    return drawn(stream, greedy(count))


def test_pieces_and_chunks_change_nothing(model: SwatForCausalLM):
    prompt = torch.randint(0, 259, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = model.generate(
        torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, 60:].tolist()
    assert continued(model, [prompt], 20) == expected
    assert continued(model, [prompt[:1], [], prompt[1:31], prompt[31:]], 20) == expected
    assert continued(model, [prompt], 20, chunk=7) == expected


def test_state_stays_constant_over_many_windows(model: SwatForCausalLM):
    stream = Stream(model, Bytes())
    stream.read([[1, 2, 3]])
    sizes = {stream.state.num_bytes for _ in stream.write(greedy(100))}
    assert sizes == {model.init_state().num_bytes}
    # the last token has been given out, not read
    assert int(stream.state.position) == 3 + 99
    stream.close()
    assert int(stream.state.position) == 3 + 100


def test_ends(model: SwatForCausalLM):
    stream = Stream(model, Bytes())
    with pytest.raises(ValueError, match="stream: nothing to go on from; read a token"):
        drawn(stream, greedy(3))
    stream.read([[], []])
    assert stream.logits is None
    stream.read([[1]])
    assert stream.logits is not None
    assert drawn(stream, greedy(0)) == []
    first = int(stream.logits.argmax())
    stream = Stream(model, Bytes(), end_tokens=[first])
    stream.read([[1]])
    assert drawn(stream, greedy(None)) == [first]
    with pytest.raises(RequestError, match="tokens: expected ids from 0 to 258"):
        stream.read([[259]])


def test_a_stream_that_is_left_goes_on_bit_for_bit(model: SwatForCausalLM, tmp_path):
    sampling = Sampling(seed=5, max_tokens=12, logprobs=0)
    whole = Stream(model, Bytes())
    whole.read([[65, 66]])
    expected = [event.choice for event in whole.write(sampling)]
    left = Stream(model, Bytes())
    left.read([[65, 66]])
    text, found = "", []
    for event in left.write(sampling):
        found.append(event.choice)
        text += event.text
        if len(found) == 6:
            break
    text += left.stop()
    assert found == expected[:6]
    assert text == Bytes().decode([choice.token for choice in found if choice])
    left.close()
    save_state(left.state, tmp_path / "state")
    # read again, and not: the next draw's log-probability is the same number
    for state in (load_state(tmp_path / "state"), left.state):
        again = Stream(model, Bytes(), state)
        rest = [event.choice for event in again.write(Sampling(temperature=0, max_tokens=3, logprobs=0))]
        twin = Stream(model, Bytes(), load_state(tmp_path / "state"))
        assert twin.logits is not None
        token = int(twin.logits.argmax())
        assert rest[0] is not None
        assert (rest[0].token, rest[0].logprob) == (token, float(twin.logits.log_softmax(-1)[0, token]))
    # more may be read after what was drawn
    again.read([[70, 71]])
    assert int(again.state.position) == 2 + 6 + 3 + 2


def test_an_error_is_raised_as_it_was(model: SwatForCausalLM, monkeypatch: pytest.MonkeyPatch):
    stream = Stream(model, Bytes())
    stream.read([[1]])

    def broken(*arguments: object, **more: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(model, "decode_step", broken)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        drawn(stream, greedy(3))
