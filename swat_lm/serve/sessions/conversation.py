"""Messages as tokens: what a chat model's template writes of them, or of those that a session does not hold yet."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from swat_lm.serve.sessions.record import Record, SessionError, digest, digests

__all__ = ["Conversation", "Message", "begin_chat", "continue_chat"]

Write = Callable[[Sequence[Mapping[str, str]]], str]
"""Messages as a chat template writes them, up to where the next reply goes; see language.py."""
# stands for the last reply where a template is asked what it writes behind one
REPLY = "\N{INVISIBLE SEPARATOR}reply\N{INVISIBLE SEPARATOR}"


class Message(NamedTuple):
    """One turn of somebody."""

    role: str
    content: str


class Conversation(NamedTuple):
    """What is to be read, and the conversation's digests with it."""

    text: str
    """With all special tokens that belong to it."""
    messages: int
    chain: str
    system: str | None

    def replied(self, text: str) -> tuple[int, str]:
        """How many messages there are and their digest, with a reply."""
        return self.messages + 1, digest(self.chain, "assistant", text)


def begin_chat(write: Write, messages: Sequence[Message]) -> Conversation:
    """A conversation's beginning, up to where the reply goes. Raises ValueError for what the template refuses."""
    chain = digests(messages)
    return Conversation(written(write, messages), len(messages), chain[-1] if chain else "", first_system(messages))


def continue_chat(write: Write, record: Record, messages: Sequence[Message]) -> Conversation:
    """What follows a session's last reply: of a conversation that it holds the rest, else all of the messages.

    Raises:
        SessionError: `history`, where nothing is new, or the messages are a conversation and not the session's.
        ValueError: the template refuses them.
    """
    new = new_messages(record, messages)
    # of what went before a template may look at the first message and at the last reply
    before = [Message("user", "-"), Message("assistant", REPLY)]
    if record.system is not None:
        before.insert(0, Message("system", "-"))
    whole = written(write, [*before, *new])
    if REPLY not in whole:
        raise ValueError(
            "messages: the chat template writes a reply otherwise than as it is, so no session can hold it"
        )
    behind = whole.split(REPLY, 1)[1]
    chain = digests(new, record.chain)[-1]
    return Conversation(behind, record.messages + len(new), chain, record.system)


def new_messages(record: Record, messages: Sequence[Message]) -> Sequence[Message]:
    """Those that a session does not hold yet."""
    count = record.messages
    if len(messages) >= count > 0 and digests(messages[:count])[-1] == record.chain:
        messages = messages[count:]
        if not messages:
            raise SessionError(
                "history", f"messages: the session holds all {count} already; add a message that follows its last reply"
            )
        return messages
    if any(message.role == "assistant" for message in messages):
        raise SessionError(
            "history",
            f"messages: they hold a reply, so they are a whole conversation, and not the one of this session ({count} "
            "messages); send only what is new, or all of it as it was, or name another session",
        )
    if record.system is not None and first_system(messages) == record.system:
        # who names the system's message with every request means the one that is there
        messages = messages[1:]
    if not messages:
        raise SessionError("history", "messages: none is new; add one that follows the session's last reply")
    return messages


def first_system(messages: Sequence[Message]) -> str | None:
    """The digest of a system's message at the beginning."""
    return digest("", *messages[0]) if messages and messages[0].role in ("system", "developer") else None


def written(write: Write, messages: Sequence[Message]) -> str:
    """As a template writes them."""
    return write([message._asdict() for message in messages])
