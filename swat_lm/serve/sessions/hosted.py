"""The sessions of a host's engine, for other threads: every call is done in the engine's and gives a future."""

import logging
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any, Literal

from swat_lm.serve.engine import Engine, Event
from swat_lm.serve.host import Host
from swat_lm.serve.sessions.book import Book, Front, Policy, finish
from swat_lm.serve.sessions.keeper import Description, Keeper
from swat_lm.serve.sessions.outcome import Asked
from swat_lm.serve.sessions.record import Record
from swat_lm.serve.sessions.store import Store
from swat_lm.serve.sessions.turns import Turns

__all__ = ["HostedSessions"]

log = logging.getLogger(__name__)


class HostedSessions:
    """Made before the host starts; `attach` is called where the host's engine is opened.

    Futures raise SessionError, and NotServingError where the host takes nothing.
    """

    def __init__(self, host: Host, store: Store, policy: Policy | None = None) -> None:
        self._host, self._store, self._policy = host, store, policy
        self._book: Book | None = None
        self._posted: SimpleQueue[Callable[[], None]] = SimpleQueue()

    def attach(self, engine: Engine, say: Callable[[str], None] = lambda said: None) -> None:
        """Read again what a crash has left in journals, and take part in what the host does.

        `say` gets a line for each session that is read again.
        """
        host = self._host
        front = Front(
            self._post,
            partial(host.put, engine),
            partial(self._stop, engine),
            partial(host.refuse, engine),
        )
        self._book = book = Book(engine, self._store, front, self._policy)
        self._turns, self._keeper = Turns(book), Keeper(book)
        book.recover(say)
        host.before_step.append(lambda _: book.before_step())
        host.now_and_then.append(lambda _: book.tick())
        host.unfinished.append(lambda: book.pending > 0)
        host.at_end.append(lambda _: self._close())

    def _stop(self, engine: Engine, key: Hashable) -> Event:
        self._host.forget(key)
        return engine.stop(key)

    def _post(self, function: Callable[[], None]) -> None:
        """For the engine's thread, between two steps; at the end, when the host takes nothing, `_close` does it."""
        self._posted.put(function)
        self._host.call(lambda _: self._do_posted())

    def _do_posted(self) -> None:
        function = self._posted.get()
        try:
            function()
        except Exception:
            log.exception("sessions: what other threads have done could not be made use of")

    def _close(self) -> None:
        # turns that are being written become acknowledged first, and everybody hears what came of what was asked
        while self.book.pending:
            self._do_posted()
        self._turns.close()
        self.book.close()

    @property
    def book(self) -> Book:
        """The sessions; only for the engine's thread."""
        assert self._book is not None
        return self._book

    def turn(
        self,
        name: str,
        kind: Literal["text", "chat"],
        key: Hashable,
        prepare: Callable[[Record], Asked],
        deliver: Callable[[Event], None],
    ) -> "Future[None]":
        """See `Turns.turn`; one that is not wanted any more is to be cancelled by `cancel`."""
        return self._ask(lambda: self._turns.turn(name, kind, key, prepare, deliver))

    def cancel(self, key: Hashable, shown: tuple[int, str] = (0, ""), text: str = "") -> "Future[bool]":
        """See `Turns.cancel`."""

        def cancel(engine: Engine) -> bool:
            try:
                return self._turns.cancel(key, shown, text)
            except Exception:
                # who has gone away does not hear of it
                log.exception("sessions: a turn could not be ended")
                raise

        return self._host.call(cancel)

    def describe(self, name: str) -> "Future[Description]":
        """See Keeper."""
        return self._ask(lambda: self._keeper.describe(name))

    def all(self) -> "Future[list[Description]]":
        """See Keeper."""
        return self._ask(lambda: self._keeper.all())

    def export(self, name: str) -> "Future[bytes]":
        """See Keeper."""
        return self._ask(lambda: self._keeper.export(name))

    def fork(self, name: str, to: str) -> "Future[Record]":
        """See Keeper."""
        return self._ask(lambda: self._keeper.fork(name, to))

    def bring_in(self, name: str, content: bytes) -> "Future[Record]":
        """See Keeper."""
        return self._ask(lambda: self._keeper.bring_in(name, content))

    def delete(self, name: str) -> "Future[None]":
        """See Book."""
        return self._ask(lambda: self.book.delete(name))

    def most_bytes(self) -> int:
        """See Keeper; raises NotServingError before the model is there."""
        self._host.engine  # noqa: B018 raises
        return self._keeper.most_bytes()

    def _ask(self, function: "Callable[[], Future[Any]]") -> "Future[Any]":
        """What comes of a future that a call in the engine's thread gives."""
        result: Future[Any] = Future()

        def inner(done: "Future[Any]") -> None:
            if done.cancelled():
                # a turn that somebody has cancelled before it was in line
                result.cancel()
                return
            error = done.exception()
            finish(result, error, None if error is not None else done.result())

        def outer(called: "Future[Future[Any]]") -> None:
            error = called.exception()
            if error is not None:
                finish(result, error)
            else:
                called.result().add_done_callback(inner)

        self._host.call(lambda _: function()).add_done_callback(outer)
        return result
