"""The application: which address does what, and the OpenAPI document that says so."""

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from swat_lm.serve.generation import Generation
from swat_lm.serve.host import Host
from swat_lm.serve.http import errors
from swat_lm.serve.http.asking import Served
from swat_lm.serve.http.bodies import Body, work
from swat_lm.serve.http.chats import ChatCompletion, ChatRequest, chat
from swat_lm.serve.http.completions import Completion, CompletionRequest, complete
from swat_lm.serve.http.embeddings import EmbeddingRequest, Embeddings, embed
from swat_lm.serve.http.errors import ApiError, declared
from swat_lm.serve.http.guard import Defects, Guard
from swat_lm.serve.http.metrics import Metrics
from swat_lm.serve.http.responses import ResponseObject, ResponseRequest, respond
from swat_lm.serve.http.sessions import ForkRequest, add_sessions
from swat_lm.serve.http.settings import Settings
from swat_lm.serve.http.streams import ClientGoneError, EventStream, Running, SessionTurn, unless_gone
from swat_lm.serve.http.tokens import DetokenizeRequest, Text, TokenizeRequest, Tokens, detokenize, tokenize
from swat_lm.serve.http.watching import GONE, Watch
from swat_lm.serve.language import Cut, Language
from swat_lm.serve.sessions.hosted import HostedSessions

__all__ = ["ENDPOINTS", "Endpoint", "Health", "Model", "Models", "create_app"]

# so many tokens, read and drawn, may have an answer that takes longer to write than a thread to start
LONG_ANSWER = 1024
Handler = Callable[..., Awaitable[BaseModel | AsyncGenerator[str]]]


@dataclass(frozen=True)
class Endpoint:
    """An address that takes a body and asks the model or its tokenizer."""

    path: str
    said: str
    handler: Handler
    takes: type[Body]
    gives: type[BaseModel]
    streams: bool = False
    asks: bool = True
    """Whether it asks the engine."""


class Health(BaseModel):
    """That the process lives, and what the engine does."""

    status: str


class Model(BaseModel):
    """The model."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "swat-lm"


class Models(BaseModel):
    """All models: one."""

    object: str = "list"
    data: list[Model]


ENDPOINTS = (
    Endpoint("/v1/completions", "Go on from texts or tokens", complete, CompletionRequest, Completion, streams=True),
    Endpoint("/v1/chat/completions", "Answer messages", chat, ChatRequest, ChatCompletion, streams=True),
    Endpoint("/v1/responses", "Answer messages, in the newer form", respond, ResponseRequest, ResponseObject,
             streams=True),
    Endpoint("/v1/embeddings", "Texts as vectors", embed, EmbeddingRequest, Embeddings),
    Endpoint("/tokenize", "The tokens of a text", tokenize, TokenizeRequest, Tokens, asks=False),
    Endpoint("/detokenize", "The text of tokens", detokenize, DetokenizeRequest, Text, asks=False),
)  # fmt: skip


def create_app(
    host: Host,
    settings: Settings,
    sessions: HostedSessions | None = None,
    cutter: Callable[[Any], Cut] | None = None,
    endpoints: Sequence[Endpoint] = ENDPOINTS,
) -> FastAPI:
    """A server before a host, which the caller starts and stops, with its sessions where it keeps any.

    `cutter` gives for a tokenizer what cuts its long texts (`Language`).
    """
    app = FastAPI(title="swat-lm", version="1", docs_url=None, redoc_url=None, redirect_slashes=False)
    metrics = Metrics(host)
    app.state.host, app.state.settings, app.state.metrics = host, settings, metrics
    app.state.served, app.state.created, app.state.sessions = None, int(time.time()), sessions
    app.state.cutter = cutter
    for endpoint in endpoints:
        add_endpoint(app, endpoint)
    add_models(app)
    add_sessions(app, served_by)
    add_probes(app)
    app.openapi = lambda: document(app, endpoints)  # type: ignore[method-assign]
    app.add_exception_handler(ApiError, errors.answer_api_error)
    app.add_exception_handler(HTTPException, errors.answer_http_exception)
    app.add_exception_handler(ClientGoneError, answer_nobody)
    app.add_exception_handler(ClientDisconnect, answer_nobody)
    app.add_exception_handler(Exception, errors.answer_defect)
    # the last one added is the outermost
    app.add_middleware(Guard, settings=settings)
    # Starlette's own answer to a defect would go out before what follows has put its headers there
    app.add_middleware(Defects)
    if settings.cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=settings.cors_origins,
                           allow_methods=["GET", "POST", "PUT", "DELETE"],
                           allow_headers=["*"], expose_headers=["x-request-id", "retry-after"])  # fmt: skip
    app.add_middleware(Watch, metrics=metrics, routes=app.routes)
    return app


async def served_by(app: FastAPI) -> Served:
    """What endpoints need, made when the model is there. Raises ApiError until then, and when the host stops."""
    host: Host = app.state.host
    if host.status != "ready":
        raise errors.of(host.refusal())
    if app.state.served is None:
        app.state.served = await work(open_language, host, app.state)
    return app.state.served


def open_language(host: Host, state: Any) -> Served:
    """The model's tokenizer, ready for requests."""
    engine, settings = host.engine, state.settings
    cut = None if state.cutter is None else state.cutter(engine.tokenizer)
    language = Language(engine.tokenizer, engine.model.config.vocab_size, engine.end_tokens, cut)
    # of what the replies to one seed depend on
    fingerprint = f"swat-{settings.model}-{engine.model.dtype}-{engine.model.device.type}".replace("torch.", "")
    return Served(host, language, settings, state.created, fingerprint, state.sessions)


