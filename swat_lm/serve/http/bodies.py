"""Reading a request's body: JSON into one of our models, or an error that names the field, what came and what to do.

Long bodies are read in a worker thread, so that others do not wait for them.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Self, TypeVar

from anyio import to_thread
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json
from starlette.requests import Request

from swat_lm.serve.http.errors import ApiError
from swat_lm.words import nearest

__all__ = ["Body", "described", "read_body", "shortened", "shortly", "work"]

# a body that takes longer to read than a thread to start
LONG_BODY = 1 << 15
# error messages name values, but not whole prompts
LONGEST_VALUE = 60

Read = TypeVar("Read", bound="Body")
T = TypeVar("T")


def described(schema: dict[str, Any], text: str = "", default: Any = None) -> Any:
    """A field that code of ours checks, and what the OpenAPI document says of it; `...`: it has to be there."""
    return Field(default, description=text or None, json_schema_extra=schema)


class Body(BaseModel):
    """A request's body. Fields that are not declared are refused, but for those that have no effect on the answer."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, strict=True)
    ignored: ClassVar[frozenset[str]] = frozenset()
    """Taken with any value, since the answer would be the same without."""
    refused: ClassVar[Mapping[str, str]] = {}
    """What OpenAI's API has and this server has not: why, and what to do. Null, false and nothing are taken."""

    @classmethod
    def read(cls, raw: bytes) -> Self:
        """Raises ApiError."""
        try:
            given = from_json(raw, allow_inf_nan=False)
        except ValueError as error:
            raise ApiError(400, f"the body is not JSON in UTF-8: {error}", code="invalid_json") from None
        if not isinstance(given, dict):
            raise ApiError(400, f"the body: expected a JSON object, got {shortly(given)}")
        fields = {name: value for name, value in given.items() if name not in cls.ignored}
        for name in [name for name in fields if name not in cls.model_fields]:
            value = fields.pop(name)
            if name not in cls.refused:
                raise unknown_field(name, [*cls.model_fields, *cls.refused])
            # a default that clients send
            if value not in (None, False, "", [], {}):
                raise ApiError(400, f"{name}: {cls.refused[name]}; got {shortly(value)}", name, "unsupported")
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise explained(error) from None


async def read_body(request: Request, kind: type[Read]) -> Read:
    """The body of a request as a `kind`. Raises ApiError."""
    said = request.headers.get("content-type", "")
    media = said.partition(";")[0].strip().lower()
    if media != "application/json":
        raise ApiError(415, f"content-type: expected application/json, got {shortly(said)}")
    raw = await request.body()
    return kind.read(raw) if len(raw) < LONG_BODY else await work(kind.read, raw)


async def work(function: Callable[..., T], *arguments: Any) -> T:
    """A call that takes its time, in a thread."""
    return await to_thread.run_sync(partial(function, *arguments))


def unknown_field(name: str, known: list[str]) -> ApiError:
    """A field that no endpoint of this kind has."""
    near = nearest(name, known)
    advice = f"did you mean {near[0]!r}?" if near else "leave it out"
    return ApiError(400, f"unknown field {shortly(name)}; {advice}", shortened(name), "unknown_field")


def explained(error: ValidationError) -> ApiError:
    """One thing that is wrong with a body: the one that lies deepest."""
    errors = error.errors(include_url=False)
    # of a text or a list, where it was no text, what is wrong with the list says more
    found = max(errors, key=lambda one: (len(one["loc"]), one["type"] != "string_type"))
    # where a field may be of two types, the library puts the type's name behind the field's
    path = [part for part in found["loc"] if isinstance(part, int) or (part.isidentifier() and part != "str")]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".") or None
    if found["type"] == "missing":
        return ApiError(400, f"missing field {param!r}", param, "missing_field")
    if found["type"] == "extra_forbidden":
        return ApiError(400, f"unknown field {shortened(str(param))!r}; leave it out", param, "unknown_field")
    if found["type"] == "value_error":
        return ApiError(400, str(found.get("ctx", {})["error"]), param)
    is_either = found["type"] == "list_type" and any(one["type"] == "string_type" for one in errors)
    said = "expected a text or a list" if is_either else found["msg"][:1].lower() + found["msg"][1:]
    return ApiError(400, f"{param}: {said}; got {shortly(found['input'])}", param)


def shortly(value: Any) -> str:
    """A value as an error names it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value):,}"
    # slices before repr, which would write all of a prompt
    return repr(value[: LONGEST_VALUE + 1])[:LONGEST_VALUE] if isinstance(value, str) else shortened(repr(value))


def shortened(text: str) -> str:
    """A text of a line at most."""
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."
