"""`POST /v1/chat/completions`: messages in the tokenizer's chat template, and the answer to them."""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field
from starlette.requests import Request

from swat_lm.serve.generation import Generation
from swat_lm.serve.http.asking import (
    Counts,
    Options,
    Prompt,
    Served,
    check_count,
    constraint_of,
    generation_of,
    most_logprobs,
    new_id,
    room,
    whole,
)  # fmt: skip
from swat_lm.serve.http.bodies import Body, read_body, work
from swat_lm.serve.http.completions import MANY_TOKENS, Usage, usage_of
from swat_lm.serve.http.errors import ApiError
from swat_lm.serve.http.replies import LOWEST, Delta, Logged, Reply
from swat_lm.serve.http.session_turns import chat_turn
from swat_lm.serve.http.streams import DONE, Running, sse
from swat_lm.serve.language import Language

__all__ = ["ChatCompletion", "ChatRequest", "Message", "chat", "templated", "text_of"]

NO_TOOLS = "this server calls no tools; leave it out, and ask for JSON by response_format"
NO_SETTING = "this model has no such setting; leave it out"
NO_SOUND = "this server reads and writes text only; leave it out"
ROLES = ("system", "user", "assistant")


class Part(Body):
    """A part of a message."""

    type: Literal["text", "input_text", "output_text"]
    text: str


class Message(Body):
    """What somebody said."""

    ignored: ClassVar[frozenset[str]] = frozenset()

    role: Literal["system", "developer", "user", "assistant"]
    """`developer` is taken for `system`."""
    content: str | Annotated[list[Part], Field(fail_fast=True)]
    name: str | None = None
    """Handed to the chat template, few of which know it."""
    refusal: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    """None, since this server calls no tools."""
    function_call: None = None
    audio: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


class ChatRequest(Options):
    """What was said, and how to answer."""

    ignored: ClassVar[frozenset[str]] = Options.ignored | {"parallel_tool_calls"}
    refused: ClassVar[Mapping[str, str]] = {
        **Options.refused,
        **dict.fromkeys(("tools", "functions", "function_call", "web_search_options"), NO_TOOLS),
        "audio": NO_SOUND,
        **dict.fromkeys(("reasoning_effort", "verbosity", "prediction"), NO_SETTING),
    }

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    """In the order in which they were said."""
    max_tokens: Any = whole(1, text="Most tokens of the answer; default up to its end, or --max-new-tokens.")
    max_completion_tokens: Any = whole(1, text="The newer name of max_tokens.")
    logprobs: bool | None = None
    """Whether each token comes with its log-probability."""
    top_logprobs: Any = whole(0, 20, "So many alternatives to each token; needs logprobs.")
    tool_choice: Literal["none", "auto"] | None = None
    """Without tools both mean none."""
    modalities: list[Literal["text"]] | None = None


class TopLogProb(BaseModel):
    """A token that might have come."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogProb(TopLogProb):
    """A token that came."""

    top_logprobs: list[TopLogProb]


class ChatLogProbs(BaseModel):
    """One entry per token of the text."""

    content: list[TokenLogProb]


class ChatMessage(BaseModel):
    """An answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogProbs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """All answers."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(BaseModel):
    """The next part of an answer's message."""

    role: Literal["assistant"] = "assistant"
    content: str = ""


class ChunkChoice(BaseModel):
    """The next part of an answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogProbs | None
    finish_reason: Literal["stop", "length"] | None


class ChatChunk(BaseModel):
    """An event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


async def chat(request: Request, served: Served, running_of: Any) -> "ChatCompletion | AsyncGenerator[str]":
    """Answer a request: whole, or as the lines of a stream."""
    asked = await read_body(request, ChatRequest)
    served.check_model(asked.model)
    with_usage = asked.streaming_usage()
    counts = [check_count(getattr(asked, name), name, served.settings, 1)
              for name in ("max_completion_tokens", "max_tokens")]  # fmt: skip
    if None not in counts and counts[0] != counts[1]:
        raise ApiError(400, f"max_tokens: expected the same as max_completion_tokens ({counts[0]}), or neither; got "
                       f"{counts[1]}", "max_tokens")  # fmt: skip
    logprobs = most_logprobs(asked.top_logprobs, "top_logprobs")
    if logprobs is not None and not asked.logprobs:
        raise ApiError(400, "top_logprobs: expected only with logprobs true", "top_logprobs")
    logprobs = (logprobs or 0) if asked.logprobs else None
    constraint = await constraint_of(served.language, asked.response_format)
    messages = [{"role": one.role, "content": one.content, "name": one.name} for one in asked.messages]
    most = next((count for count in counts if count is not None), None)
    name, told, read = new_id("chatcmpl"), dict[str, Any](), Counts()
    request.state.told = told
    if served.settings.log_prompts:
        told["prompt"] = plain(messages)
    running: Running
    if asked.session_id is not None:
        sampling = asked.sampling(served.language, most, logprobs)
        turn = chat_turn(served, asked, Generation(name, (), sampling, constraint), plain(messages), most, read)
        running = await running_of((), turn)
    else:
        prompt = await work(templated, served, messages, "messages")
        read.prompt = len(prompt.tokens)
        sampling = asked.sampling(served.language, room(served, read.prompt) if most is None else most, logprobs)
        running = await running_of([generation_of(served, name, prompt, sampling, constraint, name="messages")])
    told["prompt_tokens"] = read.prompt
    answer = Answer(served, name, read, sampling.n, logprobs)
    if asked.stream:
        return answer.lines(running, with_usage)
    async with running:
        return await answer.whole(running)


