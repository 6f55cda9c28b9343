"""`POST /v1/responses`: OpenAI's newer way to ask a chat model, as far as it keeps nothing between two requests."""

import time
from collections.abc import AsyncGenerator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field
from starlette.requests import Request

from swat_lm.serve.http.asking import (
    Options,
    Prompt,
    Served,
    check_count,
    constraint_of,
    generation_of,
    new_id,
    number,
    room,
    whole,
)  # fmt: skip
from swat_lm.serve.http.bodies import Body, described, read_body, work
from swat_lm.serve.http.chats import NO_TOOLS, Part, templated
from swat_lm.serve.http.errors import ApiError
from swat_lm.serve.http.replies import Reply
from swat_lm.serve.http.streams import Running, sse

__all__ = ["ResponseObject", "ResponseRequest", "respond"]

KEEPS_NOTHING = "this server keeps nothing between requests; leave it out, and send all messages each time"


class InputPart(Part):
    """A part of a message; answers of this server's may be handed back as they are."""

    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: Annotated[list[Any], Field(max_length=0)] | None = None


class InputMessage(Body):
    """What somebody said."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[InputPart], Field(fail_fast=True)]
    id: str | None = None
    """Of an answer of this server's, handed back."""
    status: str | None = None


class TextOptions(Body):
    """What the answer is to be."""

    ignored: ClassVar[frozenset[str]] = frozenset()
    format: Any = described(
        {"type": ["object", "null"], "properties": {"type": {"enum": ["text", "json_object", "json_schema"]}},
         "required": ["type"]}, "text, json_object, or json_schema with `schema` beside it.",
    )  # fmt: skip
    verbosity: Literal["medium"] | None = None


class ResponseRequest(Body):
    """What was said, and how to answer."""

    ignored: ClassVar[frozenset[str]] = Options.ignored | {"parallel_tool_calls"}
    refused: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("previous_response_id", "conversation", "background", "store"), KEEPS_NOTHING),
        "prompt": "this server has no stored prompts; send the text as input",
        **dict.fromkeys(("tools", "max_tool_calls"), NO_TOOLS),
        **dict.fromkeys(("reasoning", "include", "top_logprobs", "stream_options"),
                        "this endpoint has no such setting; leave it out"),
        **dict.fromkeys(("n", "stop", "logprobs", "response_format", "messages", "max_tokens"),
                        "belongs to /v1/chat/completions; this endpoint has input, max_output_tokens and text.format"),
    }  # fmt: skip

    model: str
    """The name of the model, as in `GET /v1/models`."""
    input: str | Annotated[list[InputMessage], Field(min_length=1, fail_fast=True)]
    """A user's message, or all messages in order."""
    instructions: str | None = None
    """A system message before all others."""
    stream: bool | None = None
    """Whether the answer comes as server-sent events."""
    max_output_tokens: Any = whole(1, text="Most tokens of the answer; default up to its end, or --max-new-tokens.")
    temperature: Any = number(0, text="0: always the likeliest token. Default 1.")
    top_p: Any = number(0, 1, "Among the likeliest tokens that reach this sum. Default 1.", above=True)
    text: TextOptions | None = None
    tool_choice: Literal["none", "auto"] | None = None
    """Without tools both mean none."""
    truncation: Literal["disabled"] | None = None


class OutputText(BaseModel):
    """The text of an answer."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[str] = []
    logprobs: list[str] = []


class OutputMessage(BaseModel):
    """An answer."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]


class InputDetails(BaseModel):
    """Of tokens read."""

    cached_tokens: int = 0


class OutputDetails(BaseModel):
    """Of tokens drawn."""

    reasoning_tokens: int = 0


class ResponseUsage(BaseModel):
    """Tokens read and drawn."""

    input_tokens: int
    input_tokens_details: InputDetails = InputDetails()
    output_tokens: int
    output_tokens_details: OutputDetails = OutputDetails()
    total_tokens: int


class Incomplete(BaseModel):
    """Why an answer is not whole."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseObject(BaseModel):
    """An answer with what was asked."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete"] = "in_progress"
    error: None = None
    incomplete_details: Incomplete | None = None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[OutputMessage] = []
    parallel_tool_calls: bool = False
    previous_response_id: None = None
    store: bool = False
    temperature: float
    top_p: float
    tool_choice: Literal["none"] = "none"
    tools: list[str] = []
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    metadata: dict[str, str] = {}


