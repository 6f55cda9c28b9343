"""A reply as its events come: which text is new, which log-probabilities stand for it, and why it ended.

A stop string cuts text within tokens, and text is held back while it may become one. So a token's log-probability is
given out with the text that begins where the token does, and never for text that is cut.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from swat_lm.serve.generation import Event
from swat_lm.serve.http.asking import Prompt
from swat_lm.serve.language import Language
from swat_lm.serve.sampler import Choice
from swat_lm.serve.text import TextAssembler

__all__ = ["LOWEST", "Delta", "Echo", "Finish", "Logged", "Reply", "finish_of"]

Finish = Literal["stop", "length"]
# JSON has no minus infinity; what OpenAI writes for it
LOWEST = -9999.0


@dataclass(frozen=True)
class Logged:
    """A token of a text, with its log-probabilities."""

    token: int
    start: int
    """Where it begins in the text."""
    logprob: float | None
    """None for the first token of a prompt, before which nothing was said."""
    top: tuple[tuple[int, float], ...] | None


@dataclass
class Delta:
    """What an event brought."""

    text: str = ""
    logged: list[Logged] = field(default_factory=list)
    finish: Finish | None = None

    def __bool__(self) -> bool:
        return bool(self.text or self.logged or self.finish)


class TokenLog:
    """Log-probabilities of a reply, given out with their text."""

    def __init__(self, language: Language, start: int, with_end: bool) -> None:
        self._assembler = TextAssembler(language.tokenizer)
        self._start, self._length, self._given = start, 0, 0
        self._held: deque[tuple[int, Choice]] = deque()
        self._with_end = with_end

    def take(self, choice: Choice | None, text: str, ended: str | None) -> list[Logged]:
        """A token, and the text that became sure with it; returns those that belong to all that is sure."""
        self._given += len(text)
        if choice is not None and ended not in ("end_token", "stop_token"):
            self._held.append((self._length, choice))
            self._length += len(self._assembler.push(choice.token))
        found = []
        while self._held and (self._held[0][0] < self._given or ended not in (None, "stop_string")):
            found.append(self._logged(*self._held.popleft()))
        if choice is not None and self._with_end and ended in ("end_token", "stop_token"):
            found.append(self._logged(self._given, choice))
        return found

    def _logged(self, place: int, choice: Choice) -> Logged:
        return Logged(choice.token, self._start + place, choice.logprob, choice.top)


class Echo:
    """A prompt that is given back before its replies. Making it takes its time."""

    def __init__(self, language: Language, prompt: Prompt, logprobs: int | None) -> None:
        self.text = language.decode(prompt.tokens) if prompt.text is None else prompt.text
        self._tokens, self._starts = prompt.tokens, list[int]()
        self._choices: list[Choice] = []
        if logprobs is not None:
            assembler, length = TextAssembler(language.tokenizer, skip_special_tokens=False), 0
            for place, token in enumerate(prompt.tokens):
                self._starts.append(length)
                if place >= prompt.added:
                    length += len(assembler.push(token))

    def take(self, choices: Sequence[Choice]) -> None:
        """Log-probabilities of the next tokens of the prompt."""
        self._choices += choices

    def logged(self) -> list[Logged]:
        """Of every token of the prompt; none where none were asked for."""
        if not self._starts:
            return []
        # nothing comes before the first
        first = Logged(self._tokens[0], 0, None, None)
        others = zip(self._choices, self._starts[1:], strict=True)
        return [first, *(Logged(choice.token, start, choice.logprob, choice.top) for choice, start in others)]


class Reply:
    """One of the replies to a prompt."""

    def __init__(
        self, language: Language, logprobs: int | None = None, echo: Echo | None = None, with_end: bool = False
    ) -> None:
        """`with_end`: whether the token that ended it has a log-probability too."""
        self._echo, self._is_new = echo, True
        self._log = None
        if logprobs is not None:
            self._log = TokenLog(language, 0 if echo is None else len(echo.text), with_end)
        self.num_tokens = 0
        """Drawn, with the one that ended it."""
        self.finish: Finish | None = None

    def take(self, event: Event) -> Delta:
        """What an event of this reply adds to it."""
        found = Delta(event.text, finish=None if event.ended is None else finish_of(event.ended))
        self.num_tokens += event.choice is not None
        if self._log is not None:
            found.logged = self._log.take(event.choice, event.text, event.ended)
        if self._echo is not None and self._is_new:
            found = Delta(self._echo.text + found.text, self._echo.logged() + found.logged, found.finish)
        self._is_new, self.finish = False, found.finish
        return found


def finish_of(ended: str) -> Finish:
    """The API's word for a reason of ours."""
    return "length" if ended in ("length", "read") else "stop"