def plain(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as chat templates know them."""
    found = []
    for one in messages:
        role = "system" if one["role"] == "developer" else one["role"]
        named = {"name": one["name"]} if one.get("name") is not None else {}
        found.append({"role": role, "content": text_of(one["content"]), **named})
    return found


def templated(served: Served, messages: Sequence[Mapping[str, Any]], name: str) -> Prompt:
    """Messages as a prompt. Takes its time. Raises ApiError."""
    return Prompt.of_chat(served.language, plain(messages), name)


def text_of(content: str | Sequence[Part]) -> str:
    """The text of a message."""
    return content if isinstance(content, str) else "".join(part.text for part in content)


class Answer:
    """The answers to one request."""

    def __init__(self, served: Served, name: str, read: Counts, n: int, logprobs: int | None) -> None:
        self._served, self._logprobs, self._read = served, logprobs, read
        self._head: dict[str, Any] = {
            "id": name, "created": int(time.time()), "model": served.settings.model,
            "system_fingerprint": served.fingerprint,
        }  # fmt: skip
        self._replies = [Reply(served.language, logprobs) for _ in range(n)]

    async def _deltas(self, running: Running) -> AsyncIterator[tuple[int, Delta]]:
        async for _, event in running:
            if delta := self._replies[event.sample].take(event):
                yield event.sample, delta

    async def whole(self, running: Running) -> ChatCompletion:
        """All answers, when all have ended."""
        texts, logged = [""] * len(self._replies), [list[Logged]() for _ in self._replies]
        async for index, delta in self._deltas(running):
            texts[index] += delta.text
            logged[index] += delta.logged
        choices = [
            ChatChoice(index=index, message=ChatMessage(content=text),
                       logprobs=await work(self._logprobs_of, logged[index]) if len(logged[index]) >= MANY_TOKENS
                       else self._logprobs_of(logged[index]), finish_reason=self._replies[index].finish or "length")
            for index, text in enumerate(texts)
        ]  # fmt: skip
        return ChatCompletion(**self._head, choices=choices, usage=usage_of(self._read, self._replies))

    async def lines(self, running: Running, with_usage: bool) -> AsyncGenerator[str]:
        """Server-sent events as the answers come."""
        async with running:
            try:
                for index in range(len(self._replies)):
                    yield self._line(index, ChatDelta(role="assistant", content=""))
                async for index, delta in self._deltas(running):
                    if delta.text or delta.logged:
                        yield self._line(index, ChatDelta(content=delta.text), delta.logged)
                    if delta.finish is not None:
                        yield self._line(index, ChatDelta(), finish=delta.finish)
                if with_usage:
                    usage = usage_of(self._read, self._replies)
                    yield sse(ChatChunk(**self._head, object="chat.completion.chunk", choices=[], usage=usage))
            except ApiError as error:
                yield sse(error.body())
        yield DONE

    def _line(self, index: int, delta: ChatDelta, logged: Sequence[Logged] = (), finish: Any = None) -> str:
        choice = ChunkChoice(
            index=index, delta=delta, logprobs=self._logprobs_of(logged) if logged else None, finish_reason=finish
        )
        return sse(ChatChunk(**self._head, object="chat.completion.chunk", choices=[choice]))

    def _logprobs_of(self, logged: Sequence[Logged]) -> ChatLogProbs | None:
        return None if self._logprobs is None else chat_logprobs(self._served.language, logged)


def chat_logprobs(language: Language, logged: Sequence[Logged]) -> ChatLogProbs:
    """Of tokens, as chats have them."""

    def named(token: int, logprob: float | None) -> dict[str, Any]:
        raw = language.bytes_of(token)
        return {
            "token": language.piece(token), "logprob": LOWEST if logprob is None else max(LOWEST, logprob),
            "bytes": None if raw is None else list(raw),
        }  # fmt: skip

    content = []
    for one in logged:
        top = [TopLogProb(**named(*pair)) for pair in one.top or ()]
        content.append(TokenLogProb(**named(one.token, one.logprob), top_logprobs=top))
    return ChatLogProbs(content=content)
