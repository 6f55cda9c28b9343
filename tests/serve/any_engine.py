"""An engine that does and reports anything, and holds a scheduler to its contract by books of its own."""

from itertools import cycle
from math import ceil
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from swat_lm.serve.requests import Limits, Piece, Request, RequestError, Step
from swat_lm.serve.scheduler import Scheduler


class Engine(RuleBasedStateMachine):
    """Its books come from requests and steps alone. A subclass says which `kind` of scheduler is tested."""

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
        if brought is not None and new_tokens and num_tokens == 1:
            # goes on from what its slot has read
            num_tokens = 0
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
        self.books_of_abort(key)

    def books_of_abort(self, key: str) -> None:
        brought = self.waiting[key].slot if key in self.waiting else None
        if brought is not None:
            # nobody has read in it
            self.kept[brought] = self.waiting[key].held
        for name in [name for name in self.slots if name[0] == key]:
            for books in (self.slots, self.drawn, self.waited):
                books.pop(name, None)
        self.forget(key)
        self.gone.add(key)

    @precondition(lambda self: any(asked.keeps for asked in (*self.waiting.values(), *self.started.values())))
    @rule(number=st.integers(0, 99), held=st.integers(0, 3))
    def stop(self, number: int, held: int) -> None:
        known = [key for books in (self.waiting, self.started) for key, asked in books.items() if asked.keeps]
        key = known[number % len(known)]
        started, slot = key in self.started, self.slots.get((key, 0))
        found = self.call("stop", key, held)
        self.books_of_abort(key)
        if started:
            assert slot in (None, found)
            self.kept[found] = held
        else:
            assert found == slot

    @precondition(lambda self: self.kept)
    @rule(number=st.integers(0, 9), held=st.integers(0, 3))
    def hold(self, number: int, held: int) -> None:
        slot = sorted(self.kept)[number % len(self.kept)]
        self.call("hold", slot, held)
        self.kept[slot] = held

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

    @precondition(lambda self: self.step is not None)
    @rule()
    def abandon(self) -> None:
        step, self.step = self.step, None
        assert step is not None
        self.call("abandon")
        for key in dict.fromkeys(one.key for one in (*step.pieces, *step.rows)):
            if key not in self.gone:
                self.books_of_abort(key)

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
        reading = [key for key in self.started if not any((key, sample) in self.drawn for sample in self.samples(key))]
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
        names = [(piece.key, sample) for piece in step.pieces for sample in self.samples(piece.key) if piece.is_last]
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

    def samples(self, key: str) -> range:
        return range(self.started[key].samples if key in self.started else 0)

    @invariant()
    def books_agree(self) -> None:
        assert self.made.kept == self.kept
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
