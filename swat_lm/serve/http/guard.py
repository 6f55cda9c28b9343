"""Who may ask, how often and how much: API keys, a rate for each key or address, and the size of a body. Plain ASGI."""

import hmac
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from swat_lm.serve.http.errors import ApiError, answer_defect
from swat_lm.serve.http.settings import Settings

__all__ = ["OPEN", "Defects", "Guard", "Rate"]

logger = logging.getLogger(__name__)

# what watches over a server asks these, and has no key
OPEN = ("/health", "/ready")
# takes files of sessions, whose size the model bounds, and looks at it itself
BRINGS_IN = "/import"
# keys and addresses that are remembered; of more, those that asked longest ago are forgotten
MANY_CALLERS = 10_000


class Rate:
    """A bucket of tokens for each caller, filled again at one rate."""

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._most, self._clock = per_minute / 60, max(1.0, per_minute), clock
        self._callers: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, caller: str, takes: bool = True) -> float:
        """Take one token of a caller's, or only look; 0, or the seconds until there is one."""
        now = self._clock()
        if not takes and caller not in self._callers:
            return 0.0
        left, before = self._callers.pop(caller, (self._most, now))
        left = min(self._most, left + (now - before) * self._rate)
        wait = 0.0 if left >= 1 else (1 - left) / self._rate
        self._callers[caller] = (left - 1 if takes and left >= 1 else left, now)
        if len(self._callers) > MANY_CALLERS:
            self._callers.popitem(last=False)
        return wait


class Defects:
    """Answers whatever nobody expected, so that what stands around sees that as an answer too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; 500 where that raises, unless an answer has begun."""
        has_begun = False

        async def sending(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except Exception as error:
            if scope["type"] != "http" or has_begun:
                raise
            logger.exception("a request has failed")
            answer = await answer_defect(Request(scope), error)
            await answer(scope, receive, send)


class Guard:
    """Before the application."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._most = app, settings.max_body
        self._keys = [key.encode() for key in settings.api_keys]
        self._rate = None if settings.rate_limit is None else Rate(settings.rate_limit)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it with an error."""
        if scope["type"] != "http" or scope["path"] in OPEN:
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive if scope["path"].endswith(BRINGS_IN) else limited(receive, self._most), send)

    def _check(self, scope: Scope) -> None:
        """Raise ApiError for a request that is not let through."""
        headers = Headers(scope=scope)
        client = scope.get("client")
        caller = f"address {client[0] if client else 'unknown'}"
        if self._keys:
            # whoever guesses keys does not hear so soon whether the next one is right
            self._bound(caller, takes=False)
            try:
                number = key_number(headers.get("authorization", ""), self._keys)
            except ApiError:
                self._bound(caller)
                raise
            caller = f"key {number}"
        self._bound(caller)
        said = headers.get("content-length", "")
        if said.isdecimal() and int(said[:20]) > self._most and not scope["path"].endswith(BRINGS_IN):
            raise too_large(self._most)

    def _bound(self, caller: str, takes: bool = True) -> None:
        """Raise ApiError for a caller who is too quick."""
        if self._rate is not None and (wait := self._rate.wait(caller, takes)):
            raise too_quick(wait)


def too_quick(wait: float) -> ApiError:
    """More requests than the rate allows; the next may come in so many seconds."""
    seconds = math.ceil(wait)
    return ApiError(429, f"too many requests: the next one is served in {seconds} s", code="rate_limit_exceeded",
                    headers={"Retry-After": str(seconds)})  # fmt: skip


def key_number(header: str, keys: Sequence[bytes]) -> int:
    """Which of the keys a header has. Raises ApiError."""
    scheme, _, given = header.partition(" ")
    if scheme.lower() != "bearer" or not given.strip():
        raise ApiError(401, "this server wants an API key: Authorization: Bearer KEY", code="invalid_api_key",
                       headers={"WWW-Authenticate": "Bearer"})  # fmt: skip
    # all are compared, so that the time says nothing of which was nearest
    right = [hmac.compare_digest(given.strip().encode(), key) for key in keys]
    if True not in right:
        raise ApiError(401, "the API key is not one of this server's", code="invalid_api_key",
                       headers={"WWW-Authenticate": "Bearer"})  # fmt: skip
    return right.index(True)


def too_large(most: int) -> ApiError:
    """A body of more bytes than the server takes."""
    return ApiError(413, f"the body: expected at most {most:,} bytes, this server's --max-body")


def limited(receive: Receive, most: int) -> Receive:
    """A body that ends with an error where it is too long, whatever its headers said."""
    seen = 0

    async def limit() -> Message:
        nonlocal seen
        message = await receive()
        if message["type"] == "http.request":
            seen += len(message.get("body", b""))
            if seen > most:
                raise too_large(most)
        return message

    return limit
