"""What tokens say: characters whole, stop strings never given out, and what ended a reply and where it was cut.

Knows tokenizers only by `decode`.
"""

from collections import deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from swat_lm.serve.sampling import Sampling

__all__ = ["Ending", "ReplyText", "Sheltered", "TextAssembler", "sheltering"]


class Sheltered:
    """A tokenizer whose panics are errors: some are no Exception, and would end more than what they belong to."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def decode(self, tokens: list[int], **options: Any) -> str:
        """The tokenizer's. Raises RuntimeError for a panic."""
        with sheltering():
            return self._tokenizer.decode(tokens, **options)

    def encode(self, text: str, **options: Any) -> list[int]:
        """The tokenizer's. Raises RuntimeError for a panic."""
        with sheltering():
            return self._tokenizer.encode(text, **options)


@contextmanager
def sheltering() -> Iterator[None]:
    """While entered, what is neither an Exception nor an end of the program becomes a RuntimeError."""
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise RuntimeError(f"the tokenizer failed: {type(error).__name__}: {error}") from error


class TextAssembler:
    """Turns tokens into text one at a time, holding back bytes that do not yet make a character.

    What it gives out together is the text of all tokens decoded at once, invalid bytes included, wherever a tokenizer
    decodes bytes as they come (byte-level ones do). Decodes against a few tokens of context, since some tokenizers
    decide by the token before whether a space belongs between two; the rest is forgotten, so a stream of any length
    needs constant memory.
    """

    # an unfinished UTF-8 character is at most three bytes, each shown as a replacement character
    MOST_OPEN = 3
    # tokens kept before some are sought that can be forgotten, and before all of them are given up as they are
    MANY_HELD, MOST_HELD = 4, 16

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = True) -> None:
        """A tokenizer is anything with Hugging Face's `decode(ids, skip_special_tokens=...)`."""
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._context: list[int] = []
        self._held: list[int] = []
        # what was given out of the held tokens' text
        self._given = ""

    def push(self, token: int) -> str:
        """The text that became whole with this token, maybe none."""
        self._held.append(token)
        text = self._text_of_held()
        if text is None:
            # the last bytes change how those before them read: wait for the next ones, but not for ever
            return "" if len(self._held) < self.MANY_HELD else self._give_up()
        if not text.endswith("\ufffd"):
            new = text[len(self._given) :]
            self._context, self._held, self._given = self._held, [], ""
            return new
        settled = text.rstrip("\ufffd")
        settled = text[: max(len(settled), len(text) - self.MOST_OPEN)]
        new = settled[len(self._given) :]
        self._given += new
        if len(self._held) > self.MANY_HELD:
            new += self._forget_some(text)
        return new if len(self._held) < self.MOST_HELD else new + self._give_up()

    @property
    def open(self) -> tuple[int, int]:
        """How many of the last tokens may say more, and how many characters of theirs were given out."""
        return len(self._held), len(self._given)

    def finish(self) -> str:
        """What is still held back; incomplete bytes come as replacement characters."""
        new = self._give_up() if self._held else ""
        self._context = []
        return new

    def _forget_some(self, text: str) -> str:
        """Forget the held tokens before the last character's beginning; returns what was not yet given of them."""
        for count in range(len(self._held) - 1, 0, -1):
            first, rest = self._held[:count], self._held[count:]
            first_text, rest_text = self._decode(first), self._decode(rest)
            # two parts of one character would be replaced apart, and tokens without text do not close one
            if rest_text and first_text + rest_text == text:
                new = first_text[len(self._given) :]
                self._context, self._held, self._given = first, rest, self._given[len(first_text) :]
                return new
        return ""

    def _give_up(self) -> str:
        """Forget all held tokens; returns what was not yet given of them."""
        text = self._text_of_held()
        new = (self._decode(self._held) if text is None else text)[len(self._given) :]
        self._context, self._held, self._given = self._held, [], ""
        return new

    def _text_of_held(self) -> str | None:
        """What the held tokens add to the context's text; None if they change what was given out already."""
        before = self._decode(self._context)
        whole = self._decode(self._context + self._held)
        return whole[len(before) :] if whole.startswith(before + self._given) else None

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=self._skip)


@dataclass(frozen=True)
class Ending:
    """Why a reply ended, and which tokens stand for the text that was given out."""

    reason: str
    """"end_token", "stop_token", "stop_string", "length", or what `finish` was told."""
    token: int | None
    """The token that ended it, which is not part of the text; None where no token did."""
    stop: str | None
    """The stop string before which the text was cut."""
    kept: int
    """How many of the tokens pushed lie wholly in the text given out."""
    tail: str
    """The text given out after those tokens: what came of a token that a stop string cut."""