async def respond(request: Request, served: Served, running_of: Any) -> "ResponseObject | AsyncGenerator[str]":
    """Answer a request: whole, or as the lines of a stream."""
    asked = await read_body(request, ResponseRequest)
    served.check_model(asked.model)
    most = check_count(asked.max_output_tokens, "max_output_tokens", served.settings, 1)
    given = None if asked.text is None else asked.text.format
    constraint = await constraint_of(served.language, given, "text.format")
    messages: list[dict[str, Any]] = [{"role": "user", "content": asked.input}] if isinstance(asked.input, str) else [
        {"role": one.role, "content": one.content} for one in asked.input
    ]  # fmt: skip
    if asked.instructions is not None:
        messages.insert(0, {"role": "system", "content": asked.instructions})
    prompt: Prompt = await work(templated, served, messages, "input")
    options = Options(model=asked.model, temperature=asked.temperature, top_p=asked.top_p)
    sampling = options.sampling(served.language, room(served, len(prompt.tokens)) if most is None else most, None)
    told: dict[str, Any] = {"prompt_tokens": len(prompt.tokens)}
    request.state.told = told
    if served.settings.log_prompts:
        told["prompt"] = prompt.text
    made = ResponseObject(
        id=new_id("resp"), created_at=int(time.time()), instructions=asked.instructions, max_output_tokens=most,
        model=served.settings.model, temperature=sampling.temperature, top_p=sampling.top_p,
    )  # fmt: skip
    answer = Answer(served, made, len(prompt.tokens))
    generation = generation_of(served, made.id, prompt, sampling, constraint, name="input")
    running: Running = await running_of([generation], format_name="text.format")
    if asked.stream:
        return answer.lines(running)
    async with running:
        return await answer.whole(running)


class Answer:
    """The answer to one request."""

    def __init__(self, served: Served, made: ResponseObject, num_read: int) -> None:
        self._made, self._num_read, self._reply = made, num_read, Reply(served.language)
        self._item, self._text, self._number = new_id("msg"), "", 0

    async def whole(self, running: Running) -> ResponseObject:
        """When it has ended."""
        async for _, event in running:
            self._text += self._reply.take(event).text
        return self._ended()

    async def lines(self, running: Running) -> AsyncGenerator[str]:
        """Server-sent events as the answer comes, in OpenAI's order."""
        place = {"item_id": self._item, "output_index": 0, "content_index": 0}
        async with running:
            try:
                for kind in ("response.created", "response.in_progress"):
                    yield self._event(kind, response=self._made)
                yield self._event("response.output_item.added", output_index=0, item=self._message("in_progress", []))
                yield self._event("response.content_part.added", **place, part=OutputText(text=""))
                async for _, event in running:
                    if new := self._reply.take(event).text:
                        self._text += new
                        yield self._event("response.output_text.delta", **place, delta=new, logprobs=[])
            except ApiError as error:
                said = error.body().error
                yield self._event("error", code=said.code, message=said.message, param=said.param)
                return
        ended = self._ended()
        (message,) = ended.output
        yield self._event("response.output_text.done", **place, text=self._text, logprobs=[])
        yield self._event("response.content_part.done", **place, part=message.content[0])
        yield self._event("response.output_item.done", output_index=0, item=message)
        yield self._event(f"response.{ended.status}", response=ended)

    def _event(self, kind: str, **values: Any) -> str:
        plain = {name: value.model_dump() if isinstance(value, BaseModel) else value for name, value in values.items()}
        self._number += 1
        return sse({"type": kind, "sequence_number": self._number - 1, **plain}, kind)

    def _message(self, status: Any, content: list[OutputText]) -> OutputMessage:
        return OutputMessage(id=self._item, status=status, content=content)

    def _ended(self) -> ResponseObject:
        is_cut = self._reply.finish == "length"
        status = "incomplete" if is_cut else "completed"
        drawn = self._reply.num_tokens
        return self._made.model_copy(update={
            "status": status, "incomplete_details": Incomplete() if is_cut else None,
            "output": [self._message(status, [OutputText(text=self._text)])],
            "usage": ResponseUsage(
                input_tokens=self._num_read, output_tokens=drawn, total_tokens=self._num_read + drawn
            ),
        })  # fmt: skip
