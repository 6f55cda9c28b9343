"""One log line, one count and one span for every request; nothing of what it says, unless the operator wants it."""

import importlib.util
import json
import logging
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from swat_lm.serve.http.metrics import Metrics

__all__ = ["GONE", "JsonLines", "Watch"]

# as nginx writes it: the client closed the connection before there was an answer
GONE = 499
QUIET = ("/health", "/ready", "/metrics")
access = logging.getLogger("swat_lm.serve.access")


class JsonLines(logging.Formatter):
    """A log record as one line of JSON; what is given as `extra={"fields": {...}}` stands beside the message."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        found: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }  # fmt: skip
        if record.exc_info:
            found["exception"] = self.formatException(record.exc_info)
        return json.dumps(found, ensure_ascii=False, default=str)


class Watch:
    """Around everything else."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: Sequence[BaseRoute]) -> None:
        """`routes` are the endpoints, by which requests are counted."""
        self._app, self._metrics, self._routes = app, metrics, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request and write what became of it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, status, name = time.monotonic(), 500, f"req-{secrets.token_hex(8)}"
        state, endpoint = scope.setdefault("state", {}), self._endpoint(scope)

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = name
            await send(message)

        try:
            with span(scope, endpoint) as attributes:
                await self._app(scope, receive, sending)
                attributes["http.response.status_code"] = status
        finally:
            self._write(scope, endpoint, GONE if state.get("gone") else status, time.monotonic() - begin, name)

    def _write(self, scope: Scope, endpoint: str, status: int, seconds: float, name: str) -> None:
        self._metrics.requests.labels(endpoint, str(status)).inc()
        self._metrics.seconds.labels(endpoint).observe(seconds)
        client = scope.get("client")
        # what watches over the server asks every few seconds
        level = logging.DEBUG if endpoint in QUIET else logging.INFO
        access.log(level, "request", extra={"fields": {
            "request_id": name, "client": client[0] if client else None, "method": scope["method"],
            "path": scope["path"][:200], "status": status, "seconds": round(seconds, 4),
            **scope["state"].get("told", {}),
        }})  # fmt: skip

    def _endpoint(self, scope: Scope) -> str:
        """The template of an endpoint's address, of which there are few, whatever is asked for."""
        for route in self._routes:
            # with another method too
            if isinstance(route, Route) and route.matches(scope)[0] != Match.NONE:
                return route.path_format
        return "other"


@contextmanager
def span(scope: Scope, endpoint: str) -> Iterator[dict[str, Any]]:
    """A span of OpenTelemetry where that is installed; what is put into the mapping becomes its attributes."""
    attributes: dict[str, Any] = {}
    if importlib.util.find_spec("opentelemetry") is None:
        yield attributes
        return
    from opentelemetry import propagate, trace

    before = propagate.extract(dict(Headers(scope=scope)))
    tracer = trace.get_tracer("swat_lm.serve")
    with tracer.start_as_current_span(f"{scope['method']} {endpoint}", before, trace.SpanKind.SERVER) as current:
        try:
            yield attributes
        finally:
            told = scope["state"].get("told", {})
            # never what was asked
            attributes |= {f"swat.{name}": value for name, value in told.items() if name != "prompt"}
            current.set_attributes({"http.request.method": scope["method"], "http.route": endpoint, **attributes})
