"""From what a request says to what the engine is asked: the one place where a `Generation` is made.

Options keep the names of OpenAI's API, and `Sampling` checks them.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from swat_lm.serve.constraints import Constraint, ConstraintError
from swat_lm.serve.generation import Generation
from swat_lm.serve.host import Host
from swat_lm.serve.http import errors
from swat_lm.serve.http.bodies import Body, described, shortly, work
from swat_lm.serve.http.errors import ApiError
from swat_lm.serve.http.settings import Settings
from swat_lm.serve.language import ChatError, Encoded, Language
from swat_lm.serve.sampling import MOST_BIASED, MOST_CHOICES, MOST_LOGPROBS, MOST_STOP_LENGTH, MOST_STOPS, Sampling
from swat_lm.serve.sessions.hosted import HostedSessions
from swat_lm.serve.sessions.record import MOST_NAME

__all__ = [
    "Counts",
    "Options",
    "Prompt",
    "Served",
    "StreamOptions",
    "check_count",
    "constraint_of",
    "generation_of",
    "new_id",
]

# by what it multiplies logits: beyond, they leave the range of numbers
REPETITION = (0.01, 100.0)
FORMATS = "text, json_object, json_schema, regex or lark"
# what Sampling calls otherwise
API_NAMES = {"ignore_end": "ignore_eos"}


@dataclass(frozen=True)
class Served:
    """What every endpoint needs."""

    host: Host
    language: Language
    settings: Settings
    created: int
    """When the server was started, in seconds since 1970."""
    fingerprint: str
    sessions: HostedSessions | None = None
    """None: none are kept."""

    def check_model(self, name: Any) -> None:
        """Raise ApiError for another model than the one there is."""
        if name != self.settings.model:
            message = f"model: there is no {shortly(name)} here; this server has {self.settings.model!r}"
            raise ApiError(404, message, "model", "model_not_found")


def whole(least: int, most: int | None = None, text: str = "") -> Any:
    """A whole number or null."""
    return described(
        {"type": ["integer", "null"], "minimum": least, **({} if most is None else {"maximum": most})}, text
    )


def number(least: float, most: float | None = None, text: str = "", *, above: bool = False) -> Any:
    """A number or null."""
    low = {"exclusiveMinimum" if above else "minimum": least}
    return described({"type": ["number", "null"], **low, **({} if most is None else {"maximum": most})}, text)


@dataclass
class Counts:
    """Tokens of a request's prompts; those of a session are known when it is its turn."""

    prompt: int = 0
    """With those that the session held."""
    cached: int = 0
    """Those that the session held."""


class StreamOptions(Body):
    """How a stream comes."""

    include_usage: bool | None = None
    """Whether one more event, before the last, has the usage of all."""
    include_obfuscation: bool | None = None
    """Taken; no event is filled up either way."""


