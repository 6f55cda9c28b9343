"""What is known of a session beside its state, and of one turn of it: JSON that is checked where it comes back.

No torch.
"""

import hashlib
import json
import zlib
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

__all__ = ["MOST_NAME", "Fed", "Record", "SessionError", "Turn", "check_name", "file_name", "parse_journal"]

Kind = Literal["name", "busy", "kind", "unknown", "exists", "history", "model", "damaged", "storage"]
Whole = Annotated[int, Field(ge=0, lt=2**53, strict=True)]
MOST_NAME = 256


class SessionError(ValueError):
    """Something that a session cannot do now or at all; nothing has changed.

    `kind` says why: no session can have such a `name`, another request has it (`busy`), it holds text and not messages
    or the other way round (`kind`), it is `unknown` or `exists` already, messages that differ from its own (`history`),
    the state of another `model`, a `damaged` file, or a store that cannot be read or written (`storage`).
    """

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(message)
        self.kind: Kind = kind


class Record(BaseModel):
    """A session at the end of a turn."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    session: str
    kind: Literal["text", "chat"]
    held: Whole = 0
    """Tokens that its state has read."""
    pending: tuple[Whole, ...] = Field(default=(), strict=False)
    """Tokens that follow those and belong to the conversation; they are read with the next turn."""
    turns: Whole = 0
    """Acknowledged ones."""
    messages: Whole = 0
    """Of a chat, with the replies."""
    chain: str = ""
    """A digest of those messages."""
    system: str | None = None
    """The digest of the first message where that is the system's."""
    created: float
    used: float
    """When the last turn ended; both in seconds since 1970."""

    @property
    def num_tokens(self) -> int:
        """Of the whole conversation."""
        return self.held + len(self.pending)


class Fed(BaseModel):
    """How some tokens were read: see generation.py."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: Literal["piece", "step"]
    size: Annotated[int, Field(ge=1, strict=True)]
    place: Whole
    count: Annotated[int, Field(ge=1, strict=True)]


class Turn(BaseModel):
    """One turn as the journal keeps it: what the slot has read in it, and the session after it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model: str
    """The fingerprint of the weights."""
    after: Record
    tokens: tuple[Whole, ...] = Field(strict=False)
    fed: tuple[Fed, ...] = Field(strict=False)

    def line(self) -> bytes:
        """As a line of the journal, behind a checksum.

        It begins with a line's end too: what a full disk has cut off before it must not spoil it.
        """
        text = self.model_dump_json().encode()
        return b"\n%08x %b\n" % (zlib.crc32(text), text)


def parse_journal(content: bytes) -> tuple[list[Turn], int]:
    """The turns of a journal in order, and how many lines are no turns: what was never acknowledged is cut off.

    Raises:
        SessionError: `damaged`, where a turn is missing between others.
    """
    turns: list[Turn] = []
    spoilt = 0
    for line in content.split(b"\n"):
        if not line:
            continue
        turn = parse_line(line)
        if turn is None:
            spoilt += 1
            continue
        if turns and turn.after.turns == turns[-1].after.turns:
            # the store has said that it failed, so it was never acknowledged, and another took its place
            turns.pop()
        if turns and turn.after.turns != turns[-1].after.turns + 1:
            raise SessionError(
                "damaged",
                f"the journal has turn {turn.after.turns} after turn {turns[-1].after.turns}; what is between is lost",
            )
        turns.append(turn)
    return turns, spoilt


def parse_line(line: bytes) -> Turn | None:
    """A turn, or None where the line is not whole."""
    sum_, _, text = line.partition(b" ")
    try:
        if int(sum_, 16) != zlib.crc32(text):
            return None
        turn = Turn.model_validate_json(text)
    except (ValueError, ValidationError):
        return None
    return turn if sum(fed.count for fed in turn.fed) == len(turn.tokens) else None


def check_name(name: str) -> None:
    """Raise SessionError for what cannot name a session."""
    fits = isinstance(name, str) and 0 < len(name) <= MOST_NAME and name.isprintable()
    # it stands in addresses
    if not fits or "/" in name or name in (".", ".."):
        shown = name if isinstance(name, str) and len(name) <= MOST_NAME else f"{type(name).__name__} too long or none"
        raise SessionError(
            "name", f"session_id: expected 1 to {MOST_NAME} printable characters without a slash, got {shown!r}"
        )


def file_name(name: str) -> str:
    """Of the files of a session: a hash, so that no name leaves the folder, and any name may be chosen."""
    return hashlib.sha256(name.encode()).hexdigest()[:32]


def digest(chain: str, role: str, content: str) -> str:
    """The digest of a conversation after one more message."""
    return hashlib.sha256(json.dumps([chain, role, content]).encode()).hexdigest()


def digests(messages: Iterable[Sequence[str]], chain: str = "") -> list[str]:
    """Digests after each of the messages (role, content)."""
    found = []
    for role, content in messages:
        chain = digest(chain, role, content)
        found.append(chain)
    return found
