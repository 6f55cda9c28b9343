"""Requests that go on with sessions: from the line to the journal, which has every turn before it is acknowledged."""

from collections.abc import Callable, Hashable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from swat_lm.serve.engine import Event, Generation
from swat_lm.serve.sampling import Sampling
from swat_lm.serve.sessions.book import Book, Session
from swat_lm.serve.sessions.outcome import Asked, Outcome, Running, as_json, outcome
from swat_lm.serve.sessions.record import Record, SessionError
from swat_lm.serve.text import Sheltered

__all__ = ["Turns"]


class Turns:
    """Turns of the sessions in a book. All of it runs in the engine's thread, but for what is said otherwise."""

    def __init__(self, book: Book, texts: Executor | None = None) -> None:
        """`texts`: where requests are prepared, which may take as long as a text is."""
        self.book = book
        self._texts = texts or ThreadPoolExecutor(2, "sessions-text")
        self._turns: dict[Hashable, tuple[Session, Running]] = {}
        self._starting: dict[Hashable, Future[None]] = {}

    def turn(
        self,
        name: str,
        kind: Literal["text", "chat"],
        key: Hashable,
        prepare: Callable[[Record], Asked],
        deliver: Callable[[Event], None],
    ) -> "Future[None]":
        """Go on with a session, or begin one; the future is done when the request is in line.

        Args:
            key: the request's, the same as in `prepare(record).generation`.
            prepare: says what is new, given what is known of the session; called in another thread.
            deliver: gets the events. The last comes when the turn is in the journal: then it is acknowledged.

        The future raises SessionError, RequestError, and whatever `prepare` does; the session is as it was then.
        """
        result: Future[None] = Future()
        try:
            session = self.book.take(name, kind)
        except SessionError as error:
            result.set_exception(error)
            return result
        self._starting[key] = result
        if session is None:
            self.book.bring(name, kind, partial(self._prepare, key, prepare, deliver))
        else:
            self._prepare(key, prepare, deliver, session)
        return result

    def _prepare(
        self, key: Hashable, prepare: Any, deliver: Any, session: Session, error: Exception | None = None
    ) -> None:
        if error is not None:
            self._fail_start(session, key, error)
            return
        self.book.run_in(self._texts, partial(prepare, session.record), partial(self._prepared, session, key, deliver))

    def _prepared(self, session: Session, key: Hashable, deliver: Any, done: "Future[Asked]") -> None:
        result = self._starting[key]
        try:
            asked, record = done.result(), session.record
            if not result.set_running_or_notify_cancel():
                raise SessionError("busy", "nobody wants it any more")
            tokens = (*record.pending, *asked.generation.tokens)
            snapshot = session.tensors if session.slot is None and record.held else None
            generation = replace(
                asked.generation, tokens=tokens, held=record.held, slot=session.slot, snapshot=snapshot, keep=True
            )
            running = Running(asked, record, tokens, deliver)
            self._turns[key] = session, running
            self.book.front.submit(generation, partial(self._take_event, key))
        except Exception as error:
            self._turns.pop(key, None)
            self._fail_start(session, key, error)
            return
        del self._starting[key]
        result.set_result(None)

    def _fail_start(self, session: Session, key: Hashable, error: Exception) -> None:
        result = self._starting.pop(key)
        self.book.let_go(session)
        with suppress(Exception):
            # nobody waits where it was cancelled
            result.set_exception(error)

    def cancel(self, key: Hashable, shown: tuple[int, str] = (0, ""), text: str = "") -> bool:
        """End a turn where its client has gone; False where none with this key can be ended any more.

        The session holds the turn as far as the client saw it: nothing of it where that is nothing.

        Args:
            shown: `Event.shown` of the last event that the client got.
            text: the reply's text that it got.
        """
        if key in self._starting:
            return self._starting[key].cancel()
        if key not in self._turns:
            return False
        session, running = self._turns.pop(key)
        stopped = self.book.front.stop(key)
        session.slot = stopped.slot
        if stopped.fed:
            session.tensors = None
        if shown == (0, ""):
            if stopped.fed:
                self.book.go_back(session)
            self.book.let_go(session)
        else:
            self._settle(session, running, shown, stopped.fed, text, None)
        return True

    def _take_event(self, key: Hashable, event: Event) -> None:
        """One that a turn brought."""
        if key not in self._turns:
            return
        session, running = self._turns[key]
        before = len(running.parts)
        running.take(event)
        if event.ended is None:
            was_heard = running.is_heard
            running.say(event)
            if was_heard and not running.is_heard:
                # between steps, since it may have ended with this one
                text = "".join(running.parts[:before])
                self.book.front.post(lambda: self._give_up(key, running.shown, text))
            return
        del self._turns[key]
        session.slot, session.tensors = event.slot, None
        if event.ended != "error":
            self._settle(session, running, event.shown, event.fed, "".join(running.parts), event)
            return
        session.is_lost = session.slot is None and not session.is_saved and session.record.turns > 0
        self.book.let_go(session)
        running.say(event)

    def _give_up(self, key: Hashable, shown: tuple[int, str], text: str) -> None:
        """End a turn that nobody hears any more, unless it has ended."""
        self.cancel(key, shown, text)

    def _settle(
        self, session: Session, running: Running, shown: tuple[int, str], fed: Any, text: str, event: Event | None
    ) -> None:
        """Write the turn into the journal; the event, if there is one, says afterwards that it is there."""
        book = self.book
        try:
            tokenizer = Sheltered(book.engine.tokenizer)
            found = outcome(running, shown, fed, text, book.shelf.model, tokenizer, book.clock())
        except Exception as error:
            book.go_back(session)
            self._take_back(session, running, event, error)
            return
        if found.goes_back:
            book.go_back(session)
            self._read_again(session, running, found, event)
        else:
            self._write(session, running, found, event)

    def _write(self, session: Session, running: Running, found: Outcome, event: Event | None) -> None:
        shelf = self.book.shelf
        self.book.on_disk(partial(shelf.append, found.turn), partial(self._written, session, running, found, event))

    def _read_again(self, session: Session, running: Running, found: Outcome, event: Event | None) -> None:
        """Let the slot, which went back, read what the client saw of the turn; then the turn is written.

        Else it would be read with the next turn, and where that is cut too, with every turn after it once more. What
        cannot be read now (a full line) waits for the next turn all the same.
        """
        before = running.before
        reads = Generation(
            ("again", running.asked.generation.key), found.turn.after.pending, Sampling(max_tokens=0),
            held=before.held, slot=session.slot, keep=True,
        )  # fmt: skip
        try:
            self.book.front.submit(reads, partial(self._was_read, session, running, found, event))
        except Exception:
            self._write(session, running, found, event)

    def _was_read(self, session: Session, running: Running, found: Outcome, event: Event | None, read: Event) -> None:
        """What came of it; its slot can still go back to before the turn."""
        if read.ended is None:
            return
        session.slot = read.slot
        if session.slot is None:
            session.is_lost = not session.is_saved and session.record.turns > 0
            error = read.cause or RuntimeError(read.error or "the slot of the session was lost")
            self._take_back(session, running, event, error)
            return
        if read.ended != "error":
            tokens = found.turn.after.pending
            after = found.turn.after.model_copy(update={"held": running.before.held + len(tokens), "pending": ()})
            turn = found.turn.model_copy(update={"after": after, "tokens": tokens, "fed": as_json(read.fed)})
            found = Outcome(turn, goes_back=False)
        self._write(session, running, found, event)

    def _take_back(self, session: Session, running: Running, event: Event | None, error: Exception) -> None:
        """The turn comes to nothing; its slot holds what it did before."""
        self.book.let_go(session)
        if event is not None:
            failed = replace(event, ended="error", error=str(error), cause=error, slot=None, held=None, fed=())
            running.say(failed)

    def _written(
        self, session: Session, running: Running, found: Outcome, event: Event | None, done: "Future[None]"
    ) -> None:
        try:
            done.result()
        except Exception as error:
            self.book.note_failure(error)
            if not found.goes_back:
                self.book.go_back(session)
            self._take_back(session, running, event, error)
            return
        self.book.works()
        session.record = found.turn.after
        session.unsaved += len(found.turn.tokens)
        session.is_busy = False
        if event is not None:
            running.say(event)
        if session.unsaved >= self.book.policy.every:
            self.book.try_to_save(session)

    def close(self) -> None:
        """Prepare no more."""
        self._texts.shutdown()
