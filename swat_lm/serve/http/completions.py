"""`POST /v1/completions`: texts or tokens gone on, with log-probabilities of both where they are asked for."""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import BaseModel
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
    whole,
)  # fmt: skip
from swat_lm.serve.http.bodies import described, read_body, shortly, work
from swat_lm.serve.http.errors import ApiError
from swat_lm.serve.http.replies import LOWEST, Delta, Echo, Logged, Reply
from swat_lm.serve.http.session_turns import check_text_turn, text_turn
from swat_lm.serve.http.streams import DONE, Running, sse
from swat_lm.serve.language import Language

__all__ = ["Completion", "CompletionRequest", "Usage", "complete", "prompts_of"]

DEFAULT_MAX_TOKENS = 16
# log-probabilities that take longer to write than a thread to start
MANY_TOKENS = 64
TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
TEXTS = {"type": "array", "items": {"type": "string"}, "minItems": 1}
EXPECTED_PROMPT = "a text, token ids, or a list of either"


class CompletionRequest(Options):
    """What to go on from, and how."""

    ignored: ClassVar[frozenset[str]] = Options.ignored
    refused: ClassVar[Mapping[str, str]] = {
        **Options.refused, "suffix": "this model only writes on; leave it out",
    }  # fmt: skip

    prompt: Any = described({"anyOf": [{"type": "string"}, TEXTS, TOKENS, {"type": "array", "items": TOKENS}]},
                      "A text, token ids, or a list of either.", ...)  # fmt: skip
    max_tokens: Any = whole(0, text="Most tokens of a reply; default 16. 0 reads the prompt only.")
    echo: bool | None = None
    """Whether the prompt comes before the reply."""
    logprobs: Any = whole(0, 20, "So many alternatives to each token, with log-probabilities.")
    best_of: Any = whole(1, text="Taken where it is n: nothing is sorted out.")


class LogProbs(BaseModel):
    """One entry per token of the text. Tokens that are no text by themselves are named `bytes:\\xe2`."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One reply, or the next part of one."""

    text: str
    index: int
    logprobs: LogProbs | None
    finish_reason: Literal["stop", "length"] | None


class PromptDetails(BaseModel):
    """Of a prompt's tokens."""

    cached_tokens: int
    """Those that the session held already."""


class Usage(BaseModel):
    """Tokens of all prompts, once each, and of all replies, with those that ended them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Completion(BaseModel):
    """The replies; of a stream, the next part of one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


async def complete(request: Request, served: Served, running_of: Any) -> "Completion | AsyncGenerator[str]":
    """Answer a request: whole, or as the lines of a stream."""
    asked = await read_body(request, CompletionRequest)
    served.check_model(asked.model)
    number = asked.n if asked.best_of is None else asked.best_of
    if number != asked.n and (number, asked.n) != (1, None):
        raise ApiError(400, f"best_of: expected n, since no reply is sorted out; got {shortly(number)}", "best_of")
    with_usage = asked.streaming_usage()
    max_tokens = check_count(asked.max_tokens, "max_tokens", served.settings)
    max_tokens = DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens
    logprobs = most_logprobs(asked.logprobs, "logprobs")
    check_text_turn(served, asked)
    sampling = asked.sampling(served.language, max_tokens, logprobs)
    constraint = await constraint_of(served.language, asked.response_format)
    prompts = await work(prompts_of, served, asked.prompt)
    name = new_id("cmpl")
    weighed = logprobs if asked.echo else None
    read, turn = Counts(sum(len(prompt.tokens) for prompt in prompts)), None
    check_weighed(served, weighed, read)
    generations: list[Generation] = []
    if asked.session_id is not None:
        turn = text_turn(served, asked, prompts, Generation(name, (), sampling, constraint), read)
    else:
        generations = [
            generation_of(served, f"{name}-{place}", prompt, sampling, constraint, weighed)
            for place, prompt in enumerate(prompts)
        ]
    told: dict[str, Any] = {"prompts": len(prompts), "prompt_tokens": read.prompt}
    request.state.told = told
    if served.settings.log_prompts:
        told["prompt"] = asked.prompt
    echoes = await work(echoes_of, served.language, prompts, logprobs) if asked.echo else [None] * len(prompts)
    answer = Answer(served, name, read, sampling.n, logprobs, echoes)
    running: Running = await running_of(generations, turn)
    told["prompt_tokens"] = read.prompt
    if asked.stream:
        return answer.lines(running, with_usage)
    async with running:
        return await answer.whole(running)


def check_weighed(served: Served, logprobs: int | None, read: Counts) -> None:
    """Raise ApiError for more tokens of prompts with log-probabilities than there is memory for."""
    most = served.settings.max_weighed
    if logprobs is not None and read.prompt > most:
        message = f"expected at most {most:,} tokens of prompts with echo and logprobs, got {read.prompt:,}"
        raise ApiError(400, f"prompt: {message}; ask in parts, or leave one of both out", "prompt")


