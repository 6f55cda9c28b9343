"""What a request asks of the choice of tokens: one frozen dataclass that checks itself.

Names and ranges are those of OpenAI's API where it has them. How tokens are chosen is in sampler.py.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Sampling"]

# below, logits over temperature leave float32 and the odds of all but the most likely token are nothing anyway
LOWEST_TEMPERATURE = 1e-6
# more alternatives than a request may ask for, choices of one, stop strings and their characters
MOST_LOGPROBS, MOST_CHOICES, MOST_STOPS, MOST_STOP_LENGTH = 20, 128, 16, 1024
MOST_BIASED = 1024


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when they end.

    In this order: a constraint's mask, `logit_bias`, repetition penalty, frequency and presence penalty, temperature,
    top-k, top-p, min-p. Temperature 0 (or below 1e-6) takes the likeliest token of what the penalties leave. Every
    ValueError begins with the field's name.
    """

    temperature: float = 1.0
    top_k: int | None = None
    """Keep this many most likely tokens, and those as likely as the last of them; None: all."""
    top_p: float = 1.0
    """Keep the fewest most likely tokens whose probabilities reach this sum; 1: all."""
    vocab_size: int | None = None
    """Never draw ids from here on, for models whose vocabulary is padded beyond the tokenizer's."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the likeliest; 0: all."""
    repetition_penalty: float = 1.0
    """Divides logits above 0, and multiplies those below, of tokens in the prompt or the reply; 1: off."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens in the reply, -2 to 2."""
    frequency_penalty: float = 0.0
    """Subtracted once for every time that a token came in the reply, -2 to 2."""
    # a mapping has no hash; equal ones still compare equal
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    """Added to the logits of these token ids, each -100 to 100. Keys may be decimal texts, as in JSON."""
    seed: int | None = None
    """Of 64 bits with sign; makes the draws repeatable. None: another one for every sampler."""
    stop: tuple[str, ...] = ()
    """Texts before which the reply ends, at most 16; given as one text, a list or a tuple."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens with which the reply ends, whatever `ignore_end` says; their text is not given out."""
    max_tokens: int | None = None
    """Most tokens of the reply; None: no limit."""
    ignore_end: bool = False
    """Go on after a token that ends a text."""
    logprobs: int | None = None
    """Alternatives whose log-probabilities come with each token, 0 to 20 (0: the chosen token's only); None: none."""
    n: int = 1
    """Replies to one prompt, 1 to 128. Each is a sampler of its own number."""

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, 0, "0 (most likely token) or a number above")
        _integer("top_k", self.top_k, 1, None, "leave it out to keep all tokens")
        _number("top_p", self.top_p, 0, "above 0 and at most 1", 1)
        if self.top_p == 0:
            raise ValueError("top_p: expected above 0 and at most 1, got 0; temperature 0 takes the most likely token")
        _integer("vocab_size", self.vocab_size, 1, None, "leave it out to draw from all tokens")
        _number("min_p", self.min_p, 0, "0 to 1", 1)
        _number("repetition_penalty", self.repetition_penalty, 0, "above 0 (1: off)")
        if self.repetition_penalty == 0:
            raise ValueError("repetition_penalty: expected above 0 (1: off), got 0")
        for name in ("presence_penalty", "frequency_penalty"):
            _number(name, getattr(self, name), -2, "-2 to 2", 2)
        _integer("seed", self.seed, -(2**63), 2**63 - 1, "leave it out for draws that differ every time")
        _integer("max_tokens", self.max_tokens, 0, None, "leave it out for no limit")
        _integer("logprobs", self.logprobs, 0, MOST_LOGPROBS, "leave it out for none")
        _integer("n", self.n if self.n is not None else "null", 1, MOST_CHOICES, "it is how many replies to give")
        if not isinstance(self.ignore_end, bool):
            raise ValueError(f"ignore_end: expected true or false, got {_shown(self.ignore_end)}")
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        object.__setattr__(self, "stop", _texts(self.stop))
        object.__setattr__(self, "stop_token_ids", _token_ids(self.stop_token_ids))
        if self.vocab_size is not None:
            self.check_token_ids(self.vocab_size)

    def check_token_ids(self, size: int) -> None:
        """Raise ValueError if a token named here is not among the `size` of a vocabulary."""
        for name, ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            for token in ids:
                if token >= size:
                    raise ValueError(f"{name}: expected token ids below {size:,}, the vocabulary's size, got {token}")

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature < LOWEST_TEMPERATURE

    @property
    def remembers(self) -> bool:
        """Whether the choice of a token depends on those before it in the reply."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def _shown(value: Any) -> str:
    """A value as an error names it, not longer than a line."""
    try:
        text = repr(value)
    except ValueError:
        # Python does not write integers of thousands of digits
        text = f"{type(value).__name__} of very many digits"
    return text if len(text) <= 60 else text[:57] + "..."


def _is_number(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        # an integer beyond every float
        return False


def _number(name: str, value: Any, low: float, expected: str, high: float = math.inf) -> None:
    """Raise ValueError unless a value is a finite number from low to high."""
    if not _is_number(value) or not low <= value <= high:
        raise ValueError(f"{name}: expected {expected}, got {_shown(value)}")


def _integer(name: str, value: Any, low: int, high: int | None, advice: str) -> None:
    """Raise ValueError unless a value is None or an integer from low to high (None: no end)."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        expected = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
        raise ValueError(f"{name}: expected {expected}, got {_shown(value)}; {advice}")


def _biases(given: Any) -> dict[int, float]:
    """Biases by token id; raises ValueError for what they cannot be."""
    if not isinstance(given, Mapping) or len(given) > MOST_BIASED:
        raise ValueError(
            f"logit_bias: expected at most {MOST_BIASED:,} token ids, each with a number, got {_shown(given)}"
        )
    found: dict[int, float] = {}
    for key, bias in given.items():
        token = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 16 else key
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise ValueError(f"logit_bias: expected token ids from 0, got {_shown(key)}")
        if not _is_number(bias) or not -100 <= bias <= 100:
            raise ValueError(f"logit_bias: expected -100 to 100 for token {token}, got {_shown(bias)}")
        found[token] = float(bias)
    return found


def _texts(given: Any) -> tuple[str, ...]:
    """Stop strings; raises ValueError for what they cannot be."""
    texts = (given,) if isinstance(given, str) else given
    if not isinstance(texts, list | tuple) or len(texts) > MOST_STOPS or not all(isinstance(t, str) for t in texts):
        raise ValueError(f"stop: expected a text or at most {MOST_STOPS} of them, got {_shown(given)}")
    if not all(0 < len(text) <= MOST_STOP_LENGTH for text in texts):
        raise ValueError(f"stop: expected texts of 1 to {MOST_STOP_LENGTH:,} characters, got {_shown(given)}")
    return tuple(texts)


def _token_ids(given: Any) -> tuple[int, ...]:
    """Ids that end a reply; raises ValueError for what they cannot be."""
    wanted = isinstance(given, list | tuple) and len(given) <= MOST_BIASED
    if not wanted or not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in given):
        raise ValueError(f"stop_token_ids: expected at most {MOST_BIASED:,} integers from 0, got {_shown(given)}")
    return tuple(given)