def add_endpoint(app: FastAPI, endpoint: Endpoint) -> None:
    """Give an address its function."""

    async def answer(request: Request) -> BaseModel | AsyncGenerator[str]:
        served = await served_by(app)
        if not endpoint.asks:
            return await endpoint.handler(request, served)

        async def running_of(
            generations: Sequence[Generation], turn: SessionTurn | None = None, format_name: str = "response_format"
        ) -> Running:
            running = Running(served, app.state.metrics, generations, request.state.told, turn, format_name)
            request.state.running = running
            return await running.start()

        return await endpoint.handler(request, served, running_of)

    async def serve(request: Request) -> Response:
        # the body is read first, since behind it only the end of the connection comes
        await request.body()
        made = await unless_gone(request, answer(request))
        if isinstance(made, BaseModel):
            # what is long takes long to write
            told = getattr(request.state, "told", {})
            is_long = told.get("prompt_tokens", 0) + told.get("completion_tokens", 0) >= LONG_ANSWER
            text = await work(made.model_dump_json) if is_long else made.model_dump_json()
            return Response(text, media_type="application/json")
        return EventStream(made, request.state.running.stop)

    content: dict[str, Any] = {"application/json": {}}
    if endpoint.streams:
        content["text/event-stream"] = {}
    body = {"required": True, "content": {"application/json": {"schema": {"$ref": reference(endpoint.takes)}}}}
    app.add_api_route(
        endpoint.path, serve, methods=["POST"], response_model=None, summary=endpoint.said,
        operation_id=endpoint.path.strip("/").replace("/", "_").replace("v1_", ""),
        responses={200: {"model": endpoint.gives, "description": "The answer.", "content": content}, **declared()},
        openapi_extra={"requestBody": body},
    )  # fmt: skip


def reference(kind: type[BaseModel]) -> str:
    """Where the document has a model."""
    return f"#/components/schemas/{kind.__name__}"


def add_models(app: FastAPI) -> None:
    """The one model."""
    without_body = declared(400, 413, 415, 503)

    def the_model() -> Model:
        return Model(id=app.state.settings.model, created=app.state.created)

    @app.get("/v1/models", summary="The model", operation_id="models", responses=without_body)
    async def models() -> Models:
        return Models(data=[the_model()])

    @app.get("/v1/models/{model_id:path}", summary="The model of a name", operation_id="model", responses=without_body)
    async def model(model_id: str) -> Model:
        if model_id != app.state.settings.model:
            raise ApiError(404, f"model: there is no {model_id[:60]!r} here; this server has "
                           f"{app.state.settings.model!r}", "model", "model_not_found")  # fmt: skip
        return the_model()


def add_probes(app: FastAPI) -> None:
    """What watches over a server asks."""
    bodiless = declared(400, 401, 404, 413, 415, 429, 503)

    @app.get("/health", summary="Whether the process lives", operation_id="health", responses=bodiless)
    async def health() -> Health:
        return Health(status=app.state.host.status)

    @app.get("/ready", summary="Whether requests are served now", operation_id="ready",
             responses=declared(400, 401, 404, 413, 415, 429))  # fmt: skip
    async def ready() -> Health:
        if app.state.host.status != "ready":
            raise errors.of(app.state.host.refusal())
        return Health(status="ready")

    @app.get("/metrics", summary="Numbers for Prometheus", operation_id="metrics", response_class=Response,
             responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "The numbers."},
                        **declared(400, 404, 413, 415, 503)})  # fmt: skip
    async def metrics() -> Response:
        text = await work(app.state.metrics.text)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def document(app: FastAPI, endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """The OpenAPI document, with the bodies that code of ours reads."""
    if app.openapi_schema is None:
        said = "OpenAI's API over one sliding-window language model, and a few more options."
        made = get_openapi(title=app.title, version=app.version, routes=app.routes, description=said)
        taken = (*(one.takes for one in endpoints), ForkRequest)
        _, schemas = models_json_schema([(one, "validation") for one in taken],
                                        ref_template="#/components/schemas/{model}")  # fmt: skip
        components = made.setdefault("components", {})
        components["schemas"] = {**components.get("schemas", {}), **schemas["$defs"]}
        for one in endpoints:
            # there is one, and whoever reads the document shall know its name
            components["schemas"][one.takes.__name__]["properties"]["model"]["examples"] = [app.state.settings.model]
        if app.state.settings.api_keys:
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            made["security"] = [{"key": []}]
        app.openapi_schema = made
    return app.openapi_schema


async def answer_nobody(request: Request, error: Exception) -> Response:
    """For a log line; nobody gets it."""
    return Response(status_code=GONE)
