"""One model and a pool of slots serving many requests: step by step, pieces of prompts beside rows that decode.

The scheduler says what a step does (scheduler.py), the model does it, the sampler says what comes next (sampler.py) and
the text when it ends (text.py). Each piece of a prompt is read by itself, without padding, and all rows are decoded as
one batch of a fixed size: so a reply is the same to the bit whatever runs beside it. For one thread at a time.

Legend: N slots, B rows of a batch, T tokens of a piece, V vocabulary.
"""

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from swat_lm.model.configuration import SwatConfig
from swat_lm.model.cost import state_bytes
from swat_lm.model.modeling import SwatForCausalLM
from swat_lm.serve.requests import Limits, Piece, Request, Row
from swat_lm.serve.sampler import Choice, SamplingError, StreamSampler, TokenConstraint, choose, token_logprobs
from swat_lm.serve.sampling import Sampling
from swat_lm.serve.scheduler import SCHEDULERS
from swat_lm.serve.text import ReplyText

__all__ = ["Engine", "Event", "Generation", "slots_in"]

# tokens that a reply without a limit may have: more than any lifetime
ENDLESS = 2**60


@dataclass(frozen=True)
class Generation:
    """A prompt, and what is to be drawn after it."""

    key: Hashable
    tokens: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    """With `max_tokens` 0 the prompt is only read."""
    constraint: TokenConstraint | None = None
    """What the one reply must keep to."""
    prompt_logprobs: int | None = None
    """Alternatives whose log-probabilities come with every token of the prompt but the first; None: none."""
    held: int = 0
    """Tokens that the slot it brings has read."""
    slot: int | None = None
    """A kept slot that it goes on in; None: an empty one."""
    keep: bool = False
    """Whether its slot is kept when it ends, until `Engine.scheduler.release`."""


@dataclass(frozen=True)
class Event:
    """What a step brought to one reply, or to a prompt."""

    key: Hashable
    sample: int = 0
    choice: Choice | None = None
    """The token that was drawn."""
    text: str = ""
    """What became sure of the reply's text."""
    prompt: tuple[Choice, ...] = ()
    """Of a piece that was read: its tokens, but the prompt's first, with their log-probabilities."""
    ended: str | None = None
    """The reason of `ReplyText.ended`; "read" where nothing was to be drawn; "error"."""
    error: str | None = None


@dataclass
class Reply:
    """One of the replies to a request."""

    sampler: StreamSampler
    text: ReplyText
    token: int = 0
    """Drawn last: its slot has not read it yet."""


@dataclass
class Running:
    """A request that has not ended."""

    generation: Generation
    replies: list[Reply]
    logits: Tensor | None = None
    """`[1, V]` after what was read last, where the next piece's first token is to be weighed by them."""


