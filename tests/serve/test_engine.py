"""The engine: what it gives is what the model gives alone, whatever runs beside it; nothing leaks, errors stay put."""

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch

from swat_lm import SwatConfig, SwatForCausalLM
from swat_lm.serve import reading
from swat_lm.serve.engine import Engine, Event, Generation
from swat_lm.serve.pool import batch_sizes, most_spare, slots_in
from swat_lm.serve.requests import Limits, RequestError
from swat_lm.serve.running import Running
from swat_lm.serve.sampling import Sampling

VOCABULARY = 50
GREEDY = Sampling(temperature=0, max_tokens=8)
PLANS = {
    "windows": [{"kind": "attention", "sliding_window": 6, "sinks": 2, "score_function": "softmax", "slopes": "none"},
                {"kind": "attention", "sliding_window": 5}],
    "recurrence": ["mamba2", {"kind": "attention", "sliding_window": 6}],
    "full": [{"kind": "attention", "sliding_window": None, "score_function": "softmax", "slopes": "none"}, "mamba2"],
}  # fmt: skip


class Letters:
    """A tokenizer of one letter a token."""

    def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(65 + token) for token in tokens)


def built(plan: str) -> SwatForCausalLM:
    torch.manual_seed(0)
    return SwatForCausalLM(SwatConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, layers=PLANS[plan], initializer_range=0.2,
    )).eval()  # fmt: skip


def engine_of(model: SwatForCausalLM, slots: int = 4, budget: int = 12, piece: int = 7, **more: object) -> Engine:
    grows = any(entry.kind == "growing" for layer in model.model.stack for entry in layer.state_spec())
    limits = Limits(slots, budget, piece, capacity=60 if grows else None)
    return Engine(model, limits, Letters(), **more)  # type: ignore[arg-type]


def run(engine: Engine, most: int = 500) -> list[Event]:
    """All events until nothing is left to do."""
    events = []
    for _ in range(most):
        if engine.is_idle:
            return events
        events += engine.step()
    raise AssertionError("requests are left")


