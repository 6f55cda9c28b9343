"""A client on plain sockets, which can do what no honest client does: send half a request, read half an answer."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from types import TracebackType
from typing import Any, NamedTuple, Self

__all__ = ["Answer", "Connection", "ServerGoneError"]

# seconds after which an answer does not come any more
PATIENCE = 60


class ServerGoneError(Exception):
    """The server has closed the connection in the middle of an answer, or takes none."""


class Answer(NamedTuple):
    """A whole answer."""

    status: int
    content: bytes

    def json(self) -> Any:
        """Its content."""
        return json.loads(self.content)


class Connection:
    """One connection to a server on this machine, opened when it is needed and kept while the server keeps it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.drop()

    def drop(self) -> None:
        """Close it at once, whatever is under way."""
        if self._writer is not None:
            self._writer.transport.abort()
        self._reader = self._writer = None

    async def ask(
        self, method: str, path: str, body: Any = None, content_type: str = "application/json"
    ) -> Answer:  # fmt: skip
        """A request and its answer; a body that is no bytes goes as JSON. Raises ServerGoneError."""
        try:
            async with asyncio.timeout(PATIENCE):
                await self.send(method, path, body, content_type)
                status, headers = await self._head()
                return Answer(status, b"".join([part async for part in self._parts(headers)]))
        except (OSError, asyncio.IncompleteReadError) as error:
            self.drop()
            raise ServerGoneError(f"{method} {path}: {type(error).__name__}: {error}") from error

    async def events(self, path: str, body: Any) -> AsyncIterator[Any]:
        """The events of a stream, the last of which must be `[DONE]`; an Answer alone where there is no stream.

        Raises ServerGoneError. Who ends early drops the connection.
        """
        try:
            await self.send("POST", path, body)
            status, headers = await self._head()
            if "text/event-stream" not in headers.get("content-type", ""):
                yield Answer(status, b"".join([part async for part in self._parts(headers)]))
                return
            kept = b""
            async for part in self._parts(headers):
                *blocks, kept = (kept + part).split(b"\n\n")
                for block in blocks:
                    said = block.removeprefix(b"data: ")
                    yield None if said == b"[DONE]" else json.loads(said)
        except (OSError, asyncio.IncompleteReadError) as error:
            self.drop()
            raise ServerGoneError(f"POST {path}: {type(error).__name__}: {error}") from error

    async def send(
        self, method: str, path: str, body: Any, content_type: str = "application/json", most: int | None = None
    ) -> None:
        """A request, or its first bytes. Raises OSError."""
        content = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nhost: soak\r\ncontent-length: {len(content)}\r\n"
        if body is not None:
            head += f"content-type: {content_type}\r\n"
        await self.write((head.encode() + b"\r\n" + content)[:most])

    async def write(self, content: bytes) -> None:
        """Any bytes. Raises OSError."""
        if self._writer is None or self._reader is None or self._reader.at_eof():
            self.drop()
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 24)
        self._writer.write(content)
        await self._writer.drain()

    async def rest(self) -> bytes:
        """What comes until the server closes the connection, or for a second."""
        assert self._reader is not None
        found = b""
        with suppress(TimeoutError, OSError):
            async with asyncio.timeout(1):
                while part := await self._reader.read(1 << 16):
                    found += part
        self.drop()
        return found

    async def _head(self) -> tuple[int, dict[str, str]]:
        assert self._reader is not None
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = (line.partition(":") for line in lines[1:] if line)
        return int(lines[0].split()[1]), {name.lower(): value.strip() for name, _, value in headers}

    async def _parts(self, headers: dict[str, str]) -> AsyncIterator[bytes]:
        """The parts of a body, however its length is said."""
        assert self._reader is not None
        reader = self._reader
        if "content-length" in headers:
            yield await reader.readexactly(int(headers["content-length"]))
        else:
            while size := int(await reader.readuntil(b"\r\n"), 16):
                yield (await reader.readexactly(size + 2))[:-2]
            await reader.readexactly(2)
        if headers.get("connection", "").lower() == "close":
            self.drop()
