"""What one may do with sessions beside talking: look at them, copy them, take them away and bring them in."""

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from swat_lm.serve.sessions.book import BUSY, LOST, Book, Session, finish
from swat_lm.serve.sessions.record import Record, SessionError, check_name
from swat_lm.serve.sessions.snapshot import Head

__all__ = ["Description", "Keeper"]


class Description(NamedTuple):
    """A session as it is now."""

    record: Record
    is_busy: bool
    in_slot: bool
    model: str
    """The fingerprint of the weights that made its state."""
    state_bytes: int | None
    """Of its slot, the same for a conversation of any length but for layers that keep everything; None where it is
    another model's."""
    file_bytes: int | None
    """Of its file as it was last written; None where it has none yet, and its turns are in the journal."""


class Keeper:
    """Sessions of a book. Called in the engine's thread; the futures raise SessionError."""

    def __init__(self, book: Book) -> None:
        self.book = book
        slots = book.engine.slots
        self._state_bytes = slots.num_bytes // slots.num_slots

    def describe(self, name: str) -> "Future[Description]":
        """A session as it is now."""
        result: Future[Description] = Future()
        if not self._checked(name, result):
            return result
        session = self.book.here(name)

        def looked(done: "Future[tuple[Head | None, int | None]]") -> None:
            try:
                head, size = done.result()
                # of one that is read from its file just now, the file knows more
                if session is not None and (head is None or session.record.turns):
                    head = Head(session.record, self.book.shelf.model)
                if head is None:
                    raise unknown(name)
            except Exception as error:
                finish(result, error)
                return
            finish(result, value=self._described(head, session, size))

        def look() -> tuple[Head | None, int | None]:
            if session is None:
                self.book.shelf.check_journal(name)
            return self.book.shelf.head(name), self.book.shelf.size(name)

        self.book.on_disk(look, looked)
        return result

    def all(self) -> "Future[list[Description]]":
        """Every session, those first that were used last."""
        result: Future[list[Description]] = Future()

        def looked(done: "Future[list[tuple[Head, int]]]") -> None:
            try:
                stored = {head.record.session: (head, size) for head, size in done.result()}
            except Exception as error:
                finish(result, error)
                return
            here = {one.record.session: one for one in self.book.all_here() if one.record.turns}
            own = self.book.shelf.model
            names = dict.fromkeys((*here, *stored))
            found = [
                self._described(
                    Head(here[name].record, own) if name in here else stored[name][0],
                    here.get(name),
                    stored[name][1] if name in stored else None,
                )
                for name in names
            ]
            finish(result, value=sorted(found, key=lambda one: -one.record.used))

        self.book.on_disk(lambda: list(self.book.shelf.heads()), looked)
        return result

    def export(self, name: str) -> "Future[bytes]":
        """The file of a session as it is now."""
        return self._with_state(name, lambda record, tensors: self.book.shelf.content(record, tensors))

    def fork(self, name: str, to: str) -> "Future[Record]":
        """A copy under a name that none has; the two go on apart."""

        def copy(record: Record, tensors: dict[str, Tensor]) -> Record:
            now = self.book.clock()
            made = record.model_copy(update={"session": to, "created": now, "used": now})
            self.book.shelf.add(made, tensors)
            return made

        result: Future[Record] = Future()
        if not self._checked(to, result, new=True):
            return result
        return self._with_state(name, copy)

    def bring_in(self, name: str, content: bytes) -> "Future[Record]":
        """A session's file, from here or from elsewhere, under a name that none has."""

        def add() -> Record:
            record, tensors = self.book.shelf.checked(content)
            made = record.model_copy(update={"session": name, "used": self.book.clock()})
            self.book.shelf.add(made, tensors)
            return made

        result: Future[Record] = Future()
        if self._checked(name, result, new=True):
            self.book.on_disk(add, partial(hand_on, result))
        return result

    def most_bytes(self) -> int:
        """More than any session's file has: what is read before it can be looked at."""
        return 2 * self._state_bytes + (1 << 24)

    def _with_state(self, name: str, use: Callable[[Record, dict[str, Tensor]], Any]) -> "Future[Any]":
        """What comes of a session's record and tensors; `use` is called in the store's thread."""
        result: Future[Any] = Future()
        if not self._checked(name, result):
            return result
        session = self.book.here(name)
        if session is not None and (session.is_busy or session.is_lost):
            kind, why = ("busy", BUSY) if session.is_busy else ("damaged", LOST)
            finish(result, SessionError(kind, f"session {name!r} {why}"))
            return result
        now = None if session is None else (session.record, self.book.tensors(session))

        def job() -> Any:
            stored = now or self.book.shelf.load(name)
            if stored is None:
                raise unknown(name)
            return use(*stored)

        self.book.on_disk(job, partial(hand_on, result))
        return result

    def _checked(self, name: str, result: "Future[Any]", new: bool = False) -> bool:
        try:
            check_name(name)
            if new and self.book.here(name) is not None:
                raise SessionError("exists", f"session {name!r} exists already; delete it, or choose another id")
        except SessionError as error:
            finish(result, error)
            return False
        return True

    def _described(self, head: Head, session: Session | None, size: int | None) -> Description:
        in_slot = session is not None and session.slot is not None
        state_bytes = self._state_bytes if head.model == self.book.shelf.model else None
        is_busy = session is not None and session.is_busy
        return Description(head.record, is_busy, in_slot, head.model, state_bytes, size)


def unknown(name: str) -> SessionError:
    """There is no such session."""
    return SessionError("unknown", f"session {name!r}: there is none; see the list of sessions, or begin it")


def hand_on(result: "Future[Any]", done: "Future[Any]") -> None:
    """What came of one future to who waits for another."""
    error = done.exception()
    finish(result, error) if error is not None else finish(result, value=done.result())