def tokens_of(events: list[Event], key: object, sample: int = 0) -> list[int]:
    return [event.choice.token for event in events if event.choice and (event.key, event.sample) == (key, sample)]


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 25, (count,), generator=generator).tolist()
    return [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def alone(model: SwatForCausalLM, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens, by one pass over everything for each."""
    found = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            found.append(int(model(torch.tensor([found]), use_cache=False).logits[0, -1].argmax()))
    return found[len(prompt) :]


@pytest.mark.parametrize("plan", PLANS)
def test_every_reply_is_the_models_own(plan: str):
    model = built(plan).double()
    engine, texts = engine_of(model), prompts(9)
    events = []
    for key, prompt in enumerate(texts):
        engine.submit(Generation(key, prompt, GREEDY))
        # they come while others run
        events += engine.step() if key % 3 == 2 else []
    events += run(engine)
    for key, prompt in enumerate(texts):
        assert tokens_of(events, key) == alone(model, prompt, 8)
    ended = {event.key: event.ended for event in events if event.ended}
    assert ended == dict.fromkeys(range(9), "length")
    assert engine.scheduler.free_slots == 4


@pytest.mark.parametrize("panel_bytes", [0, 2**30])
@pytest.mark.parametrize("plan", PLANS)
def test_a_reply_is_the_same_to_the_bit_among_any_mates(plan: str, panel_bytes: int):
    model = built(plan)
    model.arrange_for_decoding(panel_bytes)
    asked = Generation("mine", prompts(1)[0][:7], Sampling(seed=3, max_tokens=6, logprobs=2))
    found = []
    for seed in range(3):
        engine = engine_of(model, budget=40)
        # which are there all the time, so that the batch has one size, and their prompts too
        sampling = Sampling(seed=seed, max_tokens=20)
        mates = [Generation(key, (prompt * 7)[:7], sampling) for key, prompt in enumerate(prompts(3, seed))]
        for generation in [mates[0], asked, *mates[1:]]:
            engine.submit(generation)
        found.append([event.choice for event in run(engine) if event.key == "mine"])
    # log-probabilities and all
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 6


def test_several_replies_share_one_prompt():
    model = built("windows")
    engine, (prompt,) = engine_of(model), prompts(1)
    engine.submit(Generation("many", prompt, Sampling(seed=1, n=3, max_tokens=5)))
    events = run(engine)
    replies = [tokens_of(events, "many", sample) for sample in range(3)]
    assert len({tuple(reply) for reply in replies}) > 1
    for number, reply in enumerate(replies):
        # another request with one reply has the first of them
        assert len(reply) == 5
        if number == 0:
            engine.submit(Generation("one", prompt, Sampling(seed=1, max_tokens=5)))
            assert tokens_of(run(engine), "one")[0] == reply[0]


def test_prompts_are_weighed_and_texts_end_where_they_are_asked_to():
    model = built("recurrence").double()
    engine, texts = engine_of(model), prompts(2, seed=4)
    engine.submit(Generation("read", texts[0], Sampling(max_tokens=0), prompt_logprobs=1))
    events = run(engine)
    with torch.no_grad():
        spread = model(torch.tensor([texts[0]]), use_cache=False).logits[0].log_softmax(-1)
    weighed = [choice for event in events for choice in event.prompt]
    assert [choice.token for choice in weighed] == texts[0][1:]
    expected = [float(spread[place, token]) for place, token in enumerate(texts[0][1:])]
    assert [choice.logprob for choice in weighed] == pytest.approx(expected, abs=1e-5)
    assert [event.ended for event in events if event.ended] == ["read"]

    reply = alone(model, texts[1], 8)
    letters = Letters().decode(reply)
    engine.submit(Generation("stop", texts[1], replace(GREEDY, stop=(letters[3:5],))))
    events = run(engine)
    assert "".join(event.text for event in events) == letters.split(letters[3:5])[0]
    assert [event.ended for event in events if event.ended] == ["stop_string"]
    ending = engine_of(model, end_tokens=[reply[2]])
    ending.submit(Generation("end", texts[1], GREEDY))
    assert tokens_of(run(ending), "end") == reply[: reply.index(reply[2]) + 1]


def test_aborts_and_errors_hurt_nobody_else(monkeypatch: pytest.MonkeyPatch):
    model = built("windows")
    texts = prompts(4, seed=7)
    expected = []
    for prompt in texts:
        engine = engine_of(model, budget=40)
        engine.submit(Generation(0, prompt, GREEDY))
        expected.append(tokens_of(run(engine), 0))
    engine = engine_of(model, budget=40)
    for key, prompt in enumerate(texts):
        engine.submit(Generation(key, prompt, GREEDY))
    whole = reading.take_in

    def take_in(running: Running, *more: Any) -> list[Event]:
        if running.generation.key == 1:
            raise RuntimeError("out of memory")
        return whole(running, *more)

    monkeypatch.setattr("swat_lm.serve.engine.take_in", take_in)
    events = engine.step()
    assert [(event.key, event.error) for event in events if event.ended] == [(1, "out of memory")]
    assert engine.abort(2)
    assert not engine.abort(2)
    events += run(engine)
    assert [tokens_of(events, key) for key in (0, 3)] == [expected[0], expected[3]]
    assert engine.scheduler.free_slots == 4
    with pytest.raises(ValueError, match="tokens: expected ids from 0 to 49, the model's, got 50"):
        engine.submit(Generation("bad", [50]))
    engine.submit(Generation("same", [1], GREEDY))
    with pytest.raises(RequestError, match="'same' is a request that has not ended"):
        engine.submit(Generation("same", [1]))


def test_a_slot_that_fills_up_is_refused_before_anything_runs():
    model = built("full")
    engine = engine_of(model)
    with pytest.raises(RequestError, match="a slot here holds 60") as refused:
        engine.submit(Generation("long", [1] * 40, Sampling(max_tokens=30)))
    assert refused.value.kind == "capacity"
    # without a limit of its own a reply ends where the slot does
    engine.submit(Generation("open", [1] * 40, Sampling(temperature=0)))
    assert len(tokens_of(run(engine), "open")) == 21
    with pytest.raises(ValueError, match="capacity: a layer of the model keeps all it has seen"):
        Engine(model, Limits(2, 10, 4), Letters())


def live_bytes() -> int:
    gc.collect()
    return sum(one.nbytes for one in gc.get_objects() if type(one) is torch.Tensor)


def test_nothing_grows_and_nothing_moves():
    model = built("windows")
    model.arrange_for_decoding()
    engine = engine_of(model)
    generator = torch.Generator().manual_seed(0)

    def some(count: int, start: int) -> None:
        for key in range(start, start + count):
            length = int(torch.randint(1, 30, (), generator=generator))
            sampling = Sampling(seed=key, max_tokens=length, n=1 + key % 2)
            engine.submit(Generation(key, [key % VOCABULARY] * length, sampling))
            if key % 5 == 4:
                engine.step()
                engine.abort(key - 1)
        run(engine, 10_000)

    some(20, 0)
    places, before = [tensor.data_ptr() for tensor in engine.slots._all()], live_bytes()
    some(60, 100)
    assert [tensor.data_ptr() for tensor in engine.slots._all()] == places
    assert live_bytes() == before


def test_slots_are_counted_with_those_that_fill_batches_up():
    assert batch_sizes(1) == (1,)
    assert batch_sizes(6) == (1, 2, 4, 6)
    assert [most_spare(count) for count in (1, 2, 4, 6, 16)] == [0, 0, 1, 1, 7]
    model = built("full")
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        one = slots_in(model.config, 10**6, capacity=60, dtype=model.dtype)
        engine = Engine(model, Limits(one, one + 20, 7, capacity=60), Letters())
        assert engine.slots.num_bytes <= 10**6 < engine.slots.num_bytes * (one + 2) / one
    # a checkpoint's configuration names its dtype
    model.config.dtype = model.dtype
    assert slots_in(model.config, 10**6, capacity=60) == one
    # at once, however many there are
    assert slots_in(model.config, 2**50, capacity=60) > 10**9
    model.config.dtype = None
    for memory, more, message in (
        (1000, {"capacity": 60}, r"memory: a slot takes [\d,]+ bytes, 1,000 are too few"),
        (1e6, {"capacity": 60}, r"memory: expected a whole number of at least 1, got 1000000\.0"),
        (10**6, {"capacity": 0}, "capacity: expected a whole number of at least 1, got 0"),
        (10**6, {}, "capacity: a layer of the model keeps all it has seen"),
        (10**6, {"capacity": 60, "dtype": None}, "dtype: expected the model's, .* got None"),
    ):
        with pytest.raises(ValueError, match=message):
            slots_in(model.config, memory, **{"dtype": torch.float32, **more})


def test_a_kept_slot_is_named_and_goes_on():
    model = built("recurrence").double()
    engine, (prompt,) = engine_of(model), prompts(1, seed=2)
    whole = alone(model, prompt, 12)
    engine.submit(Generation("first", prompt, GREEDY, keep=True))
    end = run(engine)[-1]
    # the token that was drawn last is not read
    assert (end.ended, end.slot, end.held) == ("length", 0, len(prompt) + 7)
    assert int(engine.slots.position[0]) == end.held
    for held, slot, message in (
        (end.held + 1, 0, f"held: expected {end.held}, the tokens that slot 0 has read"),
        (1, None, "held: expected 0, what an empty slot has read"),
        (0, True, "slot: expected a whole"),
    ):
        with pytest.raises(RequestError, match=message) as refused:
            engine.submit(Generation("wrong", [1], held=held, slot=slot))
        assert refused.value.kind == "invalid"
    engine.submit(Generation("second", whole[7:8], replace(GREEDY, max_tokens=4), held=end.held, slot=end.slot))
    events = run(engine)
    assert tokens_of(events, "second") == whole[8:]
    assert (events[-1].slot, events[-1].held) == (0, end.held + 4)
    engine.submit(Generation("read", [1, 2], Sampling(max_tokens=0), held=end.held + 4, slot=0))
    assert (run(engine)[-1].ended, engine.scheduler.kept) == ("read", {0: end.held + 6})
    engine.submit(Generation("third", [1] * 20, GREEDY, held=end.held + 6, slot=0))
    engine.step()
    assert engine.abort("third")
    assert (engine.scheduler.kept, engine.scheduler.free_slots) == ({}, 4)
    engine.submit(Generation("half", [1] * 20, GREEDY, keep=True))
    engine.step()
    assert engine.abort("half")
    assert (engine.scheduler.kept, engine.scheduler.free_slots) == ({}, 4)


class Says:
    """A constraint of a few tokens in their order."""

    def __init__(self, tokens: list[int]) -> None:
        self.left = list(tokens)

    @property
    def finished(self) -> bool:
        return not self.left

    def allowed(self, size: int) -> torch.Tensor:
        return torch.arange(size) == self.left[0]

    def accept(self, token: int) -> None:
        assert token == self.left.pop(0)

    def copy(self) -> "Says":
        return Says(self.left)


def test_a_finished_constraint_ends_its_reply():
    engine, constraint = engine_of(built("windows")), Says([3, 1, 4])
    for key in range(2):
        # also where its length would end it with the same token
        engine.submit(Generation(key, [5], Sampling(n=2, max_tokens=3 if key else None), constraint))
    events = run(engine)
    assert len(constraint.left) == 3
    for key, sample in ((0, 0), (0, 1), (1, 0), (1, 1)):
        mine = [event for event in events if (event.key, event.sample) == (key, sample)]
        assert tokens_of(mine, key, sample) == [3, 1, 4]
        assert ("".join(event.text for event in mine), mine[-1].ended) == ("DBE", "constraint")
    assert engine.scheduler.free_slots == 4


def test_a_pool_may_be_handed_in():
    model = built("full").double()
    state = model.init_state()
    prompt = prompts(1, seed=3)[0]
    logits, _ = model.prefill(torch.tensor([prompt]), state)
    engine = Engine(model, Limits(1, 8, 7), Letters(), slots=state)
    engine.scheduler.adopt(0, len(prompt))
    engine.submit(Generation("on", [], replace(GREEDY, max_tokens=65), logits=logits[0], held=len(prompt), slot=0))
    events = run(engine)
    # it grows beyond its first 64 places, since whoever made it said nothing else
    expected = alone(model, prompt, 66)
    assert tokens_of(events, "on") == expected[:-1]
    token = events[-1].choice.token
    engine.submit(Generation("read", [token], Sampling(max_tokens=0), held=events[-1].held, slot=0, return_logits=True))
    (end,) = run(engine)
    assert (end.ended, int(end.logits.argmax())) == ("read", expected[-1])
    with pytest.raises(ValueError, match="slots: expected 2 for a pool of 2, got 1"):
        Engine(model, Limits(2, 9, 7), Letters(), slots=state)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        *(({"tokens": tokens}, f"tokens: expected {expected}") for tokens, expected in (
            ([], "at least one, got none"), ("abc", "a list of whole numbers, got str"), (7, "a list of whole"),
            ([1, True], "whole numbers, got True"), ([1.0], "whole numbers, got 1.0"), ([None], "whole numbers, got"),
            (["1"], "whole numbers, got '1'"), ([-1], "ids from 0 to 49"), (torch.tensor([1]), "a list of whole"),
        )),
        *(({"prompt_logprobs": value}, "prompt_logprobs: expected a whole number from 0 to 20")
          for value in (-1, 21, True, "3", 1.5)),
        ({"held": None}, "held: expected a whole number from 0, got None"),
        ({"logits": torch.zeros(VOCABULARY)}, "logits: expected with them a slot that has read, no tokens"),
        ({"logits": torch.zeros(7), "slot": 0, "tokens": []}, r"logits: expected a tensor of 50, .* got \[7\]"),
        ({"return_logits": True}, "return_logits: expected max_tokens 0 with it, got None"),
        ({"keep": 1}, "keep: expected true or false, got 1"),
        ({"sampling": None}, "sampling: expected a Sampling, got NoneType"),
        ({"sampling": Sampling(logit_bias={50: 1})}, "logit_bias: expected token ids below 50"),
    ],
    ids=str,
)  # fmt: skip
def test_what_no_request_can_have_is_refused(given: dict, message: str):
    engine = engine_of(built("windows"))
    with pytest.raises(RequestError, match=f"^{message}") as refused:
        engine.submit(Generation(**{"key": "bad", "tokens": [1], **given}))
    assert refused.value.kind == "invalid"
    assert "\n" not in str(refused.value)
    assert engine.is_idle
