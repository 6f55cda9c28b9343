"""Which requests read, fork and decode in the next step, and in which slots. Deterministic; knows no model, no torch.

Whoever owns the model asks `plan()`, does what the step says and answers with `report()`. How requests share slots, in
words and with an example: docs/serving.md.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import islice
from typing import ClassVar, NamedTuple

from swat_lm.serve.requests import Fork, Limits, Piece, Request, RequestError, Row, Step

__all__ = ["SCHEDULERS", "Choice", "Entry", "FirstCome", "Sample", "Scheduler"]


@dataclass(eq=False)
class Entry:
    """A request that has not ended. Waiting, reading or decoding."""

    request: Request
    slots: dict[int, int] = field(default_factory=dict)
    """By sample: what it has of its slots, all of them from its first piece on."""
    num_read: int = 0

    @property
    def num_lacking(self) -> int:
        """Slots that it needs of the free ones to start; 0 once it reads."""
        return self.request.samples - len(self.slots)


@dataclass(eq=False)
class Sample:
    """One that decodes."""

    entry: Entry
    index: int
    num_drawn: int

    @property
    def name(self) -> tuple[Hashable, int]:
        """As reports name it."""
        return self.entry.request.key, self.index


class Choice(NamedTuple):
    """What a policy wants done: whose next pieces are read, and who decodes."""

    reads: Sequence[Entry]
    decodes: Sequence[Sample]


class Scheduler(ABC):
    """Requests and slots. A policy is a subclass with `choose` and a row of `SCHEDULERS`; the rest is the same for all.

    Who asks may count on this. A slot belongs to one sample, or is kept, or is free. It is taken with the first piece,
    and free as soon as its sample ends or its request is aborted, but given to others only by the next new plan. A
    prompt is read once, in order, in pieces that do not depend on other requests. A step is within its limits and
    stays the same until it is reported; what was planned counts as done only then. Equal calls give equal steps.
    For one thread at a time.
    """

    name: ClassVar[str]

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.queue: dict[Hashable, Entry] = {}
        """Waiting for slots or for their first turn, in order of arrival."""
        self.reading: dict[Hashable, Entry] = {}
        """Those whose prompts have begun, in that order."""
        self.decoding: dict[Sample, None] = {}
        """Those that had their turn longest ago come first."""
        self._entries: dict[Hashable, Entry] = {}
        self._free = list(range(limits.num_slots))  # a heap: the lowest is given first
        self.kept: dict[int, int] = {}
        """Kept slots that no request has, and how many items each holds."""
        self._planned: tuple[Step, Choice] | None = None

    @abstractmethod
    def choose(self) -> Choice:
        """Whose pieces are read and who decodes; changes nothing.

        To read: entries of `startable()`, a piece each (`next_count`), without leaving one out before another that
        lacks slots. Together at most `limits.token_budget` tokens. Every request must get its turn in the end,
        whatever comes after it.
        """

    @property
    def waiting(self) -> int:
        """Requests that have not started."""
        return len(self.queue)

    @property
    def running(self) -> int:
        """Requests that have started and not ended."""
        return len(self._entries) - len(self.queue)

    @property
    def free_slots(self) -> int:
        """Slots that nobody has or keeps."""
        return len(self._free)

    @property
    def lacking_slots(self) -> int:
        """Slots that the first in line still misses; while above 0, releasing kept ones brings it forward."""
        missing = (entry.num_lacking - len(self._free) for entry in self.queue.values() if entry.num_lacking)
        return max(0, next(missing, 0))

    @property
    def first_lacking(self) -> Hashable | None:
        """The first in line that lacks slots, where one does."""
        lacking = (key for key, entry in self.queue.items() if entry.num_lacking)
        return next(lacking, None) if self.lacking_slots else None

    def add(self, request: Request) -> None:
        """Put a request in line. Raises RequestError where it cannot be served; nothing is changed then."""
        limits = self.limits
        if limits.capacity is not None and request.most_items > limits.capacity:
            raise RequestError(
                "capacity",
                f"the request needs a slot of {request.most_items} tokens (held {request.held}, prompt "
                f"{request.num_tokens}, new {request.new_tokens}), a slot here holds {limits.capacity}; ask for less",
            )
        if request.samples > limits.num_slots:
            raise RequestError(
                "samples", f"samples: expected at most {limits.num_slots}, a slot for each; got {request.samples}"
            )
        if request.key in self._entries:
            raise RequestError(
                "key", f"key: {request.key!r} is a request that has not ended; give every request its own"
            )
        if request.slot is not None and request.slot not in self.kept:
            raise RequestError("slot", f"slot: {request.slot} is in use or not kept; wait for the request that has it")
        if request.slot is not None and request.held != self.kept[request.slot]:
            raise RequestError(
                "invalid",
                f"held: expected {self.kept[request.slot]}, the tokens that slot {request.slot} has read; "
                f"got {request.held}; the token that was drawn last is not among them",
            )
        if len(self.queue) >= limits.most_waiting:
            raise RequestError("queue", f"{len(self.queue)} requests are waiting and no more may; try again later")
        entry = Entry(request)
        if request.slot is not None:
            del self.kept[request.slot]
            entry.slots[0] = request.slot
        self._entries[request.key] = self.queue[request.key] = entry

    def abort(self, key: Hashable) -> bool:
        """End a request in whatever state, as when it failed or nobody wants it; False where none has this key.

        A step that is planned or under way stays as it is, and what it says of this request no longer matters. Its
        slots are free, also one that it was to keep or has brought, since nobody knows what these hold; one that it
        brought is kept as it was where the request has not started.
        """
        entry = self._entries.get(key)
        if entry is None:
            return False
        if key in self.queue and entry.request.slot is not None:
            self.kept[entry.slots.pop(0)] = entry.request.held
        while entry.slots:
            heappush(self._free, entry.slots.popitem()[1])
        self.decoding = {sample: None for sample in self.decoding if sample.entry is not entry}
        self._forget(entry)
        return True

    def stop(self, key: Hashable, held: int) -> int | None:
        """End a request that keeps its slot, in whatever state; returns the slot, which is kept with `held` items.

        Who calls has made the slot hold so many. Where the request has not started, the slot that it brought is kept as
        it was, and None comes where it brought none. A planned step stays as it is, as with `abort`. Raises ValueError
        where no such request is there.
        """
        entry = self._entries.get(key)
        if entry is None or not entry.request.keeps:
            raise ValueError(f"key: expected a request that keeps its slot, got {key!r}")
        if key in self.queue:
            slot = entry.request.slot
        else:
            slot = entry.slots.pop(0)
            self.kept[slot] = held
        self.abort(key)
        return slot

    def hold(self, slot: int, held: int) -> None:
        """Say how many items a kept slot holds, where who keeps it has changed that. Raises ValueError."""
        if slot not in self.kept:
            raise ValueError(f"slot: {slot} is in use or not kept; only who keeps a slot knows what it holds")
        self.kept[slot] = held

    def abandon(self) -> None:
        """Abort every request of the planned step, if there is one, and forget it: nobody knows how far it was done."""
        if self._planned is not None:
            choice = self._planned[1]
            for entry in (*choice.reads, *(sample.entry for sample in choice.decodes)):
                # not a later request with the same key
                if self._entries.get(entry.request.key) is entry:
                    self.abort(entry.request.key)
            self._planned = None

    def adopt(self, slot: int, held: int) -> None:
        """Keep a free slot that was filled from outside with so many items. Raises ValueError where it is not free."""
        if slot not in self._free:
            raise ValueError(f"slot: expected one that is free, got {slot}")
        self._free.remove(slot)
        heapify(self._free)
        self.kept[slot] = held

    def release(self, slot: int) -> None:
        """Make a kept slot free. Raises ValueError where it is not kept, or a request has brought it."""
        if slot not in self.kept:
            raise ValueError(f"slot: {slot} is in use or not kept; release it when the request that has it has ended")
        del self.kept[slot]
        heappush(self._free, slot)

    def plan(self) -> Step:
        """The next step: the same one until it is reported. One with nothing to do needs no report."""
        if self._planned is None:
            choice = self.choose()
            self._check(choice)
            for entry in choice.reads:
                self._start(entry)
            pieces = tuple(self._piece(entry) for entry in choice.reads)
            forks = tuple(
                Fork(piece.key, piece.slot, tuple(islice(entry.slots.values(), 1, None)))
                for entry, piece in zip(choice.reads, pieces, strict=True)
                if piece.is_last and entry.request.samples > 1
            )
            rows = tuple(Row(*sample.name, sample.entry.slots[sample.index]) for sample in choice.decodes)
            step = Step(pieces, forks, rows)
            if not step:
                return step
            self._planned = step, choice
        return self._planned[0]

    def report(
        self, ended: Collection[tuple[Hashable, int]] = (), undone: Collection[Hashable] = ()
    ) -> list[tuple[Hashable, int]]:
        """Say that the planned step is done; returns the samples that ended with it, `(key, sample)`.

        Args:
            ended: samples of the step's rows and last pieces that need no more tokens. Those that have drawn all that
                they may end by themselves, and so does a request that only reads.
            undone: keys of the step of which nothing was done (a call failed before it changed a slot); planned again.
                Requests that cannot go on are aborted instead, before or after.

        Raises:
            ValueError: there is no planned step, or these are not in it; nothing is changed then.
        """
        if self._planned is None:
            raise ValueError("report: no step is planned; call plan() first, and report only steps that do something")
        ended, undone = set(ended), set(undone)
        self._check_report(self._planned, ended, undone)
        (step, choice), self._planned = self._planned, None
        drawn = []
        for sample in choice.decodes:
            # not those of requests that were aborted meanwhile
            if sample in self.decoding:
                del self.decoding[sample]
                self.decoding[sample] = None
                if sample.entry.request.key not in undone:
                    sample.num_drawn += 1
                    drawn.append(sample)
        for entry, piece in zip(choice.reads, step.pieces, strict=True):
            if self._entries.get(piece.key) is entry and piece.key not in undone:
                entry.num_read += piece.count
                drawn += self._begin_decoding(entry) if piece.is_last else []
        done = [one for one in drawn if one.name in ended or one.num_drawn >= one.entry.request.new_tokens]
        for sample in done:
            self._end(sample)
        return [sample.name for sample in done]

    def startable(self) -> Iterator[Entry]:
        """Who has something to read and slots for it, the oldest first.

        Who lacks slots is overtaken by nobody but requests that bring theirs: these take nothing that it waits for, and
        it may be waiting for just their slots.
        """
        yield from self.reading.values()
        free = len(self._free)
        for entry in self.queue.values():
            if entry.num_lacking > free:
                # all that come later and lack any wait behind this one
                free = 0
            else:
                free -= entry.num_lacking
                yield entry

    def next_count(self, entry: Entry) -> int:
        """Tokens of an entry's next piece."""
        return min(self.limits.prefill_chunk, entry.request.num_tokens - entry.num_read)

    def _check(self, choice: Choice) -> None:
        """What a policy may get wrong, and what would hurt other requests."""
        reads, decodes = set(choice.reads), set(choice.decodes)
        assert len(reads) == len(choice.reads)
        assert reads <= {*self.startable()}
        assert len(decodes) == len(choice.decodes)
        assert decodes <= self.decoding.keys()
        assert sum(map(self.next_count, choice.reads)) + len(choice.decodes) <= self.limits.token_budget

    def _start(self, entry: Entry) -> None:
        """Give an entry its slots with its first piece."""
        key = entry.request.key
        if key in self.queue:
            # in this order, so that who is interrupted here goes on with the next plan
            for index in range(len(entry.slots), entry.request.samples):
                entry.slots[index] = heappop(self._free)
            self.reading[key] = self.queue.pop(key)

    def _piece(self, entry: Entry) -> Piece:
        count = self.next_count(entry)
        is_last = entry.num_read + count == entry.request.num_tokens
        return Piece(entry.request.key, entry.slots[0], entry.num_read, count, is_last)

    def _begin_decoding(self, entry: Entry) -> list[Sample]:
        """The samples of an entry whose prompt is read; they have drawn their first token unless it only reads."""
        del self.reading[entry.request.key]
        samples = [Sample(entry, index, min(1, entry.request.new_tokens)) for index in entry.slots]
        self.decoding |= dict.fromkeys(samples)
        return samples

    def _end(self, sample: Sample) -> None:
        del self.decoding[sample]
        entry, slot = sample.entry, sample.entry.slots.pop(sample.index)
        if entry.request.keeps:
            # the token that was drawn last is not read
            self.kept[slot] = entry.request.held + entry.num_read + max(0, sample.num_drawn - 1)
        else:
            heappush(self._free, slot)
        if not entry.slots:
            self._forget(entry)

    def _forget(self, entry: Entry) -> None:
        for entries in (self._entries, self.queue, self.reading):
            entries.pop(entry.request.key, None)

    def _check_report(
        self, planned: tuple[Step, Choice], ended: set[tuple[Hashable, int]], undone: set[Hashable]
    ) -> None:
        step, choice = planned
        endable = {(row.key, row.sample) for row in step.rows}
        for piece, entry in zip(step.pieces, choice.reads, strict=True):
            endable |= {(piece.key, index) for index in range(entry.request.samples) if piece.is_last}
        if wrong := ended - endable:
            raise ValueError(f"ended: {sorted(wrong, key=repr)} are no samples that drew a token in this step")
        if wrong := undone - {one.key for one in (*step.pieces, *step.rows)}:
            raise ValueError(f"undone: {sorted(wrong, key=repr)} have no part in this step")
        if wrong := undone & {key for key, _ in ended}:
            raise ValueError(f"undone: {sorted(wrong, key=repr)} are said to have ended too; name them once")


class FirstCome(Scheduler):
    """Requests start in order of arrival, and those that read are served in that order; rows decode in turns.

    Decoding comes before all pieces but one, the oldest: so neither many rows stop prompts, nor a long prompt the rows.
    """

    name = "first-come"

    def choose(self) -> Choice:
        """The oldest piece, all rows that fit beside it, then pieces in order until one does not fit."""
        startable = list(self.startable())
        rest = self.limits.token_budget
        oldest = self.next_count(startable[0]) if startable else 0
        decodes = list(islice(self.decoding, rest - oldest))
        rest -= len(decodes)
        reads = []
        for entry in startable:
            rest -= self.next_count(entry)
            if rest < 0:
                break
            reads.append(entry)
        return Choice(reads, decodes)


SCHEDULERS: dict[str, type[Scheduler]] = {kind.name: kind for kind in (FirstCome,)}
