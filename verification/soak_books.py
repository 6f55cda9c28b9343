"""Books of what a server has acknowledged: for every session the text that it must hold. No sockets."""

from dataclasses import dataclass, field, replace
from typing import Any

from verification.workplace import CheckFailedError, require

__all__ = ["MODEL", "Book", "Turn", "text_of"]

MODEL = "tiny"


@dataclass(frozen=True)
class Turn:
    """One turn as it is asked for."""

    prompt: str
    most: int
    """Tokens of the reply."""
    stop: str | None = None
    streamed: bool = False
    whole: bool = False
    """Of a chat: whether all messages are sent, or the new one only."""


@dataclass
class Book:
    """One session. All text is ASCII and the tokenizer that of bytes, so a character is a token."""

    name: str
    kind: str
    text: str = ""
    """All of it, as the model reads it."""
    turns: int = 0
    messages: list[dict[str, str]] = field(default_factory=list)
    open: Turn | None = None
    """A turn that was asked for and not acknowledged yet."""
    received: str = ""
    """Of its reply."""
    uncertain: str | None = None
    """What else was asked for and not acknowledged: that it be begun (by a copy), or deleted."""

    def piece(self, turn: Turn) -> str:
        """What a turn adds to the text, without the reply."""
        if self.kind == "text":
            return turn.prompt
        return ("|" if self.turns else "") + f"[user]{turn.prompt}|[assistant]"

    def request(self, turn: Turn, **more: Any) -> tuple[str, dict[str, Any]]:
        """The address and the body that ask for it."""
        body: dict[str, Any] = {
            "model": MODEL, "temperature": 0, "session_id": self.name, "max_tokens": turn.most, "stream": turn.streamed,
            "stop": turn.stop, **more,
        }  # fmt: skip
        if self.kind == "text":
            return "/v1/completions", {**body, "prompt": turn.prompt}
        said = {"role": "user", "content": turn.prompt}
        return "/v1/chat/completions", {**body, "messages": [*self.messages, said] if turn.whole else [said]}

    def add(self, turn: Turn, reply: str) -> None:
        """The turn is acknowledged."""
        self.text += self.piece(turn) + reply
        self.turns += 1
        if self.kind == "chat":
            self.messages += [{"role": "user", "content": turn.prompt}, {"role": "assistant", "content": reply}]
        self.open, self.received = None, ""

    def copy(self, name: str) -> "Book":
        """Of a session that is forked or moved."""
        return replace(self, name=name, messages=list(self.messages), open=None, received="", uncertain=None)

    def check(self, found: dict[str, Any]) -> None:
        """Raise CheckFailedError unless the server's description says the same."""
        said = (found["kind"], found["turns"], found["tokens"], found["messages"])
        books = (self.kind, self.turns, len(self.text), len(self.messages))
        require(said == books, f"session {self.name}: kind, turns, tokens, messages are {said}, in the books {books}")

    def length_of_reply(self, found: dict[str, Any]) -> int | None:
        """Tokens that the server has kept of the reply to the open turn; None where it has nothing of the turn.

        Raises CheckFailedError where it holds what no server may.
        """
        turn = self.open
        assert turn is not None
        if found["turns"] == self.turns:
            self.check(found)
            return None
        length = found["tokens"] - len(self.text) - len(self.piece(turn))
        if found["turns"] != self.turns + 1 or not len(self.received) <= length <= turn.most:
            raise CheckFailedError(
                f"session {self.name}: has {found['turns']} turns and {found['tokens']} tokens; in the books are "
                f"{self.turns} and {len(self.text)}, and a turn of {len(self.piece(turn))} tokens and at most "
                f"{turn.most}, of which {len(self.received)} came"
            )
        return length


def text_of(body: dict[str, Any]) -> str:
    """The text of the first choice of a whole answer, or of an event."""
    if not body["choices"]:
        return ""
    choice = body["choices"][0]
    if "text" in choice:
        return choice["text"]
    return choice.get("message", choice.get("delta", {})).get("content") or ""
