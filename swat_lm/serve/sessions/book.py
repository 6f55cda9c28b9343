"""The sessions of one server: which slot or file each is in, and what becomes of them.

All of it runs in the engine's thread but for the work on the store, which has a thread of its own where things are done
in order, and what comes of it is handed back (`post`). A session has one request at a time.
"""

import logging
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from swat_lm.serve.engine import Engine, Event, Generation
from swat_lm.serve.sessions.record import Record, SessionError, check_name
from swat_lm.serve.sessions.shelf import Shelf, Stored
from swat_lm.serve.sessions.store import Store
from swat_lm.serve.text import sheltering

__all__ = ["Book", "Front", "Policy", "Session"]

log = logging.getLogger(__name__)
Result = TypeVar("Result")
NEVER = -1
BUSY = "has a request that has not ended; wait for it, or close its connection"
LOST = "lost its state; start the server again, which restores it"


@dataclass(frozen=True)
class Policy:
    """When sessions are written and removed."""

    every: int = 1024
    """Tokens of a session after which it is written, at the end of a turn: so many are read again after a crash."""
    idle: float = 30.0
    """Seconds after the last turn."""
    expiry: float | None = None
    """Seconds after the last turn when a session is removed; None: never."""


@dataclass(frozen=True)
class Front:
    """What sessions need of who drives the engine; all but the first are called in the engine's thread."""

    post: Callable[[Callable[[], None]], None]
    """Run something in the engine's thread between steps; from any thread."""
    submit: Callable[[Generation, Callable[[Event], None]], None]
    """Put a request in line; what it brings goes to the function. Raises RequestError and ValueError."""
    stop: Callable[[Hashable], Event]
    """`Engine.stop`, of a request whose events nobody wants any more."""
    refuse: Callable[[Hashable, Exception], None]
    """End a request that has not started with an "error"."""


@dataclass(eq=False)
class Session:
    """One that is in a slot, or has a request."""

    record: Record
    slot: int | None = None
    tensors: dict[str, Tensor] | None = None
    """Of its file, until a slot has them."""
    saved: int = NEVER
    """The turn whose end its file holds."""
    unsaved: int = 0
    """Tokens since then."""
    is_busy: bool = True
    writes: int = 0
    """How often its file is being written now."""
    leaves: bool = False
    """Whether its slot becomes free as soon as its file is written."""
    failed: float = 0.0
    """When its file could last not be written."""
    is_lost: bool = False
    """Whether only a start of the server, which reads the journal, brings it back."""

    @property
    def is_saved(self) -> bool:
        """Whether its file holds all of it."""
        return self.saved == self.record.turns


