"""One model and a pool of slots serving many requests: step by step, pieces of prompts beside rows that decode.

The scheduler says what a step does (scheduler.py), the model does it, the sampler says what comes next (sampler.py) and
the text when it ends (text.py). All pieces are read in one call (reading.py), and all rows are decoded as one batch of
one of a few sizes: so among calls of one size a reply is the same to the bit whatever its mates hold, and between
sizes it differs by the rounding of the dtype (docs/serving.md). For one thread at a time.

Legend: N slots, B rows of a batch, T tokens of a piece, V vocabulary.
"""

from collections.abc import Collection, Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from swat_lm.model.modeling import SwatForCausalLM
from swat_lm.model.slots import Slots
from swat_lm.serve.generation import Event, Fed, Generation
from swat_lm.serve.pool import batch_sizes, pool_of
from swat_lm.serve.reading import read_together, take_in
from swat_lm.serve.requests import Limits, Piece, Request, Row, Step
from swat_lm.serve.running import Reply, Running
from swat_lm.serve.sampler import SamplingError, StreamSampler, choose
from swat_lm.serve.scheduler import SCHEDULERS
from swat_lm.serve.stepping import GraphedSteps, Steps
from swat_lm.serve.text import ReplyText, Sheltered

__all__ = ["Engine", "Event", "Generation"]

# tokens that a reply without a limit may have: more than any lifetime
ENDLESS = 2**60