class Options(Body):
    """What completions and chats share."""

    ignored: ClassVar[frozenset[str]] = frozenset({
        "user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    })  # fmt: skip
    refused: ClassVar[Mapping[str, str]] = {"store": "this server keeps no requests; leave it out, or say false"}

    model: str
    """The name of the model, as in `GET /v1/models`."""
    stream: bool | None = None
    """Whether the reply comes as server-sent events."""
    stream_options: StreamOptions | None = None
    n: Any = whole(1, MOST_CHOICES, "Replies to each prompt; at most as many as there are slots.")
    temperature: Any = number(0, text="0: always the likeliest token. Default 1.")
    top_p: Any = number(0, 1, "Among the likeliest tokens that reach this sum. Default 1.", above=True)
    top_k: Any = whole(1, text="Among this many likeliest tokens. Not in OpenAI's API.")
    min_p: Any = number(0, 1, "Tokens at least this fraction as likely as the likeliest. Not in OpenAI's API.")
    seed: Any = described(
        {"type": ["integer", "null"], "minimum": -(2**63), "maximum": 2**63 - 1}, "Makes the draws repeatable."
    )
    stop: Any = described({"anyOf": [
        {"type": "string", "minLength": 1, "maxLength": MOST_STOP_LENGTH}, {"type": "null"},
        {"type": "array", "maxItems": MOST_STOPS,
         "items": {"type": "string", "minLength": 1, "maxLength": MOST_STOP_LENGTH}},
    ]}, "Texts before which a reply ends.")  # fmt: skip
    stop_token_ids: Any = described(
        {"type": ["array", "null"], "items": {"type": "integer", "minimum": 0}, "maxItems": MOST_BIASED},
        "Tokens with which a reply ends. Not in OpenAI's API.",
    )
    presence_penalty: Any = number(-2, 2)
    frequency_penalty: Any = number(-2, 2)
    repetition_penalty: Any = number(*REPETITION, "1: off. Not in OpenAI's API.")
    logit_bias: Any = described({
        "type": ["object", "null"], "maxProperties": MOST_BIASED, "propertyNames": {"pattern": "^[0-9]{1,15}$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    }, "Added to the logits of these token ids.")  # fmt: skip
    ignore_eos: Any = described(
        {"type": ["boolean", "null"]}, "Go on after a token that ends a text. Not in OpenAI's API."
    )
    response_format: Any = described(
        {"type": ["object", "null"], "properties": {"type": {"enum": FORMATS.replace(" or", ",").split(", ")}},
         "required": ["type"]},
        "text, json_object, json_schema (`json_schema.schema`), or, not in OpenAI's API, regex (`regex`) and lark "
        "(`lark`).",
    )  # fmt: skip

    session_id: Any = described(
        {"type": ["string", "null"], "minLength": 1, "maxLength": MOST_NAME},
        "Go on with this session, or begin it; what is sent is read after what it holds. Not in OpenAI's API.",
    )

    session_turns: Any = whole(
        0,
        text="So many turns the session has for who asks; with another number it is refused, so that a request which "
        "is sent again is not read twice. Not in OpenAI's API.",
    )

    def sampling(self, language: Language, max_tokens: int | None, logprobs: int | None) -> Sampling:
        """As the engine takes it. Raises ApiError."""
        if self.session_turns is not None and self.session_id is None:
            raise ApiError(400, "session_turns: expected only with session_id", "session_turns")
        given = {
            name: getattr(self, name)
            for name in ("n", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids",
                         "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias")
        }  # fmt: skip
        given |= {"ignore_end": self.ignore_eos}
        # null is the default
        given = {name: value for name, value in given.items() if value is not None}
        try:
            made = Sampling(**given, vocab_size=language.size, max_tokens=max_tokens, logprobs=logprobs)
        except ValueError as error:
            raise errors.of(error, API_NAMES) from None
        low, high = REPETITION
        if not low <= made.repetition_penalty <= high:
            raise ApiError(400, f"repetition_penalty: expected {low} to {high:g} (1: off), got "
                           f"{made.repetition_penalty:g}", "repetition_penalty")  # fmt: skip
        return made

    def streaming_usage(self) -> bool:
        """Whether a stream ends with its usage. Raises ApiError."""
        if self.stream_options is None:
            return False
        if not self.stream:
            raise ApiError(400, "stream_options: expected only with stream true", "stream_options")
        return bool(self.stream_options.include_usage)


async def constraint_of(language: Language, given: Any, name: str = "response_format") -> Constraint | None:
    """What a reply must follow, compiled in a worker. Raises ApiError."""
    return None if given is None else await work(compiled, language, given, name)


def compiled(language: Language, given: Any, name: str) -> Constraint | None:
    """A constraint, or None for plain text. Takes its time. Raises ApiError."""
    kind = given.get("type") if isinstance(given, dict) else None
    if kind not in ("text", "json_object", "json_schema", "regex", "lark"):
        raise ApiError(400, f"{name}: expected an object whose type is {FORMATS}, got {shortly(given)}", name)
    if kind == "text":
        return None
    try:
        compiler = language.compiler()
        if kind == "json_object":
            return compiler.json_schema({"type": "object"})
        if kind == "json_schema":
            # chats have it one level deeper than /v1/responses
            inner = given.get("json_schema", given)
            if not isinstance(inner, dict) or "schema" not in inner:
                raise ApiError(400, f"{name}.json_schema: expected an object with a schema, got {shortly(inner)}", name)
            return compiler.json_schema(inner["schema"])
        text = given.get(kind)
        return compiler.regex(text) if kind == "regex" else compiler.lark(text)  # type: ignore[arg-type]
    except ConstraintError as error:
        raise ApiError(400, f"{name}: {error}", name, "invalid_schema") from None


def check_count(value: Any, name: str, settings: Settings, least: int = 0) -> int | None:
    """The most tokens of a reply as a request names them. Raises ApiError."""
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ApiError(400, f"{name}: expected a whole number of at least {least}, got {shortly(value)}", name)
    if value > settings.max_new_tokens:
        most = f"{settings.max_new_tokens:,}, this server's --max-new-tokens"
        raise ApiError(400, f"{name}: expected at most {most}; got {shortly(value)}", name)
    return value


@dataclass(frozen=True)
class Prompt:
    """One prompt of a request."""

    tokens: list[int]
    text: str | None = None
    """As it was given; None where it came as tokens."""
    added: int = 0
    """Of its first tokens these are not in the text."""

    @classmethod
    def of(cls, encoded: Encoded, text: str) -> "Prompt":
        """Of a text."""
        return cls(encoded.tokens, text, encoded.added)

    @classmethod
    def of_chat(cls, language: Language, messages: Sequence[Mapping[str, Any]], name: str) -> "Prompt":
        """Of messages, in the chat template. Raises ApiError."""
        try:
            text = language.chat(messages)
        except ChatError as error:
            raise ApiError(400, f"{name}: {error}", name) from None
        return cls(language.encode(text), text)


def generation_of(
    served: Served,
    key: str,
    prompt: Prompt,
    sampling: Sampling,
    constraint: Constraint | None = None,
    prompt_logprobs: int | None = None,
    name: str = "prompt",
) -> Generation:
    """What the engine is asked for one prompt; the one place where it is. Raises ApiError for an empty prompt."""
    if not prompt.tokens:
        raise ApiError(400, f"{name}: expected at least one token, got none; give a text to go on from", name)
    return Generation(key, prompt.tokens, sampling, constraint, prompt_logprobs)


def room(served: Served, num_tokens: int) -> int:
    """Most tokens that a reply without a limit of its own may have, after so many tokens."""
    capacity = served.host.engine.scheduler.limits.capacity
    most = served.settings.max_new_tokens
    return most if capacity is None else max(1, min(most, capacity - num_tokens + 1))


def new_id(kind: str) -> str:
    """A name that no other request has."""
    return f"{kind}-{secrets.token_hex(12)}"


def most_logprobs(value: Any, name: str) -> int | None:
    """How many alternatives come with each token. Raises ApiError."""
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MOST_LOGPROBS:
        message = f"{name}: expected a whole number from 0 to {MOST_LOGPROBS}, got {shortly(value)}"
        raise ApiError(400, message, name)
    return value
