"""A model that runs while a command does, and answers HTTP beside it."""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from swat_lm.cli.console import messages
from swat_lm.cli.serving import cutter

if TYPE_CHECKING:
    from swat_lm.serve.host import Host
    from swat_lm.serve.sessions.hosted import HostedSessions

__all__ = ["running", "serving_beside"]

# in which a reply may end, and the states be written; then the wait is given up after as long again
DRAIN_SECONDS = 30.0


@contextlib.contextmanager
def running(host: "Host") -> Iterator[None]:
    """While entered, the host runs; then what is there is kept."""
    host.start()
    try:
        while host.status == "loading":
            # so that Ctrl-C is heard
            time.sleep(0.05)
        if host.failure is not None:
            raise host.failure
        yield
    finally:
        # a load cannot be stopped, and leaves nothing behind: the thread ends with the process
        is_loading = host.status == "loading"
        host.drain(0 if is_loading else DRAIN_SECONDS)
        if not is_loading:
            try:
                with contextlib.suppress(KeyboardInterrupt):
                    host.ended.result(2 * DRAIN_SECONDS)
            except TimeoutError:
                messages().print(
                    f"warning: the model did not stop within {2 * DRAIN_SECONDS:g} s; what is not yet in the "
                    "conversation's file is read again from its journal the next time",
                    markup=False,
                )


@contextlib.contextmanager
def serving_beside(host: "Host", kept: "HostedSessions", port: int, model: str) -> Iterator[None]:
    """While entered, the host also answers HTTP on this machine. Raises OSError where the port is taken."""
    from swat_lm.serve.http.app import create_app
    from swat_lm.serve.http.server import Server, listen
    from swat_lm.serve.http.settings import Settings

    # its lines would stand within replies
    logging.getLogger("swat_lm.serve.http").setLevel(logging.WARNING)
    socket = listen("127.0.0.1", port)
    server = Server(create_app(host, Settings(model), kept, cutter), host, 0.0)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([socket])), name="http", daemon=True)
    thread.start()
    messages().print(f"also on http://127.0.0.1:{socket.getsockname()[1]}, model {model!r}", markup=False)
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(10)
        socket.close()
