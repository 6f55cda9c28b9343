"""From the engine's events to an answer: the one place that submits, listens, and gives up for who has gone away."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from swat_lm.serve.generation import Event, Generation
from swat_lm.serve.http import errors
from swat_lm.serve.http.asking import API_NAMES, Served
from swat_lm.serve.http.bodies import work
from swat_lm.serve.http.errors import ApiError
from swat_lm.serve.http.metrics import Metrics
from swat_lm.serve.requests import RequestError
from swat_lm.serve.sampler import NoTokenError
from swat_lm.serve.sessions.outcome import Asked
from swat_lm.serve.sessions.record import Record, SessionError

__all__ = ["DONE", "ClientGoneError", "EventStream", "Running", "SessionTurn", "sse", "unless_gone", "waited"]

T = TypeVar("T")
# to check so many in the engine's thread would make others wait
MANY_TOKENS = 4096
NAMES = {**API_NAMES, "samples": "n", "tokens": "prompt"}
DONE = "data: [DONE]\n\n"
logger = logging.getLogger(__name__)


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True)
class SessionTurn:
    """A request that goes on with a session."""

    session: str
    kind: Literal["text", "chat"]
    generation: Generation
    """Without its tokens, which the session says."""
    prepare: Callable[[Record], Asked]
    is_streamed: bool
    """Then what was sent counts as seen where the client goes away; else nothing does before the whole reply."""


class Running:
    """The generations that one HTTP request asked for; leaving it ends those that still run."""

    def __init__(
        self,
        served: Served,
        metrics: Metrics,
        generations: Sequence[Generation],
        told: dict[str, Any],
        turn: SessionTurn | None = None,
        format_name: str = "response_format",
    ) -> None:
        """`told` gets what the log line is to say of them; of a `turn` its generation is the only one.

        `format_name`: what the request calls the constraint of its replies.
        """
        generations = generations if turn is None else [turn.generation]
        self._host, self._metrics, self._told = served.host, metrics, told
        self._sessions, self._turn, self._format = served.sessions, turn, format_name
        # of a session's reply, what the client has got
        self._shown, self._text = (0, ""), ""
        self.generations = list(generations)
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._left = {number: set(range(one.sampling.n)) for number, one in enumerate(generations)}

    async def start(self) -> Self:
        """Put all in line. Raises ApiError, with none of them left in it."""
        loop, begin = asyncio.get_running_loop(), time.monotonic()
        try:
            self.generations = await self._checked()
            waits = []
            for number, generation in enumerate(self.generations):
                watch = self._metrics.watch_reply(begin)
                deliver = partial(self._deliver, loop, watch, number)
                waits.append(asyncio.wrap_future(self._submit(generation, deliver)))
            results = await asyncio.gather(*waits, return_exceptions=True)
            for found in results:
                if isinstance(found, Exception):
                    raise errors.of(found, NAMES)
        except BaseException:
            self.stop()
            raise
        return self

    async def _checked(self) -> list[Generation]:
        """The generations, checked here where the engine would stand still for it."""
        if self._turn is not None or sum(len(one.tokens) for one in self.generations) < MANY_TOKENS:
            return self.generations
        vocabulary = self._host.engine.model.config.vocab_size
        try:
            return await work(lambda: [one.checked(vocabulary) for one in self.generations])
        except RequestError as error:
            raise errors.of(error, NAMES) from None

    def _submit(self, generation: Generation, deliver: Callable[[Event], None]) -> "Future[None]":
        turn, sessions = self._turn, self._sessions
        if turn is None or sessions is None:
            return self._host.submit(generation, deliver)
        return sessions.turn(turn.session, turn.kind, generation.key, turn.prepare, deliver)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End what still runs; its slots are free with the next step."""
        for number, left in self._left.items():
            # nobody waits for it: it is done between two steps, or not needed any more
            if left and self._turn is not None and self._sessions is not None:
                self._sessions.cancel(self.generations[number].key, self._shown, self._text)
            elif left:
                self._host.abort(self.generations[number].key)
        self._left = {}

    def _deliver(self, loop: asyncio.AbstractEventLoop, watch: Any, number: int, event: Event) -> None:
        watch(event)
        loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        """Events with the number of their generation, until all have ended. Raises ApiError for one that failed."""
        while any(self._left.values()):
            number, event = await self._events.get()
            self._told["completion_tokens"] = self._told.get("completion_tokens", 0) + (event.choice is not None)
            if event.ended == "error":
                self._left[number] = set()
                raise self._failure(event)
            if event.ended == "read":
                self._left[number] = set()
            elif event.ended is not None:
                self._left[number].discard(event.sample)
            yield number, event
            # whoever asks for the next one has sent this one
            if self._turn is not None and self._turn.is_streamed:
                self._shown, self._text = event.shown, self._text + event.text

    def _failure(self, event: Event) -> ApiError:
        if isinstance(event.cause, SessionError):
            return errors.of(event.cause)
        if self._host.status in ("stopped", "failed", "draining"):
            return errors.not_serving(str(event.error), self._host.status)
        if isinstance(event.cause, NoTokenError):
            # what it must follow is the request's own
            return ApiError(400, f"{self._format}: {event.error}", self._format, "constraint_failed")
        return ApiError(500, f"the engine ended this request: {event.error}", code="generation_failed")


async def waited(future: "Future[T]") -> T:
    """What a future of another thread gives; it goes on where nobody waits any more."""
    return await asyncio.shield(asyncio.wrap_future(future))


async def gone(receive: Receive) -> None:
    """Until the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, doing: Coroutine[Any, Any, T]) -> T:
    """What some work gives, which is given up when the client goes away. Raises ClientGoneError then."""
    return await first_of(request.receive, doing)


async def first_of(receive: Receive, wanted: Coroutine[Any, Any, T]) -> T:
    """What some work gives, unless a disconnection comes first."""
    doing, leaving = asyncio.ensure_future(wanted), asyncio.ensure_future(gone(receive))
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise ClientGoneError
    finally:
        for one in (doing, leaving):
            one.cancel()
        await settled(doing, leaving)


async def settled(*tasks: Awaitable[Any]) -> None:
    """Until tasks that were cancelled have ended."""
    with suppress(asyncio.CancelledError):
        await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Server-sent events of a generator, which is closed when they end or the client goes away."""

    media_type = "text/event-stream"

    def __init__(self, lines: AsyncGenerator[str], end: Callable[[], None]) -> None:
        """`end` is called in any case, also where the client is gone before the generator has begun."""
        super().__init__(media_type=self.media_type)
        self._lines, self._end = lines, end
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        # nginx would keep them until a buffer is full
        self.headers["x-accel-buffering"] = "no"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them as they come."""
        try:
            await first_of(receive, self._send(send))
        except ClientGoneError:
            scope["state"]["gone"] = True
        finally:
            self._end()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self._lines):
            try:
                async for line in self._lines:
                    await send(chunk(line))
            except Exception:
                # the status is sent already: what went wrong can only be said here
                logger.exception("a stream has failed")
                await send(chunk(sse(ApiError(500, "a defect of the server; its log says more").body()) + DONE))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def chunk(line: str) -> Message:
    """A part of a body."""
    return {"type": "http.response.body", "body": line.encode(), "more_body": True}


def sse(data: BaseModel | dict[str, Any], event: str | None = None) -> str:
    """One server-sent event; a model without the fields that nobody set."""
    text = data.model_dump_json(exclude_unset=True) if isinstance(data, BaseModel) else json.dumps(data)
    return f"data: {text}\n\n" if event is None else f"event: {event}\ndata: {text}\n\n"
