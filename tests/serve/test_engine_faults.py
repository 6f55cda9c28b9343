"""The engine: whatever is raised, in whatever place, ends those whom it concerns, and leaves the engine sound."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from swat_lm import SwatForCausalLM
from swat_lm.serve import reading
from swat_lm.serve.engine import Engine, Event, Generation
from swat_lm.serve.sampling import Sampling
from tests.serve.test_engine import GREEDY, Letters, Says, built, engine_of, prompts, run, tokens_of

TEXTS = [prompt[:6] for prompt in prompts(3, seed=11)]


@pytest.fixture(scope="module")
def model() -> SwatForCausalLM:
    model = built("windows")
    model.arrange_for_decoding()
    return model


def raising(error: BaseException, when: Callable[..., bool], whole: Callable) -> Callable:
    """A function that raises where the arguments are such."""

    def call(*args: Any, **more: Any) -> Any:
        if when(*args):
            raise error
        return whole(*args, **more)

    return call


def is_sound(engine: Engine) -> None:
    """Nothing is left of anybody, and the next request is answered as in a new engine."""
    assert engine.is_idle
    assert (engine.scheduler.waiting, engine.scheduler.running) == (0, 0)
    assert (engine.scheduler.free_slots, engine.scheduler.kept) == (4, {})
    found = []
    for one in (engine, engine_of(engine.model, budget=40)):
        one.tokenizer = Letters()
        one.submit(Generation("after", TEXTS[2], GREEDY))
        found.append(tokens_of(run(one), "after"))
    assert found[0] == found[1]


def answers(model: SwatForCausalLM) -> list[list[int]]:
    """What each of TEXTS is answered, beside the others."""
    engine = engine_of(model, budget=40)
    for key, prompt in enumerate(TEXTS):
        engine.submit(Generation(key, prompt, GREEDY))
    events = run(engine)
    return [tokens_of(events, key) for key in range(len(TEXTS))]


def check_one_failed(engine: Engine, events: list[Event], bad: object, others: dict, message: str) -> None:
    (place,) = [place for place, event in enumerate(events) if event.error is not None]
    assert (events[place].key, events[place].ended, events[place].error) == (bad, "error", message)
    assert (events[place].slot, events[place].held) == (None, None)
    # nothing after it
    assert all(event.key != bad for event in events[place + 1 :])
    for key, tokens in others.items():
        assert tokens_of(events, key) == tokens
    is_sound(engine)


@pytest.mark.parametrize("error", [IndexError("x"), KeyError("x"), OverflowError("x"), TypeError("x"), ValueError("x")])
@pytest.mark.parametrize("turn", [1, 3])
def test_a_text_that_fails_is_its_requests_own(model: SwatForCausalLM, error: Exception, turn: int):
    expected = answers(model)
    engine = engine_of(model, budget=40)
    for key, prompt in enumerate(TEXTS):
        engine.submit(Generation(key, prompt, GREEDY))
    text = engine._requests[1].replies[0].text
    count = iter(range(99))
    text.push = raising(error, lambda token: next(count) + 1 == turn, text.push)  # type: ignore[method-assign]
    message = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    check_one_failed(engine, run(engine), 1, {0: expected[0], 2: expected[2]}, message)


@pytest.mark.parametrize("method", ["allowed", "accept", "finished"])
@pytest.mark.parametrize("turn", [1, 3])
def test_a_constraint_that_fails_is_its_requests_own(
    model: SwatForCausalLM, method: str, turn: int, monkeypatch: pytest.MonkeyPatch
):
    expected = answers(model)
    engine = engine_of(model, budget=40)
    count = iter(range(99))
    whole = vars(Says)[method]
    call = raising(IndexError("lost"), lambda *args: next(count) + 1 == turn, getattr(whole, "fget", whole))
    monkeypatch.setattr(Says, method, property(call) if method == "finished" else call)
    engine.submit(Generation("kept", TEXTS[1], Sampling(), Says([1] * 9), keep=True))
    for key in (0, 2):
        engine.submit(Generation(key, TEXTS[key], GREEDY))
    # the batch has one size with and without it
    check_one_failed(engine, run(engine), "kept", {0: expected[0], 2: expected[2]}, "IndexError: lost")


def test_nothing_comes_after_an_error_of_one_of_three_replies(model: SwatForCausalLM):
    for turn in (1, 3):
        engine = engine_of(model, budget=40)
        engine.submit(Generation("many", TEXTS[0], Sampling(seed=1, n=3, max_tokens=8)))
        text = engine._requests["many"].replies[0].text
        count = iter(range(99))
        text.push = raising(IndexError("x"), lambda token: next(count) + 1 == turn, text.push)  # type: ignore[method-assign]  # noqa: B023
        check_one_failed(engine, run(engine), "many", {}, "IndexError: x")


def test_a_text_that_fails_where_the_slot_is_full():
    engine = engine_of(built("full"))
    engine.submit(Generation("open", [1] * 40, Sampling(temperature=0)))
    text = engine._requests["open"].replies[0].text
    text.finish = raising(IndexError("x"), lambda *args: True, text.finish)  # type: ignore[method-assign]
    events = run(engine)
    assert [event.error for event in events if event.ended] == ["IndexError: x"]
    assert engine.scheduler.free_slots == 4


@pytest.mark.parametrize("place", ["extend_packed", "forward", "decode_step", "copy", "push", "report"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit()])
def test_an_interruption_is_raised_and_leaves_the_engine_sound(
    model: SwatForCausalLM, place: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
):
    engine = engine_of(model, budget=40)
    engine.submit(Generation(0, TEXTS[0], Sampling(seed=1, n=2, max_tokens=8)))
    engine.submit(Generation(1, TEXTS[1], GREEDY, keep=True))
    engine.submit(Generation("waits", TEXTS[2], Sampling(temperature=0, max_tokens=8, n=2)))
    if place == "decode_step":
        engine.step()
    text = engine._requests[1].replies[0].text
    owners = {"copy": engine.slots, "report": engine.scheduler, "push": text, "forward": model.lm_head,
              "extend_packed": reading}  # fmt: skip
    owner = owners.get(place, model)
    with monkeypatch.context() as patch:
        patch.setattr(owner, place, raising(error, lambda *args: True, getattr(owner, place)))
        with pytest.raises(type(error)):
            engine.step()
    assert list(engine._requests) == ["waits"]
    events = run(engine)
    assert {event.key for event in events} == {"waits"}
    assert tokens_of(events, "waits") == tokens_of(events, "waits", 1)
    assert len(tokens_of(events, "waits")) == 8
    is_sound(engine)


def test_a_batch_that_fails_ends_those_that_have_a_row(model: SwatForCausalLM, monkeypatch: pytest.MonkeyPatch):
    engine = engine_of(model, budget=40)
    for key in (0, 1):
        engine.submit(Generation(key, TEXTS[key], GREEDY, keep=True))
    engine.step()
    engine.submit(Generation(2, TEXTS[2], GREEDY))
    with monkeypatch.context() as patch:
        patch.setattr(model, "decode_step", raising(torch.OutOfMemoryError("full"), lambda *args: True, model.lm_head))
        events = engine.step()
    assert [(event.key, event.error) for event in events if event.ended] == [(0, "full"), (1, "full")]
    events += run(engine)
    assert len(tokens_of(events, 2)) == 8
    is_sound(engine)


def test_pieces_that_fail_end_those_that_have_one(model: SwatForCausalLM, monkeypatch: pytest.MonkeyPatch):
    engine = engine_of(model, budget=40)
    engine.submit(Generation(0, TEXTS[0][:5], GREEDY))
    engine.step()
    for key in (1, 2):
        engine.submit(Generation(key, TEXTS[key], GREEDY, keep=True))
    with monkeypatch.context() as patch:
        patch.setattr(reading, "extend_packed", raising(torch.OutOfMemoryError("full"), lambda *args: True, len))
        events = engine.step()
    assert [(event.key, event.error) for event in events if event.ended] == [(1, "full"), (2, "full")]
    events += run(engine)
    # one was drawn before
    assert len(tokens_of(events, 0)) == 7
    is_sound(engine)


def test_rows_keep_their_order(model: SwatForCausalLM, monkeypatch: pytest.MonkeyPatch):
    engine = engine_of(model, slots=4, budget=9)
    named, whole = [], engine._decode
    monkeypatch.setattr(engine, "_decode", lambda rows: named.append([row.slot for row in rows]) or whole(rows))
    for key, prompt in enumerate([*TEXTS, *TEXTS]):
        engine.submit(Generation(key, prompt, Sampling(temperature=0, max_tokens=3 + key % 2)))
    run(engine)
    assert named
    assert all(slots == sorted(slots) for slots in named)
