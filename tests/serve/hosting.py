"""A tiny model behind a host and a server, and a host that plays events back."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from swat_lm import SwatConfig, SwatForCausalLM
from swat_lm.data import load_tokenizer
from swat_lm.serve.engine import Engine
from swat_lm.serve.generation import Event, Generation
from swat_lm.serve.host import Counters, Gauges, Host
from swat_lm.serve.http.app import ENDPOINTS, create_app
from swat_lm.serve.http.server import Server, listen
from swat_lm.serve.http.settings import Settings
from swat_lm.serve.requests import Limits
from swat_lm.serve.sessions.hosted import HostedSessions

TEMPLATE = """{% for message in messages %}{% if message.role == 'system' and not loop.first %}
{{ raise_exception('a system message comes first') }}{% endif %}[{{ message.role }}]{{ message.content }}
{% endfor %}[assistant]"""
LETTERS = {"type": "regex", "regex": "[a-z]{400}"}
"""A reply that is text, and takes a while."""


def tiny_engine(slots: int = 4, waiting: int = 8, window: int | None = 8, capacity: int | None = None) -> Engine:
    """Random weights over bytes; a few more ids than the tokenizer has."""
    torch.manual_seed(0)
    model = SwatForCausalLM(SwatConfig(
        vocab_size=272, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        sliding_window=window, max_position_embeddings=64, initializer_range=0.2,
    ))  # fmt: skip
    tokenizer = load_tokenizer("bytes")
    tokenizer.chat_template = TEMPLATE
    limits = Limits(slots, slots + 32, 32, waiting, capacity)
    return Engine(model, limits, tokenizer, [257])


@contextmanager
def running_host(make: Callable[[], Engine] = tiny_engine) -> Iterator[Host]:
    """A host that is ready, and stopped afterwards."""
    host = Host(make)
    host.start()
    host.wait_ready(60)
    try:
        yield host
    finally:
        assert host.stop(30)


@contextmanager
def running_server(
    host: Host, settings: Settings, drain_seconds: float = 30, sessions: HostedSessions | None = None
) -> Iterator[tuple[Server, int]]:
    """A real server on a free port in a thread of its own; with the port."""
    place = listen("127.0.0.1", 0)
    server = Server(create_app(host, settings, sessions), host, drain_seconds)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([place])), daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield server, place.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)
        place.close()
        assert not thread.is_alive()


def until(holds: Callable[[], Any], seconds: float = 20) -> None:
    """Wait for something that comes soon."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)


def send_raw(port: int, path: str, body: bytes) -> socket.socket:
    """A request on a plain socket."""
    made = socket.create_connection(("127.0.0.1", port), timeout=20)
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    made.sendall(head.encode() + body)
    return made


class PlayedHost(Host):
    """Answers every request with the same events."""

    def __init__(self, events: Sequence[dict[str, Any]]) -> None:
        super().__init__(tiny_engine)
        self._events = events
        self._status = "ready"
        self.asked: list[Generation] = []
        self.aborted: list[Any] = []
        engine = tiny_engine()
        self._engine = engine
        self.counters = Counters()

    def submit(self, generation: Generation, deliver: Callable[[Any], None]) -> Future[None]:
        self.asked.append(generation)
        for event in self._events:
            # also fields that an event may have one day
            known = {name: event[name] for name in event if name in Event.__dataclass_fields__}
            deliver(SimpleNamespace(**{**vars(Event(generation.key, **known)), **event}))
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def abort(self, key: Any) -> Future[bool]:
        self.aborted.append(key)
        future: Future[bool] = Future()
        future.set_result(True)
        return future

    def gauges(self) -> Gauges:
        return Gauges()


__all__ = ["ENDPOINTS", "LETTERS", "PlayedHost", "running_host", "running_server", "send_raw", "tiny_engine", "until"]