class Answer:
    """The replies to all prompts of one request."""

    def __init__(
        self, served: Served, name: str, read: Counts, n: int, logprobs: int | None,
        echoes: Sequence[Echo | None],
    ) -> None:  # fmt: skip
        self._served, self._name, self._n, self._logprobs = served, name, n, logprobs
        self._created = int(time.time())
        self._read, self._echoes = read, echoes
        self._replies = [Reply(served.language, logprobs, echo, with_end=True) for echo in echoes for _ in range(n)]

    async def _deltas(self, running: Running) -> AsyncIterator[tuple[int, Delta]]:
        async for number, event in running:
            echo = self._echoes[number]
            if event.prompt and echo is not None:
                echo.take(event.prompt)
            if event.choice is not None or event.ended is not None or event.text:
                index = number * self._n + event.sample
                take = self._replies[index].take
                # the first event of a reply brings its prompt too
                is_long = echo is not None and self._replies[index].num_tokens == 0
                if delta := await work(take, event) if is_long else take(event):
                    yield index, delta

    async def whole(self, running: Running) -> Completion:
        """All replies, when all have ended."""
        texts, logged = [""] * len(self._replies), [list[Logged]() for _ in self._replies]
        async for index, delta in self._deltas(running):
            texts[index] += delta.text
            logged[index] += delta.logged
        choices = [
            CompletionChoice(text=text, index=index, logprobs=await self._logprobs_of(logged[index]),
                             finish_reason=self._replies[index].finish)
            for index, text in enumerate(texts)
        ]  # fmt: skip
        return self._made(choices, self._usage())

    async def lines(self, running: Running, with_usage: bool) -> AsyncGenerator[str]:
        """Server-sent events as the replies come."""
        async with running:
            try:
                async for index, delta in self._deltas(running):
                    logprobs = await self._logprobs_of(delta.logged)
                    choice = CompletionChoice(
                        text=delta.text, index=index, logprobs=logprobs, finish_reason=delta.finish
                    )
                    made = self._made([choice])
                    yield await work(sse, made) if len(delta.logged) >= MANY_TOKENS else sse(made)
                if with_usage:
                    yield sse(self._made([], self._usage()))
            except ApiError as error:
                yield sse(error.body())
        yield DONE

    def _made(self, choices: list[CompletionChoice], usage: Usage | None = None) -> Completion:
        made = Completion(
            id=self._name, object="text_completion", created=self._created, model=self._served.settings.model,
            system_fingerprint=self._served.fingerprint, choices=choices,
        )  # fmt: skip
        return made if usage is None else made.model_copy(update={"usage": usage})

    def _usage(self) -> Usage:
        return usage_of(self._read, self._replies)

    async def _logprobs_of(self, logged: Sequence[Logged]) -> LogProbs | None:
        if self._logprobs is None or len(logged) < MANY_TOKENS:
            return None if self._logprobs is None else logprobs_of(self._served.language, logged)
        return await work(logprobs_of, self._served.language, logged)


def echoes_of(language: Language, prompts: Sequence[Prompt], logprobs: int | None) -> list[Echo | None]:
    """Of every prompt. Takes its time."""
    return [Echo(language, prompt, logprobs) for prompt in prompts]


def usage_of(read: Counts, replies: Sequence[Reply]) -> Usage:
    """What one request took."""
    drawn = sum(reply.num_tokens for reply in replies)
    details = PromptDetails(cached_tokens=read.cached)
    return Usage(prompt_tokens=read.prompt, completion_tokens=drawn, total_tokens=read.prompt + drawn,
                 prompt_tokens_details=details)  # fmt: skip


def logprobs_of(language: Language, logged: Sequence[Logged]) -> LogProbs:
    """Of tokens, as completions have them: the token itself is among the alternatives, which are keyed by text."""
    top = []
    for one in logged:
        if one.top is None or one.logprob is None:
            top.append(None)
            continue
        # of two tokens that say the same the likelier one stays
        spread = {}
        for token, value in (*one.top, (one.token, one.logprob)):
            spread.setdefault(language.piece(token), max(LOWEST, value))
        top.append(spread)
    return LogProbs(
        tokens=[language.piece(one.token) for one in logged],
        token_logprobs=[None if one.logprob is None else max(LOWEST, one.logprob) for one in logged],
        top_logprobs=top, text_offset=[one.start for one in logged],
    )  # fmt: skip


def prompts_of(served: Served, given: Any, field: str = "prompt") -> list[Prompt]:
    """One prompt or several, as texts or tokens. Takes its time. Raises ApiError."""
    if isinstance(given, str):
        return [Prompt.of(served.language.prompt(given), given)]
    if not isinstance(given, list) or not given:
        raise ApiError(400, f"{field}: expected {EXPECTED_PROMPT}, got {shortly(given)}", field)
    if all(isinstance(one, int) for one in given):
        return [Prompt(checked_tokens(given, field))]
    if len(given) > served.settings.max_prompts:
        most = served.settings.max_prompts
        raise ApiError(400, f"{field}: expected at most {most} in one request, got {len(given):,}", field)
    found = []
    for place, one in enumerate(given):
        name = f"{field}[{place}]"
        if isinstance(one, str):
            found.append(Prompt.of(served.language.prompt(one), one))
        elif isinstance(one, list) and one:
            found.append(Prompt(checked_tokens(one, name)))
        else:
            raise ApiError(400, f"{name}: expected {EXPECTED_PROMPT}, got {shortly(one)}", name)
    return found


def checked_tokens(given: list[Any], name: str) -> list[int]:
    """Token ids; whether the model has them the engine says. Raises ApiError."""
    for token in given:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < 2**63:
            raise ApiError(400, f"{name}: expected token ids, whole numbers from 0; got {shortly(token)}", name)
    return given
