"""What a scheduler is asked and what it answers: limits, requests and why one is not taken, steps. No torch."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal, NamedTuple

__all__ = ["Fork", "Limits", "Piece", "Request", "RequestError", "Row", "Step"]

Kind = Literal["invalid", "samples", "capacity", "slot", "key", "queue"]


class RequestError(ValueError):
    """A request that is not taken; nothing has changed.

    `kind` says why: `invalid` values, more `samples` than slots, more tokens than the `capacity` of a slot, a `slot`
    that is not kept or that another request has, a `key` that is in use, or a full `queue`. With the last, and with a
    slot in use, it is worth while to try the same again.
    """

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(message)
        self.kind: Kind = kind


@dataclass(frozen=True)
class Limits:
    """What a scheduler shares out. With `token_budget >= num_slots + prefill_chunk` no decoding row ever sits out."""

    num_slots: int
    token_budget: int
    """Most tokens of a step, pieces of prompts and decoded tokens together; above `prefill_chunk`."""
    prefill_chunk: int
    """Prompts are cut at multiples of this, whatever else runs, and read at most one piece a step."""
    most_waiting: int = 256
    """Requests that may wait; more are refused."""
    capacity: int | None = None
    """Items that one slot can hold; None where every layer keeps a state of constant size."""

    def __post_init__(self) -> None:
        for name in ("num_slots", "token_budget", "prefill_chunk", "most_waiting", "capacity"):
            value = getattr(self, name)
            if value is None and name == "capacity":
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name}: expected a whole number, got {value!r}")
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if self.token_budget <= self.prefill_chunk:
            raise ValueError(
                f"token_budget: expected above prefill_chunk ({self.prefill_chunk}), got {self.token_budget}; "
                "a step must have room for a piece of a prompt and a decoded token"
            )


@dataclass(frozen=True)
class Request:
    """A prompt to be read once, and what is to be drawn after it. Raises RequestError (`invalid`)."""

    key: Hashable
    num_tokens: int
    """Of the prompt: what is to be read. 0 where what the slot that it brings has read is what it goes on from."""
    new_tokens: int = 0
    """Most tokens that each sample draws: the first after the prompt, the others after a decoded one. 0: only read."""
    samples: int = 1
    """Continuations of the prompt, each in a slot of its own."""
    held: int = 0
    """Items that its slot holds before: of a session that goes on, in the slot that it brings or from a snapshot. Of a
    slot that it brings they must be those that it holds."""
    slot: int | None = None
    """A kept slot that it reads on in; None: one of the free."""
    keep: bool = False
    """Whether its slot is kept when it ends, until `release`; one that was brought always is. Not where it is aborted
    after it has started."""

    def __post_init__(self) -> None:
        least_tokens = 1 if self.slot is None or self.new_tokens == 0 else 0
        for name, least in (("num_tokens", least_tokens), ("new_tokens", 0), ("samples", 1), ("held", 0)):
            if (value := getattr(self, name)) < least:
                raise RequestError("invalid", f"{name}: expected at least {least}, got {value}")
        if self.samples > 1 and (self.new_tokens == 0 or self.keeps):
            why = "nothing is drawn" if self.new_tokens == 0 else "a kept slot goes on from one of them"
            raise RequestError("invalid", f"samples: expected 1, since {why}; got {self.samples}")

    @property
    def keeps(self) -> bool:
        """Whether its slot is kept when it ends."""
        return self.keep or self.slot is not None

    @property
    def most_items(self) -> int:
        """Items of its slots at the end; the last token that is drawn is not read any more."""
        return self.held + self.num_tokens + max(0, self.new_tokens - 1)


class Piece(NamedTuple):
    """Prompt tokens `start` to `start + count` of a request go into a slot; none where it has none, and only draws.

    At a start of 0 the slot is emptied first, or gets the session's snapshot, unless the request brought it.
    """

    key: Hashable
    slot: int
    start: int
    count: int
    is_last: bool
    """Then every sample draws its first token from the logits after this piece."""


class Fork(NamedTuple):
    """The prompt is read: slots `targets` of samples 1, 2, ... get what `source`, the slot of sample 0, holds."""

    key: Hashable
    source: int
    targets: tuple[int, ...]


class Row(NamedTuple):
    """The last token that a sample drew is read by its slot, and another one drawn."""

    key: Hashable
    sample: int
    slot: int


@dataclass(frozen=True)
class Step:
    """What to do next: read the pieces, then fork; the rows decode one token each. False where there is nothing."""

    pieces: tuple[Piece, ...] = ()
    forks: tuple[Fork, ...] = ()
    rows: tuple[Row, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.pieces or self.rows)

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model."""
        return sum(piece.count for piece in self.pieces) + len(self.rows)