class Engine:
    """Serves `submit`ted requests, a step at a time."""

    def __init__(
        self,
        model: SwatForCausalLM,
        limits: Limits,
        tokenizer: Any,
        end_tokens: Collection[int] = (),
        policy: str = "first-come",
    ) -> None:
        """Take memory for the pool; nothing is allocated for it later.

        Args:
            limits: `capacity` must be given where a layer keeps everything it has seen.
            tokenizer: anything with Hugging Face's `decode`.
            end_tokens: ids that end a text.
            policy: a row of SCHEDULERS.

        Raises:
            ValueError: an unknown policy, or a model that grows without a capacity.
        """
        if policy not in SCHEDULERS:
            raise ValueError(f"policy: expected one of {', '.join(SCHEDULERS)}, got {policy!r}")
        self.model, self.tokenizer, self.end_tokens = model.eval(), tokenizer, frozenset(end_tokens)
        self.scheduler = SCHEDULERS[policy](limits)
        self.batches = batch_sizes(limits.num_slots)
        # rows that only fill a batch up have slots too, which nobody reads
        spare = max(self._batch_of(count) - count for count in range(1, limits.num_slots + 1))
        self.slots = model.init_state(limits.num_slots + spare, capacity=limits.capacity)
        if self.slots.grows and limits.capacity is None:
            raise ValueError("capacity: a layer of the model keeps all it has seen; say how many tokens a slot holds")
        # requests come and go at positions of their own
        self.slots.ragged = True
        self._requests: dict[Hashable, Running] = {}

    @property
    def is_idle(self) -> bool:
        """Whether no request is there."""
        return not self._requests

    def submit(self, generation: Generation) -> None:
        """Put a request in line.

        Raises:
            RequestError: it cannot be served, now or at all (its `kind` says why); nothing is changed then.
            ValueError: tokens that the model does not have, or options that contradict each other.
        """
        sampling, vocabulary = generation.sampling, self.model.config.vocab_size
        for token in generation.tokens:
            if not 0 <= token < vocabulary:
                raise ValueError(f"tokens: expected ids from 0 to {vocabulary - 1:,}, the model's, got {token}")
        sampling.check_token_ids(vocabulary)
        if generation.constraint is not None and sampling.n > 1:
            raise ValueError(f"constraint: it is followed through one reply; expected n = 1, got {sampling.n}")
        replies = [
            Reply(StreamSampler(sampling, sample, generation.constraint),
                  ReplyText(self.tokenizer, sampling, self.end_tokens))
            for sample in range(sampling.n)
        ]  # fmt: skip
        for reply in replies:
            reply.sampler.read(generation.tokens)
        self.scheduler.add(self._request(generation))
        self._requests[generation.key] = Running(generation, replies)

    def abort(self, key: Hashable) -> bool:
        """End a request in whatever state; its slots are free at once. False where none has this key."""
        self._requests.pop(key, None)
        return self.scheduler.abort(key)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Do what is next, for every request that has its turn; returns what came of it, nothing where all are idle.

        What goes wrong in a piece ends that request, and in decoding those of its rows, with an "error"; others go on.
        """
        step = self.scheduler.plan()
        if not step:
            return []
        events: list[Event] = []
        for piece in step.pieces:
            try:
                events += self._read(piece)
            except (RuntimeError, ValueError) as error:
                events.append(self._fail(piece.key, error))
        for fork in step.forks:
            if fork.key in self._requests:
                source = torch.full((len(fork.targets),), fork.source)
                self.slots.copy(*(self._on_device(numbers) for numbers in (source, torch.tensor(fork.targets))))
        for piece in step.pieces:
            if piece.is_last and piece.key in self._requests:
                events += self._draw_first(piece.key)
        rows = [row for row in step.rows if row.key in self._requests]
        try:
            events += self._decode(rows) if rows else []
        except (RuntimeError, ValueError) as error:
            events += [self._fail(key, error) for key in dict.fromkeys(row.key for row in rows)]
        return events + self._report(events)

    def _report(self, events: Sequence[Event]) -> list[Event]:
        """Tell the scheduler whose replies ended, and forget requests that have none left.

        Returns the ends of replies whose slots are full.
        """
        ended = [(event.key, event.sample) for event in events if event.ended not in (None, "error", "read")]
        ended = [name for name in ended if name[0] in self._requests]
        full = []
        for key, sample in self.scheduler.report(ended):
            text = self._requests[key].replies[sample].text
            if text.ended is None:
                full.append(Event(key, sample, text=text.finish("length"), ended="length"))
        for event in [*events, *full]:
            running = self._requests.get(event.key)
            if event.ended is not None and running is not None and all(reply.text.ended for reply in running.replies):
                del self._requests[event.key]
        return full

    def _request(self, generation: Generation) -> Request:
        limits, sampling = self.scheduler.limits, generation.sampling
        most = ENDLESS
        if limits.capacity is not None:
            most = max(1, limits.capacity - generation.held - len(generation.tokens) + 1)
        return Request(
            generation.key, len(generation.tokens), most if sampling.max_tokens is None else sampling.max_tokens,
            sampling.n, generation.held, generation.slot, generation.keep,
        )  # fmt: skip

    def _read(self, piece: Piece) -> list[Event]:
        """A piece of a prompt into its slot; logits after it are kept where they are needed."""
        running = self._requests[piece.key]
        generation, slot = running.generation, self._on_device(torch.tensor([piece.slot]))
        if piece.start == 0 and generation.slot is None:
            self.slots.reset(slot)
        part = list(generation.tokens[piece.start : piece.start + piece.count])
        hidden = self.model.extend(
            self._on_device(torch.tensor([part])), self.slots, slot=slot, num_past=generation.held + piece.start
        )
        events = []
        if generation.prompt_logprobs is not None:
            logits = self.model.lm_head(hidden)[0]
            before = logits[:-1] if running.logits is None else torch.cat((running.logits, logits[:-1]))
            weighed = part[len(part) - len(before) :]
            vocabulary = generation.sampling.vocab_size
            choices = token_logprobs(before, weighed, generation.prompt_logprobs, vocabulary) if weighed else []
            events.append(Event(piece.key, prompt=tuple(choices)))
            running.logits = logits[-1:]
        elif piece.is_last and generation.sampling.max_tokens != 0:
            running.logits = self.model.lm_head(hidden[:, -1])
        if piece.is_last and generation.sampling.max_tokens == 0:
            running.logits = None
            events.append(Event(piece.key, ended="read"))
        return events

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
        tokens = torch.tensor(last + [0] * len(spare))[:, None]
        slot = self._on_device(torch.tensor([row.slot for row in rows] + spare))
        if spare:
            # they read one token for ever, and never fill up
            self.slots.position[self._on_device(torch.tensor(spare))] = 0
        logits = self.model.decode_step(self._on_device(tokens), self.slots, slot, batch_invariant=True)
        return self._draw(names, logits[: len(rows)])

    def _draw(self, names: Sequence[tuple[Hashable, int]], logits: Tensor) -> list[Event]:
        """The next token of each reply from logits `[B, V]`; a request of which one has none ends with an error."""
        replies = [self._requests[key].replies[sample] for key, sample in names]
        events = []
        choices = choose([reply.sampler for reply in replies], logits)
        for (key, sample), reply, choice in zip(names, replies, choices, strict=True):
            if isinstance(choice, SamplingError):
                events += [self._fail(key, choice)] if key in self._requests else []
                continue
            reply.token = choice.token
            text = reply.text.push(choice.token)
            ended = None if reply.text.ended is None else reply.text.ended.reason
            events.append(Event(key, sample, choice, text, ended=ended))
        return events

    def _fail(self, key: Hashable, error: Exception) -> Event:
        self.abort(key)
        return Event(key, ended="error", error=str(error))

    def _batch_of(self, count: int) -> int:
        """The batch in which so many rows are decoded."""
        return next(size for size in self.batches if size >= count)

    def _on_device(self, numbers: Tensor) -> Tensor:
        return numbers.to(self.slots.position.device)


def batch_sizes(num_slots: int) -> tuple[int, ...]:
    """Powers of two below the number of slots, and that number."""
    return (*(1 << power for power in range((num_slots - 1).bit_length())), num_slots)


def slots_in(config: SwatConfig, memory: int, capacity: int | None = None, dtype_bytes: int = 4) -> int:
    """How many slots fit into `memory` bytes, with those that fill batches up; raises ValueError where none does.

    Args:
        capacity: tokens that a slot holds where a layer keeps everything.
        dtype_bytes: of one element of the state, where the layer does not ask for wider ones.
    """
    each = state_bytes(config, context=capacity, dtype_bytes=dtype_bytes) + 16
    fits = memory // each
    # a batch is filled up to less than twice its rows
    count = next((count for count in range(fits, 0, -1) if count + most_spare(count) <= fits), 0)
    if not count:
        raise ValueError(f"memory: a slot takes {each:,} bytes, {memory:,} are too few; give more, or a smaller window")
    return count


def most_spare(num_slots: int) -> int:
    """Rows that fill up the batch which needs most of them."""
    sizes = batch_sizes(num_slots)
    return max(next(size for size in sizes if size >= count) - count for count in range(1, num_slots + 1))
