"""The sampler draws what it says and only that; a row's draws are its own, and go on where they stopped."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import TopPLogitsWarper

from swat_lm.serve.sampler import Choice, SamplingError, StreamSampler, TopP, choose, token_logprobs, uniform
from swat_lm.serve.sampling import Sampling

LOGITS = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
V = 97


def shares(sampling: Sampling, count: int = 1500) -> list[float]:
    """How often each token is drawn."""
    sampler = StreamSampler(replace(sampling, seed=0))
    drawn = torch.tensor([sampler.next_token(LOGITS) for _ in range(count)])
    return (torch.bincount(drawn, minlength=4) / count).tolist()


def random_logits(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 3


def run(sampler: StreamSampler, logits: Tensor) -> list[int]:
    """Tokens chosen from rows of logits, one after another."""
    return [sampler.next_token(row) for row in logits]


def test_temperature():
    assert shares(Sampling(temperature=0), count=9) == [1, 0, 0, 0]
    # so low that dividing by it would leave float32
    assert shares(Sampling(temperature=1e-45), count=9) == [1, 0, 0, 0]
    assert shares(Sampling()) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.04)
    squared = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    assert shares(Sampling(temperature=0.5)) == pytest.approx((squared / squared.sum()).tolist(), abs=0.04)


def test_narrowing():
    assert shares(Sampling(top_k=2)) == pytest.approx([0.625, 0.375, 0, 0], abs=0.04)
    assert shares(Sampling(top_k=9)) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.04)
    # 0.5 does not reach 0.6, 0.5 + 0.3 does
    assert shares(Sampling(top_p=0.6)) == pytest.approx([0.625, 0.375, 0, 0], abs=0.04)
    assert shares(Sampling(top_p=0.01), count=9) == [1, 0, 0, 0]
    # 0.15 is 0.3 of 0.5, 0.05 is 0.1 of it
    assert shares(Sampling(min_p=0.2)) == pytest.approx([10 / 19, 6 / 19, 3 / 19, 0], abs=0.04)
    assert shares(Sampling(vocab_size=1), count=9) == [1, 0, 0, 0]
    assert StreamSampler(Sampling(0, vocab_size=2)).next_token(torch.tensor([0.0, 1.0, 9.0])) == 1


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
def test_top_p_is_the_librarys(spread: float):
    # flat ones need more than the first tokens that are looked at
    logits = torch.randn(1, 3000, generator=torch.Generator().manual_seed(1)) * spread
    for top_p in (0.1, 0.5, 0.9, 0.99):
        assert torch.equal(TopP(top_p)(None, logits), TopPLogitsWarper(top_p)(None, logits))


def test_draws_follow_from_seed_sample_and_step():
    # as numbers, so that a journal is replayed anywhere
    assert uniform(0, 0, 0) == 0.156742553465558
    assert uniform(-1, 3, 2**40) == 0.9868014622064605
    same = [run(StreamSampler(Sampling(seed=3)), random_logits(50)) for _ in range(2)]
    assert same[0] == same[1]
    others = [
        run(StreamSampler(sampling, sample), random_logits(50))
        for sampling, sample in [(Sampling(seed=4), 0), (Sampling(seed=3), 1), (Sampling(), 0), (Sampling(), 0)]
    ]
    assert len({tuple(tokens) for tokens in [same[0], *others]}) == 5


def test_a_row_alone_is_a_row_among_31_others():
    options = [
        Sampling(0.0), Sampling(0.0, logprobs=2), Sampling(seed=1), Sampling(0.7, 5, 0.9, seed=2, logprobs=3),
        Sampling(1.2, None, 0.8, V - 7, seed=3), Sampling(min_p=0.1, seed=4), Sampling(0.0, vocab_size=V - 9),
        Sampling(0.9, presence_penalty=1, frequency_penalty=0.5, repetition_penalty=1.3, seed=5, logprobs=0),
        Sampling(0.0, frequency_penalty=2), Sampling(seed=6, logit_bias={1: 20, 2: -20}),
    ]  # fmt: skip
    mates = [StreamSampler(options[row % len(options)], row // len(options)) for row in range(32)]
    alone = [StreamSampler(options[row % len(options)], row // len(options)) for row in range(32)]
    for step in range(12):
        logits = random_logits(32, step).bfloat16() if step % 2 else random_logits(32, step)
        together = choose(mates, logits)
        order = [31, *range(31)]
        apart = [choose([alone[row]], logits[row : row + 1])[0] for row in order]
        assert [together[row] for row in order] == apart


def test_state_goes_on_where_it_stopped():
    sampling = Sampling(0.9, top_k=20, presence_penalty=1, frequency_penalty=0.5, repetition_penalty=1.3)
    sampler = StreamSampler(sampling, 2)
    sampler.read([1, 2, 2, 3])
    run(sampler, random_logits(30))
    state = json.loads(json.dumps(sampler.state()))
    rest = run(sampler, random_logits(30, 1))
    assert run(StreamSampler.restored(sampling, state), random_logits(30, 1)) == rest
    # what is kept is bounded by the vocabulary, and without penalties nothing is
    assert len(state["counts"]) <= 30
    plain = StreamSampler(Sampling(seed=1))
    plain.read([1, 2])
    run(plain, random_logits(30))
    assert plain.state() == {"seed": 1, "sample": 0, "step": 30, "counts": [], "seen": []}
    # a reply read back from a journal leaves the same
    replayed = StreamSampler(Sampling(seed=1))
    for _ in range(30):
        replayed.accept(5)
    assert replayed.state() == plain.state()


def test_penalties_and_bias():
    logits = torch.tensor([2.0, 1.5, -1.0, -1.5])
    # of OpenAI's documentation: count * frequency + presence, of the reply alone
    sampler = StreamSampler(Sampling(0.0, frequency_penalty=0.2, presence_penalty=0.25))
    sampler.read([0, 0, 0])
    assert run(sampler, logits.expand(6, -1)) == [0, 0, 1, 0, 0, 1]
    # the prompt's tokens count for this one
    sampler = StreamSampler(Sampling(0.0, repetition_penalty=2.0))
    assert run(sampler, logits.expand(2, -1)) == [0, 1]
    sampler = StreamSampler(Sampling(0.0, repetition_penalty=2.0))
    sampler.read([0, 1])
    assert torch.equal(sampler._adjusted(logits), torch.tensor([[1.0, 0.75, -1.0, -1.5]]))
    assert StreamSampler(Sampling(0.0, logit_bias={3: 5})).next_token(logits) == 3
    assert StreamSampler(Sampling(0.0, logit_bias={0: -100, 1: -100})).next_token(logits) == 2
    assert logits.tolist() == [2.0, 1.5, -1.0, -1.5]
    with pytest.raises(SamplingError, match=r"logit_bias: expected token ids below 4"):
        StreamSampler(Sampling(logit_bias={4: 1})).next_token(logits)


def test_logprobs_are_the_models_own():
    logits = random_logits(3)
    spread = logits.log_softmax(-1)
    options = Sampling(0.0, logprobs=4, logit_bias={7: 100}, frequency_penalty=1)
    first, second, third = choose(
        [StreamSampler(options), StreamSampler(Sampling(0.0)), StreamSampler(options)], logits
    )
    assert isinstance(first, Choice)
    assert isinstance(third, Choice)
    assert (first.token, first.logprob) == (7, float(spread[0, 7]))
    best = logits[2].topk(4).indices.tolist()
    assert third.top == tuple((token, float(spread[2, token])) for token in best)
    assert second == Choice(int(logits[1].argmax()))
    assert token_logprobs(logits, [0, 1, 2], 0) == [Choice(row, float(spread[row, row])) for row in range(3)]
    # those that are never drawn are no alternatives, but have their share
    (padded,) = token_logprobs(torch.tensor([[0.0, 0.0, 0.0, 0.0]]), [1], 20, vocab_size=2)
    assert padded.top == ((0, pytest.approx(-math.log(4))), (1, pytest.approx(-math.log(4))))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_without_numbers_fails_alone(bad: float):
    logits = random_logits(4)
    logits[1:] = bad
    options = [Sampling(0.0), Sampling(0.0), Sampling(seed=1), Sampling(top_p=0.5, top_k=3, seed=1, logprobs=1)]
    good, *others = choose([StreamSampler(one) for one in options], logits)
    assert good == Choice(int(logits[0].argmax()))
    assert all(isinstance(one, SamplingError) and "not finite" in str(one) for one in others)
    with pytest.raises(SamplingError):
        StreamSampler(Sampling()).next_token(logits[1])


def test_a_constraint_that_raises_fails_alone():
    class Broken:
        finished = False

        def allowed(self, size: int) -> Tensor:
            raise IndexError("gone")

        def accept(self, token: int) -> None: ...

        def copy(self) -> "Broken":
            return self

    first, second = choose(
        [StreamSampler(Sampling(0.0)), StreamSampler(Sampling(), constraint=Broken())], LOGITS.expand(2, -1)
    )
    assert first == Choice(0)
    assert isinstance(second, SamplingError)
    assert (str(second), type(second.__cause__)) == ("IndexError: gone", IndexError)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"logits: expected \[1, V\], a row per sampler, got \[2, 97\]"):
        choose([StreamSampler(Sampling())], random_logits(2))