class Engine:
    """Serves `submit`ted requests, a step at a time."""

    def __init__(
        self,
        model: SwatForCausalLM,
        limits: Limits,
        tokenizer: Any,
        end_tokens: Collection[int] = (),
        policy: str = "first-come",
        slots: Slots | None = None,
        restorable: bool = False,
        graphs: bool = False,
    ) -> None:
        """Take memory for the pool; nothing is allocated for it later.

        Args:
            limits: `capacity` must be given where a layer keeps everything it has seen.
            tokenizer: anything with Hugging Face's `decode`.
            end_tokens: ids that end a text.
            policy: a row of SCHEDULERS.
            slots: a pool that is there already, such as the state of one stream, which may grow; `scheduler.adopt`
                says what it holds. None: made here.
            restorable: have a second place for every slot, where what a request goes on from is copied if it keeps its
                slot: so the slot can go back there (`roll_back`), and does where the request fails.
            graphs: decode by CUDA graphs (stepping.py says which models cannot).

        Raises:
            ValueError: an unknown policy, a model that grows without a capacity, a pool of another size or model, or
                `graphs` elsewhere than on CUDA or for a model that grows.
        """
        if policy not in SCHEDULERS:
            raise ValueError(f"policy: expected one of {', '.join(SCHEDULERS)}, got {policy!r}")
        if graphs and model.device.type != "cuda":
            raise ValueError(f"graphs: expected a model on a CUDA device, got {model.device.type}; leave it out")
        self.model, self.tokenizer, self.end_tokens = model.eval(), tokenizer, frozenset(end_tokens)
        self.scheduler = SCHEDULERS[policy](limits)
        self.batches = batch_sizes(limits.num_slots)
        self.restorable = restorable
        self.slots = pool_of(model, limits, slots, restorable)
        self.steps = GraphedSteps(model, self.slots, self.batches) if graphs else Steps(model, self.slots)
        self._requests: dict[Hashable, Running] = {}
        self.casualties: list[Event] = []
        """Of the last step that was raised out of: ends of requests whose slots are kept, as they were before them."""

    @property
    def is_idle(self) -> bool:
        """Whether no request is there."""
        return not self._requests

    def submit(self, generation: Generation) -> None:
        """Put a request in line.

        Raises:
            RequestError: it cannot be served, now or at all (its `kind` says why); nothing is changed then.
            ValueError: options that contradict each other.
        """
        generation.check(self.model.config.vocab_size)
        sampling, constraint, tokens = generation.sampling, generation.constraint, tuple(generation.tokens)
        replies = [
            Reply(StreamSampler(sampling, sample, None if constraint is None else constraint.copy()),
                  ReplyText(Sheltered(self.tokenizer), sampling, self.end_tokens))
            for sample in range(sampling.n)
        ]  # fmt: skip
        for reply in replies:
            reply.sampler.read(tokens)
        self.scheduler.add(self._request(generation))
        self._requests[generation.key] = Running(generation, tokens, replies)

    def abort(self, key: Hashable) -> bool:
        """End a request in whatever state; its slots are free at once. False where none has this key.

        So is a slot that it brought, whose contents are lost, unless it had not started: then it is kept as it was
        (`scheduler.kept` says which are).
        """
        self._requests.pop(key, None)
        return self.scheduler.abort(key)

    def stop(self, key: Hashable) -> Event:
        """End a request that keeps its slot where it stands; the event that says so names the slot, and has the text
        that was held back.

        For its keeper, between steps: where nothing was decoded yet, or too much, the slot may go back to where the
        request began (`roll_back`). One that has not started leaves the slot that it brought as it was, and none where
        it brought none. Raises ValueError where no such request is there.
        """
        running = self._requests.get(key)
        if running is None or not running.keeps:
            raise ValueError(f"key: expected a request that keeps its slot, got {key!r}")
        try:
            text = running.replies[0].text.finish("stopped")
        except Exception:
            # what is held back is no text yet, and who stops must be able to
            text = ""
        held, fed = running.generation.held + sum(fed.count for fed in running.fed), tuple(running.fed)
        slot = self.scheduler.stop(key, held)
        del self._requests[key]
        return Event(key, text=text, ended="stopped", slot=slot, held=None if slot is None else held, fed=fed)

    @torch.inference_mode()
    def roll_back(self, slot: int, held: int) -> None:
        """Let a kept slot hold the `held` tokens again which it held when the last request that had it began.

        Raises ValueError in an engine that is not `restorable`, and for a slot that is not kept.
        """
        if not self.restorable:
            raise ValueError("roll_back: expected an engine made with restorable=True, which keeps what to go back to")
        self.scheduler.hold(slot, held)
        at = self._on_device(torch.tensor([slot]))
        self.slots.copy(at + self._first_place, at)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Do what is next, for every request that has its turn; returns what came of it, nothing where all are idle.

        What goes wrong in a request's draw or text ends that request with an "error", and what does in reading all
        pieces, or decoding all rows, as one call ends those that have one; others go on. What is no Exception (an
        interruption from the keyboard) is raised; requests that had their turn are aborted then, their events lost, and
        the next step serves the others. The ends of those whose slots could go back are in `casualties`.
        """
        step, events = self.scheduler.plan(), []
        if not step:
            return []
        try:
            self._do(step, events)
            return self._report(events)
        except BaseException as error:
            # nobody knows how far it got, and to do it again would read tokens twice
            ends = [self._fail(key, error) for key in dict.fromkeys(one.key for one in (*step.pieces, *step.rows))]
            self.casualties = [event for event in ends if event.slot is not None]
            self.scheduler.abandon()
            raise

    def _do(self, step: Step, events: list[Event]) -> None:
        """What the step says; events are added as they come."""
        events += self._read(step.pieces)
        for fork in step.forks:
            if fork.key in self._requests:
                try:
                    source = torch.full((len(fork.targets),), fork.source)
                    self.slots.copy(*(self._on_device(numbers) for numbers in (source, torch.tensor(fork.targets))))
                except Exception as error:
                    events.append(self._fail(fork.key, error))
        for piece in step.pieces:
            if piece.is_last and piece.key in self._requests:
                try:
                    events += self._draw_first(piece.key)
                except Exception as error:
                    events.append(self._fail(piece.key, error))
        # by slot, so that rows keep their order while they run
        rows = sorted((row for row in step.rows if row.key in self._requests), key=lambda row: row.slot)
        try:
            events += self._decode(rows) if rows else []
        except Exception as error:
            events += [self._fail(key, error) for key in dict.fromkeys(row.key for row in rows)]

    def _report(self, events: list[Event]) -> list[Event]:
        """Tell the scheduler whose replies ended, and forget requests that have none left.

        Returns the events with those of replies whose slots are full, and with the slots that are kept.
        """
        ended = [(event.key, event.sample) for event in events if event.ended not in (None, "error", "read")]
        ended = [name for name in ended if name[0] in self._requests]
        for key, sample in self.scheduler.report(ended):
            running = self._requests.get(key)
            # none where another sample of it has just failed
            if running is not None and running.replies[sample].text.ended is None:
                try:
                    text = running.replies[sample].text.finish("length")
                    shown = running.replies[sample].text.shown
                    events.append(Event(key, sample, text=text, ended="length", shown=shown))
                except Exception as error:
                    events.append(self._fail(key, error))
        return [self._finished(event) for event in events]

    def _finished(self, event: Event) -> Event:
        """An event with the slot that is kept; a request is forgotten with its last reply."""
        running = self._requests.get(event.key)
        if event.ended is None or running is None or not all(reply.text.ended for reply in running.replies):
            return event
        del self._requests[event.key]
        if not running.keeps:
            return event
        return replace(event, slot=running.slot, held=self.scheduler.kept[running.slot], fed=tuple(running.fed))

    def _request(self, generation: Generation) -> Request:
        limits, sampling = self.scheduler.limits, generation.sampling
        most = ENDLESS
        if limits.capacity is not None:
            most = max(1, limits.capacity - generation.held - len(generation.tokens) + 1)
        return Request(
            generation.key, len(generation.tokens), most if sampling.max_tokens is None else sampling.max_tokens,
            sampling.n, generation.held, generation.slot, generation.keep,
        )  # fmt: skip

    def _read(self, pieces: Sequence[Piece]) -> list[Event]:
        """Pieces of prompts into their slots, all in one call; logits after them are kept where they are needed."""
        events, ready = [], []
        for piece in pieces:
            try:
                # who has no tokens goes on from logits that it brought
                ready += [] if self._begin(piece) else [piece]
            except Exception as error:
                events.append(self._fail(piece.key, error))
        if not ready:
            return events
        try:
            found = read_together(self.model, self.slots, [(self._requests[piece.key], piece) for piece in ready])
        except Exception as error:
            return events + [self._fail(piece.key, error) for piece in ready]
        for piece, read in zip(ready, found, strict=True):
            try:
                if self._requests[piece.key].keeps:
                    self._requests[piece.key].fed.append(Fed("piece", *read.place))
                events += take_in(self._requests[piece.key], piece, read)
            except Exception as error:
                events.append(self._fail(piece.key, error))
        return events

    def _begin(self, piece: Piece) -> bool:
        """Make a slot ready to read; whether that is all, since there is nothing to read."""
        running = self._requests[piece.key]
        running.slot = piece.slot
        if running.generation.logits is not None:
            running.logits = self._on_device(running.generation.logits)[None]
        if piece.start == 0:
            self._prepare(running, piece.slot)
        return piece.count == 0

    def _prepare(self, running: Running, slot: int) -> None:
        """Let the slot hold what the request goes on from, and remember that where it can go back."""
        generation = running.generation
        if generation.snapshot is not None:
            self.slots.restore(self._on_device(torch.tensor([slot])), generation.snapshot)
            # as large as a slot, and read
            running.generation = replace(generation, snapshot=None)
        elif generation.slot is None:
            self.slots.reset(self._rows([slot]))
        if self.restorable and running.keeps:
            at = self._on_device(torch.tensor([slot]))
            self.slots.copy(at, at + self._first_place)
        running.is_prepared = True

    def _draw_first(self, key: Hashable) -> list[Event]:
        """The first token of every reply to a prompt that is read; none where it was only to be read."""
        running = self._requests[key]
        if running.logits is None:
            return []
        count = len(running.replies)
        logits, running.logits = running.logits, None
        return self._draw([(key, sample) for sample in range(count)], logits.expand(count, -1))

    def _decode(self, rows: Sequence[Row]) -> list[Event]:
        """The last tokens of all rows as one batch."""
        names = [(row.key, row.sample) for row in rows]
        last = [self._requests[key].replies[sample].token for key, sample in names]
        size = self._batch_of(len(rows))
        spare = list(range(self.scheduler.limits.num_slots, self.scheduler.limits.num_slots + size - len(rows)))
        if spare:
            # they read one token for ever, and never fill up
            self.slots.position[self._on_device(torch.tensor(spare))] = 0
        logits = self.steps.step(last + [0] * len(spare), [row.slot for row in rows] + spare)
        for place, (key, _) in enumerate(names):
            if (running := self._requests[key]).keeps:
                running.note_step(size, place)
        return self._draw(names, logits[: len(rows)])

    def _draw(self, names: Sequence[tuple[Hashable, int]], logits: Tensor) -> list[Event]:
        """The next token of each reply from logits `[B, V]`; a request of which one has none ends with an error."""
        replies = [self._requests[key].replies[sample] for key, sample in names]
        events = []
        choices = choose([reply.sampler for reply in replies], logits)
        for (key, sample), reply, choice in zip(names, replies, choices, strict=True):
            # nothing comes after an error
            if key not in self._requests:
                continue
            if isinstance(choice, SamplingError):
                events.append(self._fail(key, choice))
                continue
            try:
                reply.token = choice.token
                text = reply.text.push(choice.token)
                ended = None if reply.text.ended is None else reply.text.ended.reason
                constraint = reply.sampler.constraint
                if ended in (None, "length") and constraint is not None and constraint.finished:
                    # with its last token too a reply is whole
                    text, ended = text + reply.text.finish("constraint"), "constraint"
            except Exception as error:
                events.append(self._fail(key, error))
                continue
            events.append(Event(key, sample, choice, text, ended=ended, shown=reply.text.shown))
        return events

    def _fail(self, key: Hashable, error: BaseException) -> Event:
        """End a request with an error; its slot goes back to where the request began, where it can."""
        says_it = isinstance(error, RuntimeError | ValueError) and str(error)
        said = str(error) if says_it else f"{type(error).__name__}: {error}"
        event = Event(key, ended="error", error=said, cause=error if isinstance(error, Exception) else None)
        running = self._requests.get(key)
        if running is None or not self.restorable or not running.keeps:
            self.abort(key)
            return event
        slot, held = running.generation.slot, running.generation.held
        if slot is None and not running.is_prepared:
            # it holds what somebody has left there
            self.abort(key)
            return event
        # not `stop`, whose text may be what has failed
        try:
            slot = self.scheduler.stop(key, held)
        except ValueError:
            # it has ended for the scheduler, which keeps its slot, and its last text has failed
            slot = running.slot
        del self._requests[key]
        try:
            if running.is_prepared and slot is not None:
                self.roll_back(slot, held)
        except Exception:
            # of a device that fails altogether
            self.scheduler.release(slot)  # type: ignore[arg-type]
            return event
        return replace(event, slot=slot, held=held)

    @property
    def _first_place(self) -> int:
        """How far behind a slot its place to go back to lies."""
        return self.slots.num_slots - self.scheduler.limits.num_slots

    def _batch_of(self, count: int) -> int:
        """The batch in which so many rows are decoded."""
        return next(size for size in self.batches if size >= count)

    def _rows(self, slots: Sequence[int]) -> Tensor | None:
        """Slots by number as the model takes them; a pool of one is a stream, which has a shorter way."""
        return None if self.slots.num_slots == 1 else self._on_device(torch.tensor(slots))

    def _on_device(self, numbers: Tensor) -> Tensor:
        return numbers.to(self.slots.position.device)
