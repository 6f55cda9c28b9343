"""The addresses under which sessions are looked after: listed, copied, taken away, brought in, removed."""

from collections.abc import Callable
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from swat_lm.serve.http import errors
from swat_lm.serve.http.bodies import Body, read_body
from swat_lm.serve.http.errors import ApiError, declared
from swat_lm.serve.http.session_turns import sessions_of
from swat_lm.serve.http.streams import waited
from swat_lm.serve.sessions.hosted import HostedSessions
from swat_lm.serve.sessions.keeper import Description

__all__ = ["Deleted", "ForkRequest", "Session", "Sessions", "add_sessions"]

BINARY = "application/octet-stream"


class Session(BaseModel):
    """A conversation that is kept."""

    id: str
    object: Literal["session"] = "session"
    kind: Literal["text", "chat"]
    turns: int
    tokens: int
    """Of the whole conversation."""
    messages: int
    """Of a chat, with the replies."""
    model: str
    """A fingerprint of the weights that made its state; it goes on with these alone."""
    state_bytes: int | None
    """What the model keeps of it: one size for conversations of any length, but for layers that keep everything. Null
    where the session is another model's."""
    file_bytes: int | None
    """Of its file as it was last written; null where all is in the journal yet."""
    place: Literal["slot", "file"]
    busy: bool
    """Whether a request goes on with it now."""
    created: int
    last_used: int
    """Both in seconds since 1970."""


class Sessions(BaseModel):
    """All sessions, those first that were used last."""

    object: Literal["list"] = "list"
    data: list[Session]


class Deleted(BaseModel):
    """A session that is gone."""

    id: str
    object: Literal["session.deleted"] = "session.deleted"
    deleted: bool = True


class ForkRequest(Body):
    """Where a copy goes."""

    to: str
    """A name that no session has."""


def add_sessions(app: FastAPI, served_by: Callable[[FastAPI], Any]) -> None:
    """What may be done with sessions. Everything is an error where the server keeps none."""

    async def asked(what: Callable[[HostedSessions], Any]) -> Any:
        served = await served_by(app)
        try:
            return await waited(what(sessions_of(served.sessions, asked=False)))
        except Exception as error:
            raise errors.of(error) from None

    @app.get("/v1/sessions", summary="Every session", operation_id="sessions", responses=declared(404, 415))
    async def all_sessions() -> Sessions:
        return Sessions(data=[described(one) for one in await asked(lambda sessions: sessions.all())])

    @app.get("/v1/sessions/{session_id}", summary="One session", operation_id="session", responses=declared(415))
    async def session(session_id: str) -> Session:
        return described(await asked(lambda sessions: sessions.describe(session_id)))

    @app.delete("/v1/sessions/{session_id}", summary="Remove a session for ever", operation_id="delete_session",
                responses=declared(415))  # fmt: skip
    async def delete(session_id: str) -> Deleted:
        await asked(lambda sessions: sessions.delete(session_id))
        return Deleted(id=session_id)

    body = {"application/json": {"schema": {"$ref": "#/components/schemas/ForkRequest"}}}

    @app.post("/v1/sessions/{session_id}/fork", summary="Copy a session", operation_id="fork_session",
              responses=declared(), openapi_extra={"requestBody": {"required": True, "content": body}})  # fmt: skip
    async def fork(session_id: str, request: Request) -> Session:
        to = (await read_body(request, ForkRequest)).to
        await asked(lambda sessions: sessions.fork(session_id, to))
        return described(await asked(lambda sessions: sessions.describe(to)))

    binary = {BINARY: {"schema": {"type": "string", "format": "binary"}}}

    @app.get("/v1/sessions/{session_id}/export", summary="A session as one safetensors file",
             operation_id="export_session", response_class=Response,
             responses={200: {"content": binary, "description": "The file."}, **declared(415)})  # fmt: skip
    async def export(session_id: str) -> Response:
        content = await asked(lambda sessions: sessions.export(session_id))
        return Response(content, media_type=BINARY)

    @app.put("/v1/sessions/{session_id}/import", summary="Bring a session in from a file",
             operation_id="import_session", responses=declared(415),
             openapi_extra={"requestBody": {"required": True, "content": binary}})  # fmt: skip
    async def bring_in(session_id: str, request: Request) -> Session:
        served = await served_by(app)
        # how large a file may be is known when the model is there, so it is looked at while it comes
        most, content = sessions_of(served.sessions).most_bytes(), bytearray()
        async for part in request.stream():
            content += part
            if len(content) > most:
                raise ApiError(413, f"the body: expected at most {most:,} bytes, what a session of this model may have")
        try:
            await asked(lambda sessions: sessions.bring_in(session_id, bytes(content)))
        except ApiError as error:
            if error.code != "session_damaged":
                raise
            raise ApiError(400, error.message, None, error.code) from None
        return described(await asked(lambda sessions: sessions.describe(session_id)))


def described(found: Description) -> Session:
    """As the API says it."""
    record = found.record
    return Session(
        id=record.session, kind=record.kind, turns=record.turns, tokens=record.num_tokens, messages=record.messages,
        model=found.model, state_bytes=found.state_bytes, file_bytes=found.file_bytes,
        place="slot" if found.in_slot else "file",
        busy=found.is_busy, created=int(record.created), last_used=int(record.used),
    )  # fmt: skip
