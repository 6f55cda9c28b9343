"""Requests share slots: by examples, and by an engine that does and reports anything, for every policy."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle
from math import ceil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from swat_lm.serve.requests import Fork, Limits, Piece, Request, RequestError, Row, Step
from swat_lm.serve.scheduler import SCHEDULERS, Choice, FirstCome, Scheduler

LIMITS = Limits(num_slots=3, token_budget=11, prefill_chunk=4, most_waiting=4)


def scheduler(*requests: Request, **limits: Any) -> FirstCome:
    made = FirstCome(replace(LIMITS, **limits))
    for request in requests:
        made.add(request)
    return made


def run(made: Scheduler) -> Iterator[Step]:
    """Steps that go well, until nothing is left to do."""
    while step := made.plan():
        yield step
        made.report()


def keys(step: Step) -> str:
    """Whose pieces are read, then whose rows decode."""
    return "".join(piece.key for piece in step.pieces) + " " + "".join(row.key for row in step.rows)


# examples


def test_a_prompt_is_read_once_and_forked():
    made = scheduler(Request("a", num_tokens=6, new_tokens=3, samples=2), Request("b", num_tokens=1, new_tokens=1))
    steps = list(run(made))
    assert steps == [
        Step((Piece("a", 0, 0, 4, False), Piece("b", 2, 0, 1, True))),
        # the first tokens come with the prompt, so two decoded ones make three
        Step((Piece("a", 0, 4, 2, True),), (Fork("a", 0, (1,)),)),
        Step(rows=(Row("a", 0, 0), Row("a", 1, 1))),
        Step(rows=(Row("a", 0, 0), Row("a", 1, 1))),
    ]
    assert [step.num_tokens for step in steps] == [5, 2, 2, 2]
    assert (made.free_slots, made.running, made.waiting) == (3, 0, 0)


def test_the_drawing_in_the_documents():
    made = scheduler(Request("A", 10, 3), Request("B", 3, 2, samples=2), Request("C", 2, 1), token_budget=8)
    columns = [["      ", "slot 0", "slot 1", "slot 2"]]
    for number, step in enumerate(run(made), 1):
        cells = {row.slot: f"{row.key} +" for row in step.rows}
        for piece in step.pieces:
            cells[piece.slot] = f"{piece.key} {piece.start}-{piece.start + piece.count - 1}"
        cells |= {slot: f"{fork.key} =" for fork in step.forks for slot in fork.targets}
        columns.append([f"step {number}", *(cells.get(slot, "") for slot in range(3))])
    lines = ["    " + "".join(f"{cell:<9}" for cell in row).rstrip() for row in zip(*columns, strict=True)]
    page = Path(__file__).parents[2] / "docs" / "serving.md"
    assert "\n\n" + "\n".join(lines) + "\n\n" in page.read_text(encoding="utf-8"), "\n".join(lines)


def test_texts_to_score_are_packed():
    made = scheduler(*(Request(key, num_tokens=3) for key in "abcd"))
    assert [keys(step) for step in run(made)] == ["abc ", "d "]


def test_a_prompt_is_cut_alike_whatever_else_runs():
    made = scheduler(Request("a", num_tokens=1, new_tokens=9), Request("b", num_tokens=10), token_budget=9)
    made.add(Request("c", num_tokens=7))
    pieces = [piece for step in run(made) for piece in step.pieces if piece.key == "b"]
    assert [(piece.start, piece.count) for piece in pieces] == [(0, 4), (4, 4), (8, 2)]


def test_who_ends_early_frees_its_slot_at_once():
    made = scheduler(Request("a", 2, new_tokens=9, samples=2), Request("b", 2, new_tokens=9), Request("c", 2))
    step = made.plan()
    assert keys(step) == "ab "
    assert (made.free_slots, made.running, made.waiting, made.lacking_slots) == (0, 2, 1, 1)
    assert made.report(ended={("a", 1)}) == [("a", 1)]
    assert made.free_slots == 1
    step = made.plan()
    assert step.pieces == (Piece("c", 1, 0, 2, True),)
    assert made.report(ended={("b", 0)}) == [("b", 0), ("c", 0)]
    assert made.plan() == Step(rows=(Row("a", 0, 0),))


def test_nobody_overtakes_the_first_in_line():
    made = scheduler(Request("a", 2, new_tokens=3), Request("b", 2, new_tokens=2, samples=3), Request("c", 2))
    assert made.lacking_slots == 0
    # c would fit beside a
    assert [keys(step) for step in run(made)] == ["a ", " a", " a", "b ", " bbb", "c "]


def test_a_long_prompt_and_many_rows_do_not_stop_each_other():
    made = scheduler(*(Request(key, 1, new_tokens=4) for key in "abc"), num_slots=4, token_budget=5)
    assert keys(made.plan()) == "abc "
    made.report()
    made.add(Request("d", 12))
    assert [keys(step) for step in run(made)] == ["d a", "d b", "d c", " abc", " abc"]


def test_a_kept_slot_goes_on():
    made = scheduler(Request("a", 2, new_tokens=2, keep=True), Request("b", 2, new_tokens=9), num_slots=2, capacity=10)
    steps = run(made)
    assert [keys(next(steps)), keys(next(steps))] == ["ab ", " ab"]
    made.report(ended={("b", 0)})
    assert made.free_slots == 1
    with pytest.raises(RequestError) as refused:
        made.add(Request("c", 2, new_tokens=6, held=4, slot=0))
    assert refused.value.kind == "capacity"
    # the first in line waits for the very slot that c brings
    made.add(Request("b", 1, new_tokens=2, samples=2))
    made.add(Request("c", 2, new_tokens=2, held=3, slot=0))
    made.add(Request("d", 1))
    with pytest.raises(RequestError, match="slot: 0 is in use") as refused:
        made.add(Request("e", 2, held=3, slot=0))
    assert refused.value.kind == "slot"
    with pytest.raises(ValueError, match="slot: 0 is in use"):
        made.release(0)
    assert [keys(step) for step in run(made)] == ["c ", " c"]
    assert (made.lacking_slots, made.free_slots) == (1, 1)
    made.release(0)
    assert [keys(step) for step in run(made)] == ["b ", " bb", "d "]
    assert made.free_slots == 2


def test_one_request_fails_and_the_others_go_on():
    made = scheduler(Request("a", 2, new_tokens=9), Request("b", 6), Request("c", 2))
    before = made.plan()
    assert made.abort("a")
    # a call that read a, b and c threw before it changed anything
    made.report(undone={"b", "c"})
    assert made.plan() == Step(tuple(piece for piece in before.pieces if piece.key != "a"))


def test_a_step_under_way_says_nothing_of_a_later_request_with_the_same_key():
    made = scheduler(Request("a", 2, new_tokens=9))
    step = made.plan()
    assert made.abort("a")
    assert not made.abort("a")
    assert made.free_slots == 3
    made.add(Request("a", 3, new_tokens=9))
    assert made.plan() is step
    assert made.report(ended={("a", 0)}) == []
    assert made.plan() == Step((Piece("a", 0, 0, 3, True),))


def test_an_idle_plan_needs_no_report():
    made = scheduler()
    assert not made.plan()
    made.add(Request("a", 1))
    assert made.plan()


@pytest.mark.parametrize(
    ("request_", "kind", "message"),
    [
        ({"num_tokens": 0}, "invalid", "num_tokens: expected at least 1, got 0"),
        ({"new_tokens": -1}, "invalid", "new_tokens: expected at least 0"),
        ({"samples": 0}, "invalid", "samples: expected at least 1"),
        ({"held": -1}, "invalid", "held: expected at least 0"),
        ({"samples": 2, "new_tokens": 0}, "invalid", "nothing is drawn"),
        ({"samples": 2, "keep": True}, "invalid", "a kept slot"),
        ({"samples": 4}, "samples", "samples: expected at most 3"),
        ({"num_tokens": 9, "new_tokens": 9, "held": 4}, "capacity", "held 4, prompt 9, new 9"),
        ({"key": "known"}, "key", "'known' is a request that has not ended"),
        ({"slot": 2}, "slot", "slot: 2 is in use or not kept"),
        ({}, "queue", "1 requests are waiting"),
    ],
)
def test_refusals(request_: dict, kind: str, message: str):
    made = scheduler(Request("known", 1), most_waiting=1, capacity=20)
    with pytest.raises(RequestError, match=message) as refused:
        made.add(Request(**{"key": "a", "num_tokens": 9, "new_tokens": 9, **request_}))
    assert refused.value.kind == kind
    assert (made.waiting, made.running, made.free_slots) == (1, 0, 3)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"num_slots": 0}, "num_slots: expected at least 1"),
        ({"prefill_chunk": 0}, "prefill_chunk"),
        ({"most_waiting": 0}, "most_waiting"),
        ({"capacity": 0}, "capacity"),
        ({"token_budget": 4}, "token_budget: expected above prefill_chunk"),
    ],
)
def test_bad_limits(limits: dict, message: str):
    with pytest.raises(ValueError, match=message):
        replace(LIMITS, **limits)


def test_wrong_reports_change_nothing():
    made = scheduler(Request("a", 9, new_tokens=2), Request("b", 1, new_tokens=2))
    with pytest.raises(ValueError, match="no step is planned"):
        made.report()
    step = made.plan()
    for ended, undone, message in (
        ([("a", 0)], [], "no samples that drew"),
        ([("b", 1)], [], "no samples that drew"),
        ([], ["c"], "no part in this step"),
        ([("b", 0)], ["b"], "are said to have ended too"),
    ):
        with pytest.raises(ValueError, match=message):
            made.report(ended, undone)
    assert made.plan() is step


def test_a_policy_that_breaks_the_rules_is_stopped():
    class Greedy(FirstCome):
        def choose(self) -> Choice:
            return Choice([*self.reading.values(), *self.queue.values()], list(self.decoding))

    for requests in ([Request("a", 1, 9, samples=3), Request("b", 1)], [Request(key, 4) for key in "abc"]):
        made = Greedy(LIMITS)
        for request in requests:
            made.add(request)
        with pytest.raises(AssertionError):
            made.plan()
        assert (made.waiting, made.free_slots) == (len(requests), 3)


# anything that may happen


class Engine(RuleBasedStateMachine):
    """Keeps its own books by what steps say alone, and holds every step against them."""

    kind: type[Scheduler]

    @initialize(
        num_slots=st.integers(1, 5),
        chunk=st.sampled_from([1, 1, 3]),
        more=st.sampled_from([1, 1, 2, 8]),
        most_waiting=st.integers(1, 6),
        capacity=st.sampled_from([None, None, 8, 16]),
    )
    def begin(self, num_slots: int, chunk: int, more: int, most_waiting: int, capacity: int | None) -> None:
        self.limits = Limits(num_slots, chunk + more, chunk, most_waiting, capacity)
        self.made = self.kind(self.limits)
        self.calls: list[tuple[str, tuple, Any]] = []
        self.count = 0
        self.waiting: dict[str, Request] = {}
        self.started: dict[str, Request] = {}
        self.read: dict[str, int] = {}
        self.slots: dict[tuple[str, int], int | None] = {}
        """None: not said yet."""
        self.drawn: dict[tuple[str, int], int] = {}
        self.waited: dict[tuple[str, int], int] = {}
        self.kept: dict[int, int] = {}
        """Items in each."""
        self.step: Step | None = None
        self.gone: set[str] = set()
        """Aborted since the step was planned."""

    def call(self, name: str, *arguments: Any) -> Any:
        found = getattr(self.made, name)(*arguments)
        self.calls.append((name, arguments, found))
        return found

    def items(self, key: str, sample: int) -> int:
        asked = self.started.get(key) or self.waiting[key]
        return asked.held + self.read.get(key, 0) + max(0, self.drawn.get((key, sample), 0) - 1)

    @rule(
        num_tokens=st.sampled_from([1, 2, 5, 12]),
        new_tokens=st.sampled_from([0, 1, 2, 9]),
        samples=st.sampled_from([1, 1, 1, 2, 3]),
        keep=st.booleans(),
        number=st.integers(0, 9),
    )
    def add(self, num_tokens: int, new_tokens: int, samples: int, keep: bool, number: int) -> None:
        samples = samples if new_tokens else 1
        keep = keep and samples == 1
        brought = sorted(self.kept)[number] if keep and number < len(self.kept) else None
        held = 0 if brought is None else self.kept[brought]
        self.count += 1
        asked = Request(f"{self.count}", num_tokens, new_tokens, samples, held, brought, keep)
        kind = None
        if self.limits.capacity is not None and asked.most_items > self.limits.capacity:
            kind = "capacity"
        elif samples > self.limits.num_slots:
            kind = "samples"
        elif len(self.waiting) == self.limits.most_waiting:
            kind = "queue"
        if kind is not None:
            with pytest.raises(RequestError) as refused:
                self.made.add(asked)
            assert refused.value.kind == kind
            return
        self.call("add", asked)
        self.waiting[asked.key] = asked
        if brought is not None:
            del self.kept[brought]
            self.slots[asked.key, 0] = brought

    @precondition(lambda self: self.waiting or self.started)
    @rule(number=st.integers(0, 99))
    def abort(self, number: int) -> None:
        known = [*self.waiting, *self.started]
        self.abort_key(known[number % len(known)])

    def abort_key(self, key: str) -> None:
        assert self.call("abort", key)
        for sample in [sample for one, sample in self.slots if one == key]:
            self.give_back(key, sample)
        self.forget(key)
        self.gone.add(key)

    def give_back(self, key: str, sample: int) -> None:
        asked = self.started.get(key) or self.waiting[key]
        items, slot = self.items(key, sample), self.slots.pop((key, sample))
        if asked.keeps:
            assert slot is not None
            self.kept[slot] = items
        self.drawn.pop((key, sample), None)
        self.waited.pop((key, sample), None)

    def forget(self, key: str) -> None:
        for books in (self.waiting, self.started, self.read):
            books.pop(key, None)

    @precondition(lambda self: self.kept)
    @rule(number=st.integers(0, 9))
    def release(self, number: int) -> None:
        slot = sorted(self.kept)[number % len(self.kept)]
        self.call("release", slot)
        del self.kept[slot]

    @rule()
    def plan(self) -> None:
        step = self.call("plan")
        if self.step is not None:
            assert step is self.step
            return
        self.gone = set()
        self.check_order(step)
        for piece in step.pieces:
            self.check_piece(piece)
        self.check_forks(step)
        self.check_rows(step)
        assert step.num_tokens <= self.limits.token_budget
        self.step = step or None

    def check_order(self, step: Step) -> None:
        """The oldest are served first, and the oldest always."""
        reading = [key for key, asked in self.started.items() if self.read[key] < asked.num_tokens]
        named = [piece.key for piece in step.pieces]
        assert named or not reading
        assert named[: len(reading)] == reading[: len(named)]
        for key in named[len(reading) :]:
            earlier = list(self.waiting)[: list(self.waiting).index(key)]
            assert not earlier or self.waiting[key].slot is not None
            assert all(self.waiting[one].slot is None for one in earlier)
            asked = self.started[key] = self.waiting.pop(key)
            self.read[key] = 0
            self.slots |= {(key, sample): None for sample in range(asked.samples) if (key, sample) not in self.slots}

    def check_piece(self, piece: Piece) -> None:
        asked, read = self.started[piece.key], self.read[piece.key]
        count = min(self.limits.prefill_chunk, asked.num_tokens - read)
        assert (piece.start, piece.count) == (read, count)
        assert piece.is_last == (read + count == asked.num_tokens)
        self.take(piece.key, 0, piece.slot)

    def take(self, key: str, sample: int, slot: int) -> None:
        assert 0 <= slot < self.limits.num_slots
        assert slot not in self.kept
        assert all(other != slot for name, other in self.slots.items() if name != (key, sample))
        assert self.slots[key, sample] in (None, slot)
        self.slots[key, sample] = slot

    def check_forks(self, step: Step) -> None:
        last = [piece for piece in step.pieces if piece.is_last and self.started[piece.key].samples > 1]
        assert [(fork.key, fork.source) for fork in step.forks] == [(piece.key, piece.slot) for piece in last]
        for fork in step.forks:
            assert len(fork.targets) == self.started[fork.key].samples - 1
            for sample, slot in enumerate(fork.targets, 1):
                self.take(fork.key, sample, slot)

    def check_rows(self, step: Step) -> None:
        named = [(row.key, row.sample) for row in step.rows]
        assert len(set(named)) == len(named)
        for row in step.rows:
            assert 0 < self.drawn[row.key, row.sample] < self.started[row.key].new_tokens
            assert self.slots[row.key, row.sample] == row.slot
            self.waited[row.key, row.sample] = 0
        for name in self.waited.keys() - set(named):
            self.waited[name] += 1
            assert self.waited[name] < ceil(
                self.limits.num_slots / (self.limits.token_budget - self.limits.prefill_chunk)
            )

    @precondition(lambda self: self.step is not None)
    @rule(fates=st.lists(st.sampled_from(["go on", "go on", "end", "undo", "abort"]), min_size=1, max_size=6))
    def report(self, fates: list[str]) -> None:
        step, self.step = self.step, None
        assert step is not None
        names = [(piece.key, sample) for piece in step.pieces for sample in self.samples(piece) if piece.is_last]
        names += [(row.key, row.sample) for row in step.rows]
        fate = dict(zip(dict.fromkeys(one.key for one in (*step.pieces, *step.rows)), cycle(fates), strict=False))
        for key in [key for key in fate if fate[key] == "abort" and key not in self.gone]:
            self.abort_key(key)
        ended = [(key, sample) for key, sample in names if fate[key] == "end" and sample == 0]
        undone = [key for key in fate if fate[key] == "undo"]
        found = self.call("report", ended, undone)
        done = {key for key in fate if key not in self.gone and key not in undone}
        for piece in step.pieces:
            self.read[piece.key] = self.read.get(piece.key, 0) + piece.count * (piece.key in done)
        expected = set()
        for key, sample in names:
            if key in done:
                asked = self.started[key]
                self.drawn[key, sample] = min(asked.new_tokens, self.drawn.get((key, sample), 0) + 1)
                self.waited.setdefault((key, sample), 0)
                assert self.items(key, sample) <= asked.most_items
                if (key, sample) in ended or self.drawn[key, sample] == asked.new_tokens:
                    expected.add((key, sample))
        assert sorted(found) == sorted(expected)
        for name in found:
            self.give_back(*name)
        for key in {key for key, _ in found} - {key for key, _ in self.slots}:
            assert self.read[key] == self.started[key].num_tokens
            self.forget(key)

    @precondition(lambda self: self.waiting or self.started)
    @rule(num_steps=st.integers(1, 5))
    def go_on(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.plan()
            if self.step is not None:
                self.report(["go on"])

    def samples(self, piece: Piece) -> range:
        return range(self.started[piece.key].samples if piece.key in self.started else 0)

    @invariant()
    def books_agree(self) -> None:
        assert self.made.waiting == len(self.waiting)
        assert self.made.running == len(self.started)
        assert self.made.free_slots == self.limits.num_slots - len(self.slots) - len(self.kept)

    def teardown(self) -> None:
        """Whatever came before, all ends and every slot is free; and all of it again gives the same."""
        if not hasattr(self, "made"):
            return
        left = sum(asked.num_tokens + asked.new_tokens * asked.samples + 2 for asked in
                   (*self.waiting.values(), *self.started.values()))  # fmt: skip
        while self.waiting or self.started or self.step is not None:
            self.plan()
            if self.step is not None:
                self.report(["go on"])
            else:
                # nothing can be done only while idle sessions hold what the first in line needs
                assert self.made.lacking_slots > 0
                self.release(0)
            self.books_agree()
            left -= 1
            assert left >= -self.limits.num_slots
        while self.kept:
            self.release(0)
        assert self.made.free_slots == self.limits.num_slots
        assert not self.made.plan()
        again = self.kind(self.limits)
        for name, arguments, found in self.calls:
            assert getattr(again, name)(*arguments) == found


@pytest.mark.parametrize("name", SCHEDULERS)
def test_anything_may_happen(name: str):
    kind = type("EngineWith", (Engine,), {"kind": SCHEDULERS[name]})
    kind.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
    kind.TestCase("runTest").runTest()
