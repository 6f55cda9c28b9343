"""Errors as OpenAI's clients know them, and the statuses of what libraries of ours raise."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from swat_lm.serve.host import NotServingError
from swat_lm.serve.requests import RequestError
from swat_lm.serve.sessions.record import SessionError

__all__ = [
    "ApiError",
    "ErrorBody",
    "answer_api_error",
    "answer_defect",
    "answer_http_exception",
    "declared",
    "not_serving",
    "of",
]

KINDS = {
    401: "authentication_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    507: "server_error",
}
CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large", 415: "unsupported_media_type"}


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    """The field of the request at fault."""
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorDetail


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code = code or CODES.get(status)
        self.headers = headers

    def body(self) -> ErrorBody:
        """As it is sent."""
        kind = KINDS.get(self.status, "invalid_request_error")
        return ErrorBody(error=ErrorDetail(message=self.message, type=kind, param=self.param, code=self.code))

    def response(self) -> JSONResponse:
        """As an answer of its own."""
        return JSONResponse(self.body().model_dump(), self.status, self.headers)


SAID = {
    400: "The request cannot be served as it is: not JSON, an unknown field, a value out of range, a schema that "
    "cannot be compiled, more tokens than a slot holds.",
    401: "The API key is missing or wrong.",
    404: "There is no such model or address.",
    405: "The address knows other methods.",
    409: "The session has a request already, is of another kind or model, holds other messages, or exists.",
    413: "The body is larger than the server takes.",
    415: "The body is not `application/json`.",
    429: "Too many requests wait, or came from this key or address; `Retry-After` says when to try again.",
    500: "A defect of the server or the model.",
    503: "The model is being loaded, the server is shutting down, or the engine has failed.",
    507: "The session's turn could not be written, and was taken back.",
}
SESSION_STATUS = {"name": 400, "unknown": 404, "storage": 507}
RETRY = {"Retry-After": {"description": "Seconds until it is worth while to try again.", "schema": {"type": "integer"}}}


def declared(*left_out: int) -> dict[int | str, dict[str, Any]]:
    """Every error status for the OpenAPI document, but for some."""
    found: dict[int | str, dict[str, Any]] = {}
    for status, said in SAID.items():
        if status not in left_out:
            found[status] = {"model": ErrorBody, "description": said}
            if status in (429, 503):
                found[status]["headers"] = RETRY
    return {**found, "default": {"model": ErrorBody, "description": "Any other error."}}


def not_serving(message: str, status: str) -> ApiError:
    """What a server says that takes or ends nothing now."""
    return ApiError(503, message, code=f"server_{status}", headers={"Retry-After": "5"})


def of(error: Exception, names: Mapping[str, str] | None = None) -> ApiError:
    """The answer to what the host, the engine or an option of a request raised.

    Messages of ours begin with the field's name; `names` gives those that it has in the API where they differ.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, NotServingError):
        return not_serving(str(error), error.status)
    message = str(error)
    name, colon, rest = message.partition(": ")
    param = None
    if colon and name.isidentifier():
        param = (names or {}).get(name, name)
        message = f"{param}: {rest}"
    if isinstance(error, RequestError):
        if error.kind == "queue":
            return ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})
        code = "context_length_exceeded" if error.kind == "capacity" else None
        return ApiError(400, message, {"samples": "n"}.get(param or "", param), code)
    if isinstance(error, SessionError):
        return ApiError(SESSION_STATUS.get(error.kind, 409), message, param, f"session_{error.kind}")
    if isinstance(error, ValueError):
        return ApiError(400, message, param)
    raise error


async def answer_api_error(request: Request, error: Exception) -> JSONResponse:
    """For FastAPI."""
    assert isinstance(error, ApiError)
    return error.response()


async def answer_http_exception(request: Request, error: Exception) -> JSONResponse:
    """What Starlette refuses by itself: unknown addresses and methods."""
    assert isinstance(error, HTTPException)
    messages = {
        404: f"there is nothing at {request.url.path}; GET /openapi.json lists what there is",
        405: f"{request.method} is not a method of {request.url.path}",
    }
    message = messages.get(error.status_code, error.detail)
    return ApiError(error.status_code, message, headers=error.headers).response()


async def answer_defect(request: Request, error: Exception) -> JSONResponse:
    """Whatever nobody expected; the log says what it was."""
    return ApiError(500, "a defect of the server; its log says more", code="internal_error").response()
