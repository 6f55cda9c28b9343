"""`POST /v1/embeddings`: texts or tokens as vectors, each read once like a prompt."""

import base64
import struct
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field
from starlette.requests import Request

from swat_lm.serve.generation import Generation
from swat_lm.serve.http.asking import Options, Prompt, Served, new_id
from swat_lm.serve.http.bodies import Body, described, read_body, work
from swat_lm.serve.http.completions import TEXTS, TOKENS, prompts_of
from swat_lm.serve.http.errors import ApiError
from swat_lm.serve.http.streams import Running
from swat_lm.serve.sampling import Sampling

__all__ = ["EmbeddingRequest", "Embeddings", "embed"]


class EmbeddingRequest(Body):
    """What to read."""

    ignored: ClassVar[frozenset[str]] = Options.ignored

    model: str
    """The name of the model, as in `GET /v1/models`."""
    input: Any = described({"anyOf": [{"type": "string"}, TEXTS, TOKENS, {"type": "array", "items": TOKENS}]},
                     "A text, token ids, or a list of either.", ...)  # fmt: skip
    encoding_format: Literal["float", "base64"] | None = None
    """base64: of float32 numbers, little end first, as OpenAI's client asks for."""
    dimensions: None = None
    """None: vectors are not cut."""


class Embedding(BaseModel):
    """One vector."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens read."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    """One vector for each text, in order."""

    object: Literal["list"] = "list"
    data: Annotated[list[Embedding], Field(min_length=1)]
    model: str
    usage: EmbeddingUsage


async def embed(request: Request, served: Served, running_of: Any) -> Embeddings:
    """Answer a request."""
    asked = await read_body(request, EmbeddingRequest)
    served.check_model(asked.model)
    prompts: list[Prompt] = await work(prompts_of, served, asked.input, "input")
    for place, prompt in enumerate(prompts):
        if not prompt.tokens:
            raise ApiError(400, f"input[{place}]: expected at least one token, got none; leave it out", "input")
    name = new_id("embd")
    generations = [
        Generation(f"{name}-{place}", prompt.tokens, Sampling(max_tokens=0), embedding=True)
        for place, prompt in enumerate(prompts)
    ]
    num_read = sum(len(prompt.tokens) for prompt in prompts)
    told: dict[str, Any] = {"prompts": len(prompts), "prompt_tokens": num_read}
    request.state.told = told
    if served.settings.log_prompts:
        told["prompt"] = asked.input
    vectors: dict[int, Sequence[float]] = {}
    running: Running = await running_of(generations)
    async with running:
        async for number, event in running:
            if event.embedding is not None:
                vectors[number] = event.embedding
    data = [Embedding(index=place, embedding=written(vectors[place], asked.encoding_format))
            for place in range(len(prompts))]  # fmt: skip
    usage = EmbeddingUsage(prompt_tokens=num_read, total_tokens=num_read)
    return Embeddings(data=data, model=served.settings.model, usage=usage)


def written(vector: Sequence[float], encoding: str | None) -> list[float] | str:
    """A vector as the request wants it."""
    if encoding != "base64":
        return list(vector)
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
