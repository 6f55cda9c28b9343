"""A server on a socket: uvicorn over the application, and an end that lets running requests finish."""

import asyncio
import errno
import logging
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from swat_lm.serve.host import Host
from swat_lm.serve.http.watching import JsonLines

__all__ = ["Server", "listen", "log_lines"]

# seconds in which what has ended is written out to slow readers
LAST_WORDS = 5


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections there; port 0: any free one. Raises OSError that says what to do."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise OSError(f"--host {host}: no such address ({error.strerror})") from None
    made = socket.socket(family, kind, protocol)
    try:
        # after a restart the port is still known for a while
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(2048)
    except OSError as error:
        made.close()
        said = {
            errno.EADDRINUSE: f"port {port} of {host} is in use; stop what listens there, or give another --port",
            errno.EACCES: f"port {port} needs the rights of an administrator; give one above 1023 by --port",
            errno.EADDRNOTAVAIL: f"--host {host}: this machine has no such address",
        }
        raise OSError(said.get(error.errno or 0, f"cannot listen on {host}:{port}: {error.strerror}")) from None
    made.setblocking(False)
    return made


class Server(uvicorn.Server):
    """Serves until a first signal, then refuses requests with 503 while those that run end, at most so long.

    A second signal ends them at once. It also ends when the host has failed.
    """

    def __init__(self, app: FastAPI, host: Host, drain_seconds: float) -> None:
        super().__init__(uvicorn.Config(
            app, log_config=None, access_log=False, server_header=False, lifespan="off",
            timeout_graceful_shutdown=LAST_WORDS,
        ))  # fmt: skip
        self._host, self._drain_seconds = host, drain_seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_draining = False

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Until the host ends."""
        self._loop = asyncio.get_running_loop()
        watching = asyncio.ensure_future(self._leave_with_host())
        try:
            await super().serve(sockets)
        finally:
            watching.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal."""
        # from within a signal handler nothing else is safe
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.leave)

    def leave(self) -> None:
        """Begin to end; the second time at once. For the thread of the loop."""
        seconds = 0.0 if self._is_draining else self._drain_seconds
        if not self._is_draining:
            running = self._host.gauges()
            logging.getLogger(__name__).info("draining", extra={"fields": {
                "running": running.running, "waiting": running.waiting, "seconds": seconds,
            }})  # fmt: skip
        self._is_draining = True
        self._host.drain(seconds)

    async def _leave_with_host(self) -> None:
        await asyncio.wrap_future(self._host.ended)
        self.should_exit = True


def log_lines(level: int = logging.INFO) -> None:
    """Log lines of the server, of the engine's thread and of uvicorn as JSON on stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for name in ("swat_lm.serve", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        # uvicorn tells of its own start and end, which we say better
        logger.setLevel(level if name == "swat_lm.serve" else logging.WARNING)
