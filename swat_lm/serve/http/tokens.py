"""`POST /tokenize` and `POST /detokenize`: what the model's tokenizer makes of a text, and of tokens."""

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, Field
from starlette.requests import Request

from swat_lm.serve.http.asking import Served
from swat_lm.serve.http.bodies import Body, described, read_body, work
from swat_lm.serve.http.chats import Message, templated
from swat_lm.serve.http.completions import TOKENS, checked_tokens
from swat_lm.serve.http.errors import ApiError

__all__ = ["DetokenizeRequest", "Text", "TokenizeRequest", "Tokens", "detokenize", "tokenize"]


class TokenizeRequest(Body):
    """A text, or messages as a chat's prompt has them."""

    ignored: ClassVar[frozenset[str]] = frozenset()

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    add_special_tokens: bool | None = None
    """Whether what begins a text stands before it, as before a completion's prompt; default true. Not of messages,
    whose template says it."""


class Tokens(BaseModel):
    """A text's tokens."""

    tokens: list[int]
    count: int


class DetokenizeRequest(Body):
    """Tokens."""

    model: str | None = None
    tokens: Any = described({**TOKENS, "minItems": 0}, "Ids of the model.", ...)


class Text(BaseModel):
    """What tokens say, special ones included."""

    prompt: str


async def tokenize(request: Request, served: Served) -> Tokens:
    """The tokens of a text."""
    asked = await read_body(request, TokenizeRequest)
    if asked.model is not None:
        served.check_model(asked.model)
    if (asked.prompt is None) == (asked.messages is None):
        raise ApiError(400, "prompt: expected either a prompt or messages", "prompt")
    if asked.messages is not None:
        messages = [{"role": one.role, "content": one.content, "name": one.name} for one in asked.messages]
        tokens = (await work(templated, served, messages, "messages")).tokens
    elif asked.add_special_tokens is False:
        tokens = await work(served.language.encode, asked.prompt)
    else:
        tokens = (await work(served.language.prompt, asked.prompt)).tokens
    return Tokens(tokens=tokens, count=len(tokens))


async def detokenize(request: Request, served: Served) -> Text:
    """The text of tokens."""
    asked = await read_body(request, DetokenizeRequest)
    if asked.model is not None:
        served.check_model(asked.model)
    if not isinstance(asked.tokens, list):
        raise ApiError(400, "tokens: expected a list of token ids", "tokens")
    tokens, most = checked_tokens(asked.tokens, "tokens"), served.language.vocabulary
    for token in tokens:
        if token >= most:
            raise ApiError(400, f"tokens: expected ids below {most:,}, the model's; got {token}", "tokens")
    return Text(prompt=await work(served.language.decode, tokens))