class ReplyText:
    """The text of one reply, token by token, until something ends it.

    A stop string is never given out, not even its beginning: what may become one is held back, and given out when it
    does not. The text ends before the stop string that is complete first, and of those complete at once before the
    longest, whatever the tokens are. Keeps text since the last token that lies wholly in what was given: constant
    memory.
    """

    def __init__(
        self, tokenizer: Any, sampling: Sampling, end_tokens: Collection[int] = (), skip_special_tokens: bool = True
    ) -> None:
        """`end_tokens` end a text unless `sampling.ignore_end`; a tokenizer is anything with `decode`."""
        self._assembler = TextAssembler(tokenizer, skip_special_tokens)
        self._sampling = sampling
        self._ends = frozenset() if sampling.ignore_end else frozenset(end_tokens)
        self._longest = max(map(len, sampling.stop), default=0)
        # the text after the first `_kept` tokens, how much of it was given out, and where later tokens end in it
        self._text, self._given, self._kept = "", 0, 0
        self._marks: deque[tuple[int, int]] = deque()
        self.count = 0
        """Tokens pushed."""
        self.ended: Ending | None = None
        if sampling.max_tokens == 0:
            self._end("length")

    def push(self, token: int) -> str:
        """The text that is sure with this token, maybe none. Raises ValueError after the end."""
        if self.ended is not None:
            raise ValueError(f"token: expected none after the reply's end ({self.ended.reason}), got {token}")
        self.count += 1
        if token in self._sampling.stop_token_ids or token in self._ends:
            reason = "stop_token" if token in self._sampling.stop_token_ids else "end_token"
            return self._flush(reason, token, self.count - 1)
        new = self._take(self._assembler.push(token))
        if self.ended is None and self.count == self._sampling.max_tokens:
            return new + self._flush("length", None, self.count)
        return new

    def finish(self, reason: str) -> str:
        """End the reply for a reason from outside, such as a finished constraint; the text that was held back.

        Does nothing where it has ended already.
        """
        return "" if self.ended is not None else self._flush(reason, None, self.count)

    @property
    def shown(self) -> tuple[int, str]:
        """How many tokens lie wholly in the text given out so far, and the text given out after those."""
        return (self._kept, self._text[: self._given]) if self.ended is None else (self.ended.kept, self.ended.tail)

    def _flush(self, reason: str, token: int | None, count: int) -> str:
        """Give out what is held, unless a stop string is complete in it after all."""
        given = self._take(self._assembler.finish())
        if self.ended is not None:
            return given
        rest, self._kept = self._text[self._given :], count
        self._text, self._given = "", 0
        self._end(reason, token)
        return given + rest

    def _take(self, new: str) -> str:
        """Take text in; returns what is sure not to belong to a stop string."""
        self._text += new
        tokens, characters = self._assembler.open
        if self.count - tokens > (self._marks[-1][0] if self._marks else self._kept):
            self._marks.append((self.count - tokens, len(self._text) - characters))
        found = self._find()
        until = self._may_begin() if found is None else found[0]
        given, self._given = self._text[self._given : until], until
        self._forget()
        if found is not None:
            self._end("stop_string", None, found[1])
        return given

    def _find(self) -> tuple[int, str] | None:
        """Where the stop string that is complete first begins in the text, and which."""
        # what was given out belongs to none
        places = [(self._text.find(stop, self._given), stop) for stop in self._sampling.stop]
        found = [(place + len(stop), place, stop) for place, stop in places if place >= 0]
        return min(found)[1:] if found else None

    def _may_begin(self) -> int:
        """Where the longest end of the text begins that may become a stop string; without one, the text's length."""
        for place in range(max(self._given, len(self._text) - self._longest + 1), len(self._text)):
            if any(stop.startswith(self._text[place:]) for stop in self._sampling.stop):
                return place
        return len(self._text)

    def _forget(self) -> None:
        """Drop the text of tokens that lie wholly in what was given out."""
        while self._marks and self._marks[0][1] <= self._given:
            self._kept, place = self._marks.popleft()
            self._text, self._given = self._text[place:], self._given - place
            self._marks = deque((count, end - place) for count, end in self._marks)

    def _end(self, reason: str, token: int | None = None, stop: str | None = None) -> None:
        self.ended = Ending(reason, token, stop, self._kept, self._text[: self._given])
