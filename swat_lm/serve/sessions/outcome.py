"""One turn of a session: what it reads and draws, and what the session holds after it, which is what the client saw."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from swat_lm.serve.engine import Event, Generation
from swat_lm.serve.sessions.conversation import Conversation
from swat_lm.serve.sessions.record import Fed, Record, Turn

__all__ = ["Asked", "Outcome", "Running", "as_json", "outcome"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """A request that goes on with a session."""

    generation: Generation
    """What is new, and how a reply is drawn; without slot, snapshot and what is pending, which the session brings."""
    conversation: Conversation | None = None
    """Of a chat: its messages with the new ones."""


@dataclass
class Running:
    """A turn that has not ended."""

    asked: Asked
    before: Record
    tokens: tuple[int, ...]
    """What it reads: what was pending, and what is new."""
    deliver: Callable[[Event], None]
    drawn: list[int] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    """Of the reply's text, as they were delivered."""
    shown: tuple[int, str] = (0, "")
    """What was delivered, as `Event.shown` has it."""
    is_heard: bool = True
    """Whether what it brings can be delivered still."""

    def take(self, event: Event) -> None:
        """Note what an event brings."""
        if event.choice is not None:
            self.drawn.append(event.choice.token)
        self.parts.append(event.text)

    def say(self, event: Event) -> None:
        """Deliver an event that was taken; once that has failed nothing more."""
        if not self.is_heard:
            return
        try:
            self.deliver(event)
        except Exception:
            self.is_heard = False
            log.exception("sessions: nobody hears any more of a turn of %r", self.before.session)
        else:
            self.shown = event.shown


@dataclass(frozen=True)
class Outcome:
    """How a turn leaves its session."""

    turn: Turn
    goes_back: bool
    """Whether the slot must go back to where the turn began, since it has read what the client did not see. What the
    client saw is pending then."""


def outcome(
    running: Running, shown: tuple[int, str], fed: Sequence[Any], text: str, model: str, tokenizer: Any, now: float
) -> Outcome:
    """What the session holds after a turn.

    Args:
        shown: how many tokens of the reply the client saw wholly, and the text that it saw of those after them.
        fed: how the slot has read what it has read in this turn (`Event.fed`).
        text: what the client saw of the reply.
        model: the fingerprint of the weights.
    """
    count, tail = shown
    seen = [*running.drawn[:count], *(tokenizer.encode(tail, add_special_tokens=False) if tail else [])]
    num_read = sum(one.count for one in fed)
    of_reply = num_read - len(running.tokens)
    goes_back = of_reply > count
    if goes_back:
        read, how, pending = (), (), (*running.tokens, *seen)
    elif of_reply < 0:
        raise ValueError("fed: expected the whole prompt of a turn that has ended")
    else:
        read, how, pending = (*running.tokens, *running.drawn[:of_reply]), tuple(fed), tuple(seen[of_reply:])
    before, conversation = running.before, running.asked.conversation
    known: dict[str, Any] = {}
    if conversation is not None:
        messages, chain = conversation.replied(text)
        known = {"messages": messages, "chain": chain, "system": conversation.system}
    after = before.model_copy(update={
        "held": before.held + len(read), "pending": pending, "turns": before.turns + 1, "used": now, **known,
    })  # fmt: skip
    return Outcome(Turn(model=model, after=after, tokens=read, fed=as_json(how)), goes_back)


def as_json(fed: Sequence[Any]) -> tuple[Fed, ...]:
    """How tokens were read (`Event.fed`), as a journal keeps it."""
    return tuple(Fed(kind=one.kind, size=one.size, place=one.place, count=one.count) for one in fed)