class Book:
    """The sessions that are in slots or have requests, on an engine whose slots can be restored."""

    # seconds after which a file that could not be written is tried again; between looks at the store for expired ones
    RETRY, LOOK = 10.0, 60.0

    def __init__(
        self, engine: Engine, store: Store, front: Front, policy: Policy | None = None, disk: Executor | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        """`disk` does the work on the store, in order."""
        if not engine.restorable:
            raise ValueError("engine: expected one made with restorable=True; a turn that fails has to be taken back")
        self.engine, self.front, self.policy = engine, front, policy or Policy()
        self.shelf = Shelf(engine, store)
        self._disk = disk or ThreadPoolExecutor(1, "sessions-store")
        self.clock, self._looked = clock, clock()
        self._sessions: dict[str, Session] = {}
        self._store_failed = False
        self.pending = 0
        """Things that other threads do now, after which something is left to do here."""

    def take(self, name: str, kind: str | None = None) -> "Session | None":
        """A session that is here, busy from now on; None where it is not. Raises SessionError."""
        check_name(name)
        session = self._sessions.get(name)
        if session is None:
            return None
        if session.is_busy:
            raise SessionError("busy", f"session {name!r} {BUSY}")
        if session.is_lost:
            raise SessionError("damaged", f"session {name!r} {LOST}")
        check_kind(session.record, kind)
        session.is_busy = True
        return session

    def bring(
        self, name: str, kind: Literal["text", "chat"], then: "Callable[[Session, Exception | None], None]"
    ) -> None:
        """A session that is not here, busy from now on: of its file, or a new one. An error says why it cannot be."""
        now = self.clock()
        session = self._sessions[name] = Session(Record(session=name, kind=kind, created=now, used=now))
        self.on_disk(partial(self.shelf.load, name), partial(self._loaded, session, then))

    def _loaded(
        self, session: Session, then: "Callable[[Session, Exception | None], None]", done: "Future[Stored | None]"
    ) -> None:
        try:
            stored = done.result()
            if stored is not None:
                check_kind(stored.record, session.record.kind)
                session.record, session.tensors = stored
                session.saved = stored.record.turns
        except Exception as error:
            then(session, error)
            return
        then(session, None)

    def let_go(self, session: Session) -> None:
        """Its request is over, or came to nothing."""
        session.is_busy = False
        if session.record.turns == 0 and session.slot is not None:
            self.engine.scheduler.release(session.slot)
            session.slot = None
        if session.slot is None and not session.is_lost:
            # its file has all of it
            self._sessions.pop(session.record.session, None)

    def go_back(self, session: Session) -> None:
        """Let its slot hold what it did when the turn began."""
        assert session.slot is not None
        self.engine.roll_back(session.slot, session.record.held)

    def before_step(self) -> None:
        """Free slots that idle sessions have and requests lack: those first that were used longest ago."""
        missing = self.engine.scheduler.lacking_slots
        if not missing:
            return
        now = self.clock()
        idle = sorted((one for one in self._sessions.values() if one.slot is not None and not one.is_busy),
                      key=lambda one: one.record.used)  # fmt: skip
        missing -= sum(one.leaves for one in idle)
        tried = [one for one in idle if not one.leaves]
        willing = [one for one in tried if one.is_saved or one.writes or now - one.failed >= self.RETRY]
        for session in willing[: max(0, missing)]:
            session.leaves = True
            if session.is_saved:
                self._leave(session)
            elif not session.writes:
                self.try_to_save(session)
        # who runs, or is written, may leave a slot yet
        is_last = not self.engine.scheduler.running and all(one in idle or one.slot is None for one in self.all_here())
        if tried and not willing and len(tried) == len(idle) and is_last:
            first = self.engine.scheduler.first_lacking
            self.front.refuse(first, SessionError(
                "storage", "no slot is free: the sessions that hold them cannot be written; the store of sessions is "
                "full or cannot be reached",
            ))  # fmt: skip

    def tick(self) -> None:
        """Write and remove sessions that have been idle for long; call it every second or so."""
        now = self.clock()
        for session in list(self._sessions.values()):
            if session.is_busy or session.slot is None:
                continue
            rest = now - session.record.used
            if self.policy.expiry is not None and rest > self.policy.expiry:
                self.delete(session.record.session).add_done_callback(self._removed)
            elif (
                rest > self.policy.idle
                and not (session.is_saved or session.writes)
                and now - session.failed >= self.RETRY
            ):
                self.try_to_save(session)
        if self.policy.expiry is not None and now - self._looked >= self.LOOK:
            self._looked = now
            self.on_disk(self._expired, self._remove_expired)

    def _expired(self) -> list[str]:
        """Names of sessions whose files are too old; in the store's thread."""
        assert self.policy.expiry is not None
        oldest = self.clock() - self.policy.expiry
        return [head.record.session for head, _ in self.shelf.heads() if head.record.used < oldest]

    def _remove_expired(self, done: "Future[list[str]]") -> None:
        try:
            names = [name for name in done.result() if name not in self._sessions]
        except Exception as error:
            self.note_failure(error)
            return
        for name in names:
            self.delete(name).add_done_callback(self._removed)

    def _removed(self, done: "Future[None]") -> None:
        if (error := done.exception()) is not None:
            self.note_failure(error)

    def save(self, session: Session) -> None:
        """Write its file; it may go on meanwhile."""
        # which may fail, and nothing has changed then
        record, tensors = session.record, self.tensors(session)
        session.unsaved = 0
        session.writes += 1
        self.on_disk(partial(self.shelf.save, record, tensors), partial(self._saved, session, record))

    def try_to_save(self, session: Session) -> None:
        """The same, later where it cannot be now (a device without memory for a copy)."""
        try:
            self.save(session)
        except Exception as error:
            session.leaves, session.failed = False, self.clock()
            self.note_failure(error)

    def _saved(self, session: Session, record: Record, done: "Future[int]") -> None:
        session.writes -= 1
        leaves, session.leaves = session.leaves, False
        try:
            done.result()
        except Exception as error:
            session.failed = self.clock()
            self.note_failure(error)
            return
        self.works()
        session.saved = record.turns
        if session.is_lost and session.is_saved and not session.is_busy:
            session.is_lost = False
            self.let_go(session)
        if leaves and not session.is_busy and session.is_saved:
            self._leave(session)

    def _leave(self, session: Session) -> None:
        """Its slot is free for others; the file has all of it."""
        assert session.slot is not None
        self.engine.scheduler.release(session.slot)
        session.slot = None
        self._sessions.pop(session.record.session, None)

    def tensors(self, session: Session) -> dict[str, Tensor]:
        """Copies of what its slot holds."""
        slot = torch.tensor([session.slot], device=self.engine.slots.position.device)
        return self.engine.slots.snapshot(slot)

    def delete(self, name: str) -> "Future[None]":
        """Remove a session for ever. The future raises SessionError: `busy`, `unknown`, `storage`."""
        result: Future[None] = Future()
        try:
            session = self.take(name) if name not in self._lost() else self._sessions[name]
        except SessionError as error:
            result.set_exception(error)
            return result
        if session is None:
            # nobody may begin it meanwhile
            session = self._sessions[name] = Session(Record(session=name, kind="text", created=0, used=0))
        session.is_busy = True
        self.on_disk(partial(self.shelf.remove, name), partial(self._deleted, session, result))
        return result

    def _deleted(self, session: Session, result: "Future[None]", done: "Future[bool]") -> None:
        name = session.record.session
        try:
            if not done.result() and session.slot is None:
                raise SessionError("unknown", f"session {name!r}: there is none; see the list of sessions")
        except Exception as error:
            self.let_go(session)
            if session.slot is not None:
                # the store may have removed some of it
                session.saved = NEVER
                self.try_to_save(session)
            finish(result, error)
            return
        if session.slot is not None:
            self.engine.scheduler.release(session.slot)
        self._sessions.pop(name, None)
        finish(result)

    def _lost(self) -> list[str]:
        return [name for name, session in self._sessions.items() if session.is_lost and not session.is_busy]

    def here(self, name: str) -> Session | None:
        """A session that is in a slot or has a request."""
        return self._sessions.get(name)

    def all_here(self) -> list[Session]:
        """Every such session."""
        return list(self._sessions.values())

    def recover(self, say: Callable[[str], None] = log.info) -> int:
        """After a crash: read again what no file holds yet; see Shelf. Before the engine runs."""
        return self.shelf.recover(self.engine, say)

    def close(self) -> None:
        """Write every session that is in a slot, and wait until the store has all; when no request runs any more."""
        for session in self.all_here():
            # what a busy one's slot holds nobody knows: its journal does
            if session.slot is None or session.is_saved or session.is_busy:
                continue
            try:
                self._disk.submit(self._save_last, session.record, self.tensors(session))
            except Exception as error:
                # of an engine that has failed
                self.note_failure(error)
        self._disk.shutdown()
        self.shelf.store.close()

    def _save_last(self, record: Record, tensors: dict[str, Tensor]) -> None:
        try:
            self.shelf.save(record, tensors)
        except Exception as error:
            self.note_failure(error)

    def note_failure(self, error: BaseException) -> None:
        """Say once that the store fails."""
        if not self._store_failed:
            log.error(
                "sessions: %s; nothing that was acknowledged is lost. This is said once, until it works again", error
            )
        self._store_failed = True

    def works(self) -> None:
        """The store does again."""
        self._store_failed = False

    def on_disk(self, job: Callable[[], Result], then: "Callable[[Future[Result]], None]") -> None:
        """Do something in the store's thread, after all that was asked before; then go on in the engine's."""
        self.run_in(self._disk, job, then)

    def run_in(self, executor: Executor, job: Callable[[], Result], then: "Callable[[Future[Result]], None]") -> None:
        """Do something in another thread; then go on in the engine's."""

        def back(done: "Future[Result]") -> None:
            self.pending -= 1
            then(done)

        def guarded() -> Result:
            # nobody would go on with the session after what is no Exception
            with sheltering():
                return job()

        self.pending += 1
        executor.submit(guarded).add_done_callback(lambda done: self.front.post(partial(back, done)))


def finish(result: "Future[Any]", error: BaseException | None = None, value: Any = None) -> None:
    """Say what came of it, unless nobody waits any more."""
    if result.set_running_or_notify_cancel():
        result.set_exception(error) if error is not None else result.set_result(value)


def check_kind(record: Record, kind: str | None) -> None:
    """Raise SessionError where a request is not of the session's kind; None: of any."""
    if kind is not None and record.kind != kind:
        what = {"text": "plain text: go on with completions", "chat": "messages: go on with chat completions"}
        raise SessionError("kind", f"session {record.session!r} holds {what[record.kind]}, or name another session")
