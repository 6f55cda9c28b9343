"""Prompts read in one call: each as alone, to the bit where total and place are the same; scores and embeddings."""

import pytest
import torch
from torch import Tensor

from swat_lm import SwatForCausalLM
from swat_lm.model.packing import Reading, extend_packed
from swat_lm.serve.generation import Fed, Generation
from swat_lm.serve.requests import RequestError
from swat_lm.serve.sampling import Sampling
from tests.serve.test_engine import PLANS, VOCABULARY, alone, built, engine_of, run, tokens_of

READ = Sampling(max_tokens=0)


def some(count: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def held(model: SwatForCausalLM, calls: list[tuple]) -> tuple[Tensor, dict[str, Tensor]]:
    """What slot 1 gives with the last of some packed calls, and what it holds then."""
    state = model.init_state(4, capacity=60)
    state.ragged = True
    found = None
    for readings, *where in calls:
        found = extend_packed(model, readings, state, *where)[[one.slot for one in readings].index(1)]
    assert found is not None
    return found, state.snapshot(torch.tensor([1]))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_place_in_a_row_of_one_length_gives_the_same_bits(plan: str, dtype: torch.dtype):
    model = built(plan).to(dtype)
    if dtype == torch.float32:
        model.arrange_for_decoding()
    mine, more = some(7, 1), some(5, 2)
    # the same row of 14 tokens, then of 16: with two and one beside it, with others of other lengths, and with none
    courses = [
        *([([Reading(some(3, seed), 0, 0), Reading(mine, 1, 0), Reading(some(4, seed + 1), 2, 0)],),
           ([Reading(some(2, seed), 0, 3), Reading(more, 1, 7), Reading(some(9, seed), 3, 0)],)]
          for seed in (10, 20)),
        [([Reading(some(4, 5), 2, 0), Reading(mine, 1, 0)], (10, 3), 14),
         ([Reading(more, 1, 7), Reading(some(1, 5), 0, 0), Reading(some(1, 6), 3, 0)], (2, 0, 1), 16)],
        [([Reading(mine, 1, 0)], (3,), 14), ([Reading(more, 1, 7)], (2,), 16)],
    ]  # fmt: skip
    (hidden, kept), *others = [held(model, calls) for calls in courses]
    for other, other_kept in others:
        assert torch.equal(other, hidden)
        assert all(torch.equal(other_kept[name], kept[name]) for name in kept)
    # by itself it is a call of its own, and differs by rounding
    state = model.init_state(4, capacity=60)
    slot = torch.tensor([1])
    model.extend(torch.tensor([mine]), state, slot=slot, num_past=0)
    own = model.extend(torch.tensor([more]), state, slot=slot, num_past=7)[0]
    lone, lone_kept = held(model, [([Reading(mine, 1, 0)],), ([Reading(more, 1, 7)],)])
    assert torch.equal(lone, own)
    assert all(torch.equal(lone_kept[name], value) for name, value in state.snapshot(slot).items())
    assert (hidden - own).abs().max() <= (1e-5 if dtype == torch.float32 else 0.1) * own.abs().max()


def test_the_engine_says_where_pieces_lay():
    model = built("recurrence")
    engine, texts = engine_of(model, budget=40), [some(count, count) for count in (10, 5, 3)]
    for key, text in enumerate(texts):
        engine.submit(Generation(key, text, READ, keep=True))
    fed = {event.key: event.fed for event in run(engine)}
    assert fed[0] == (Fed("piece", 15, 0, 7), Fed("piece", 3, 0, 3))
    assert fed[1] == (Fed("piece", 15, 7, 5),)
    assert fed[2] == (Fed("piece", 15, 12, 3),)
    # so that each can be read again by itself
    state = engine.slots
    kept = state.snapshot(torch.tensor([1]))
    state.reset(torch.tensor([1]))
    extend_packed(model, [Reading(texts[1], 1, 0)], state, [7], 15)
    again = state.snapshot(torch.tensor([1]))
    assert all(torch.equal(again[name], kept[name]) for name in kept)


@pytest.mark.parametrize("plan", PLANS)
def test_embeddings_are_the_mean_of_hidden_states(plan: str):
    model = built(plan).double()
    texts = [some(count, count) for count in (1, 6, 7, 8, 20)]
    found = {}
    for piece in (3, 7):
        engine = engine_of(model, slots=4, budget=30, piece=piece)
        for key, text in enumerate(texts):
            engine.submit(Generation(key, text, READ, embedding=True, prompt_logprobs=0 if key % 2 else None))
        events = run(engine)
        assert [event.ended for event in events if event.embedding] == ["read"] * len(texts)
        found[piece] = {event.key: event.embedding for event in events if event.embedding}
        for key in (1, 3):
            weighed = [choice.logprob for event in events if event.key == key for choice in event.prompt]
            with torch.no_grad():
                spread = model(torch.tensor([texts[key]]), use_cache=False).logits[0].log_softmax(-1)
            expected = [float(spread[place, token]) for place, token in enumerate(texts[key][1:])]
            assert weighed == pytest.approx(expected, abs=1e-5)
    for key, text in enumerate(texts):
        with torch.no_grad():
            mean = model.model(torch.tensor([text]), use_cache=False).last_hidden_state[0].float().mean(dim=0)
        expected = (mean / mean.norm()).tolist()
        for piece in found:
            assert list(found[piece][key]) == pytest.approx(expected, abs=1e-6)
    engine.submit(Generation("drawn", [1], Sampling(max_tokens=2)))
    assert all(event.embedding is None for event in run(engine))
    with pytest.raises(RequestError, match="embedding: expected max_tokens 0 with it, got 3"):
        engine.submit(Generation("bad", [1], Sampling(max_tokens=3), embedding=True))


def test_a_model_with_hooks_reads_one_piece_after_the_other():
    model, called = built("windows").double(), []
    texts = [some(count, count) for count in (4, 6)]
    expected = [alone(model, text, 3) for text in texts]
    model.model.stack[0].register_forward_hook(lambda *given: called.append(1))
    engine = engine_of(model, budget=40)
    for key, text in enumerate(texts):
        engine.submit(Generation(key, text, Sampling(temperature=0, max_tokens=3), keep=True))
    events = engine.step()
    assert len(called) == 2
    events += run(engine)
    assert [event.fed[0] for event in events if event.fed] == [Fed("piece", 4, 0, 4), Fed("piece", 6, 0, 6)]
    assert [tokens_of(events, key) for key in (0, 1)] == expected
    with pytest.raises(ValueError, match="extend_packed: a layer is hooked"):
        extend_packed(model, [Reading([1], 0, 0)], model.init_state(1))


@pytest.mark.parametrize(
    ("readings", "where", "message"),
    [
        ([], (), "readings: expected at least one"),
        ([Reading([], 0, 0)], (), "with at least one token each"),
        ([Reading([1], 0, 0), Reading([1], 0, 0)], (), r"readings: expected different slots, got \[0, 0\]"),
        ([Reading([1], 5, 0)], (), "slot: expected different numbers from 0 to 1"),
        ([Reading([1], 0, 0), Reading([1], 1, 3)], (), "num_past: .* has read 0 tokens, got 3"),
        ([Reading([1], 0, 0)], ([0, 1],), "places: expected 1, one for each reading; got 2"),
        ([Reading([1, 2], 0, 0), Reading([3], 1, 0)], ([0, 1],), "places: expected the readings side by side"),
        ([Reading([1, 2], 0, 0)], ([3], 4), "places: .* in a row of 4 tokens"),
        ([Reading([1, 2], 0, 0)], ([-1],), "places: expected the readings side by side"),
    ],
)
def test_bad_rows_are_named(readings: list[Reading], where: tuple, message: str):
    model = built("recurrence")
    state = model.init_state(2)
    with pytest.raises(ValueError, match=message):
        extend_packed(model, readings, state, *where)
    assert state.position.tolist() == [0, 0]
