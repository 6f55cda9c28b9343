"""What an engine is asked and what it answers: a prompt with what is to be drawn after it, and what a step brought."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Self, TypeGuard

from torch import Tensor

from swat_lm.serve.requests import RequestError
from swat_lm.serve.sampler import Choice, TokenConstraint
from swat_lm.serve.sampling import MOST_LOGPROBS, Sampling

__all__ = ["Event", "Fed", "Generation"]


class Fed(NamedTuple):
    """How some tokens of a slot were read; to read them so again gives the same bits."""

    kind: Literal["piece", "step"]
    """Together in one call, or one after the other in batches of rows."""
    size: int
    """Tokens of the call, or rows of the batches."""
    place: int
    """Where they began in the call, or which row they had."""
    count: int


@dataclass(frozen=True)
class Generation:
    """A prompt, and what is to be drawn after it.

    A request with `keep` ends with an event that names its slot and how many tokens this has read (`Event.slot`,
    `Event.held`); the next one brings both (`slot`, `held`). The token that was drawn last is not among them: the slot
    has not read it yet, so it has to be sent at the head of the next prompt.
    """

    key: Hashable
    tokens: Sequence[int]
    """At least one, but none with `logits`."""
    sampling: Sampling = field(default_factory=Sampling)
    """With `max_tokens` 0 the prompt is only read."""
    constraint: TokenConstraint | None = None
    """What each reply must keep to, from where it stands at submission; the engine follows copies."""
    prompt_logprobs: int | None = None
    """Alternatives whose log-probabilities come with every token of the prompt but the first, 0 to 20; None: none."""
    held: int = 0
    """Tokens that the slot it brings has read, or that its snapshot holds."""
    slot: int | None = None
    """A kept slot that it goes on in; None: an empty one."""
    snapshot: Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False)
    """What `Slots.snapshot` gave of one slot of this model: an empty one starts from it."""
    keep: bool = False
    """Whether its slot is kept when it ends, until `Engine.scheduler.release`; one that it brought always is. Where it
    fails or is aborted neither is, but for one that it brought and has not started to read in. An engine whose slots
    can be restored keeps a slot that failed too, with what it held before."""
    logits: Tensor | None = field(default=None, compare=False, repr=False)
    """`[V]` after the last token that the slot it brings has read: instead of `tokens`, to draw at once."""
    return_logits: bool = False
    """Whether the event that ends it has the logits after its last token (`Event.logits`); `max_tokens` must be 0."""
    embedding: bool = False
    """Whether it has the prompt's embedding (`Event.embedding`); `max_tokens` must be 0."""
    _checked: int | None = field(default=None, init=False, compare=False, repr=False)
    """The vocabulary for which `checked` found it right; what `replace` makes of it is checked anew."""

    def checked(self, vocabulary: int) -> Self:
        """The same with tokens that nobody can change, which `check` then takes as they are.

        For a prompt of millions of tokens this may take a second, in a thread where nobody waits for it. Raises as
        `check` does.
        """
        made = replace(self, tokens=tuple(self.tokens)) if isinstance(self.tokens, list) else self
        made.check(vocabulary)
        if isinstance(made.tokens, tuple):
            object.__setattr__(made, "_checked", vocabulary)
        return made

    def check(self, vocabulary: int) -> None:
        """Raise RequestError (`invalid`) for values that no request to a model of so many tokens can have."""
        if self._checked == vocabulary:
            return
        if not isinstance(self.sampling, Sampling):
            raise invalid(f"sampling: expected a Sampling, got {type(self.sampling).__name__}")
        self._check_tokens(vocabulary)
        for name, value in (("keep", self.keep), ("return_logits", self.return_logits), ("embedding", self.embedding)):
            if not isinstance(value, bool):
                raise invalid(f"{name}: expected true or false, got {value!r}")
            if value and name != "keep" and self.sampling.max_tokens != 0:
                raise invalid(f"{name}: expected max_tokens 0 with it, got {self.sampling.max_tokens}")
        for name, value, most in (("held", self.held, None), ("prompt_logprobs", self.prompt_logprobs, MOST_LOGPROBS),
                                  ("slot", self.slot, None)):  # fmt: skip
            if value is None and name != "held":
                continue
            if not is_whole(value) or value < 0 or (most is not None and value > most):
                span = "from 0" if most is None else f"from 0 to {most}"
                raise invalid(f"{name}: expected a whole number {span}, got {value!r}")
        if self.slot is not None and self.snapshot is not None:
            raise invalid("snapshot: expected none with a slot of its own, which holds what the request goes on from")
        known = 0 if self.snapshot is None else int(self.snapshot["position"][0])
        if self.slot is None and self.held != known:
            raise invalid(
                f"held: expected {known}, what {'an empty slot' if known == 0 else 'the snapshot'} has read; "
                f"got {self.held}"
            )
        try:
            self.sampling.check_token_ids(vocabulary)
        except ValueError as error:
            raise invalid(str(error)) from None

    def _check_tokens(self, vocabulary: int) -> None:
        if not isinstance(self.tokens, Sequence) or isinstance(self.tokens, str | bytes | bytearray):
            raise invalid(
                f"tokens: expected a list of whole numbers, got {type(self.tokens).__name__}; encode texts first"
            )
        if self.logits is not None:
            self._check_logits(vocabulary)
        elif not self.tokens:
            raise invalid("tokens: expected at least one, got none; begin an empty prompt with a token of your own")
        is_plain = len(self.tokens) > 0 and set(map(type, self.tokens)) == {int}
        # without a loop of Python's, unless there is something to say
        if is_plain and min(self.tokens) >= 0 and max(self.tokens) < vocabulary:
            return
        for token in self.tokens:
            if not is_whole(token):
                raise invalid(f"tokens: expected whole numbers, got {token!r:.60}")
            if not 0 <= token < vocabulary:
                raise invalid(f"tokens: expected ids from 0 to {vocabulary - 1:,}, the model's, got {token}")

    def _check_logits(self, vocabulary: int) -> None:
        if self.slot is None or self.tokens or self.sampling.max_tokens == 0:
            raise invalid("logits: expected with them a slot that has read, no tokens, and max_tokens above 0")
        if not isinstance(self.logits, Tensor) or self.logits.shape != (vocabulary,):
            found = list(self.logits.shape) if isinstance(self.logits, Tensor) else type(self.logits).__name__
            raise invalid(f"logits: expected a tensor of {vocabulary:,}, one for each token, got {found}")


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
    """The reason of `ReplyText.ended`; "constraint" where nothing may follow; "read" where nothing was to be drawn;
    "error", after which the request brings nothing more; "stopped" by its keeper."""
    error: str | None = None
    cause: Exception | None = field(default=None, compare=False, repr=False)
    """With an "error", what was raised."""
    shown: tuple[int, str] = (0, "")
    """What is out of the reply's text by now: so many tokens wholly, and this text of those after them."""
    slot: int | None = None
    """With `ended`: the slot that is kept. None where none is: with an "error" a slot that the request brought is lost
    and free, unless the engine's slots can be restored; then it is kept and holds what it did before."""
    held: int | None = None
    """Tokens that this slot has read; the one drawn last is not among them."""
    fed: tuple[Fed, ...] = ()
    """How the kept slot has read the prompt and the reply."""
    logits: Tensor | None = field(default=None, compare=False, repr=False)
    """With "read", where they were asked for: `[V]` after the last token."""
    embedding: tuple[float, ...] | None = None
    """With "read", where it was asked for: the mean of the hidden states `[M]` of the prompt's tokens after the final
    norm, scaled to a length of 1. Of a slot that goes on, those of this prompt alone."""


def invalid(message: str) -> RequestError:
    """A request that nobody can serve."""
    return RequestError("invalid", message)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is an integer; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)
