"""The files of sessions as the store has them. Called in the store's thread, but for `recover`."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from swat_lm.model.fingerprint import fingerprint
from swat_lm.serve.engine import Engine
from swat_lm.serve.sessions.record import Record, SessionError, Turn, file_name, parse_journal
from swat_lm.serve.sessions.replay import replay
from swat_lm.serve.sessions.snapshot import HEAD, Head, decode, encode, read_head, trimmed
from swat_lm.serve.sessions.store import Store

__all__ = ["Shelf", "Stored"]

log = logging.getLogger(__name__)


class Stored(NamedTuple):
    """A session as its file holds it."""

    record: Record
    tensors: dict[str, Tensor]
    """Of its one slot."""


class Shelf:
    """Sessions of one model in a store."""

    def __init__(self, engine: Engine, store: Store) -> None:
        self.store, self.model = store, fingerprint(engine.model)
        self._slots, self._vocabulary = engine.slots, engine.model.config.vocab_size

    def load(self, name: str) -> Stored | None:
        """A session; None where there is none. Raises SessionError (`damaged`, `model`, `storage`)."""
        self.check_journal(name)
        with storing(name):
            content = self.store.read(file_name(name))
        return None if content is None else Stored(*self.checked(content))

    def check_journal(self, name: str) -> None:
        """Raise SessionError (`damaged`) where a session that is in no slot has a journal."""
        with storing(name):
            turns = self.store.read_journal(file_name(name))
        # those that could be read again were, when the server started
        if turns and self._is_another_s(turns):
            raise SessionError("model", f"session {name!r} was made by another model: serve that one, or begin another")
        if turns:
            raise SessionError(
                "damaged",
                f"session {name!r}: turns in its journal could not be read again; the server's log says why. Bring the "
                "files back as they were, or delete the session",
            )

    def _is_another_s(self, journal: bytes) -> bool:
        try:
            return any(turn.model != self.model for turn in parse_journal(journal)[0])
        except SessionError:
            return False

    def checked(self, content: bytes) -> tuple[Record, dict[str, Tensor]]:
        """A file of a session of this model. Raises SessionError."""
        return decode(content, self.model, self._slots, self._vocabulary)

    def append(self, turn: Turn) -> None:
        """A turn into the journal. Raises SessionError (`storage`)."""
        name = turn.after.session
        with storing(name):
            self.store.append(file_name(name), turn.after.turns, turn.line())

    def save(self, record: Record, tensors: Mapping[str, Tensor]) -> int:
        """A session as one file, after which its journal is not needed; returns the bytes. Raises SessionError."""
        content, file = encode(record, trimmed(tensors, self._slots), self.model), file_name(record.session)
        with storing(record.session):
            self.store.write(file, content)
            self.store.remove_journal(file)
        return len(content)

    def content(self, record: Record, tensors: Mapping[str, Tensor]) -> bytes:
        """A session as the bytes of its file."""
        return encode(record, trimmed(tensors, self._slots), self.model)

    def add(self, record: Record, tensors: Mapping[str, Tensor]) -> None:
        """A session under a name that none has. Raises SessionError (`exists`, `storage`)."""
        if self.exists(record.session):
            raise SessionError("exists", f"session {record.session!r} exists already; delete it, or choose another id")
        self.save(record, tensors)

    def exists(self, name: str) -> bool:
        """Whether the store has anything of a session."""
        with storing(name):
            return self.store.size(file_name(name)) is not None or bool(self.store.read_journal(file_name(name)))

    def size(self, name: str) -> int | None:
        """Bytes of a session's file."""
        with storing(name):
            return self.store.size(file_name(name))

    def head(self, name: str) -> Head | None:
        """What a session's file says without its tensors; None where there is no file. Raises SessionError."""
        with storing(name):
            return self._head(file_name(name))

    def _head(self, file: str) -> Head | None:
        content = self.store.read(file, HEAD)
        if content is None:
            return None
        return read_head(content) or read_head(self.store.read(file) or b"")

    def heads(self) -> Iterator[tuple[Head, int]]:
        """Every session's file that can be read, and its bytes; others are logged."""
        for file in self.store.snapshots():
            try:
                head, size = self._head(file), self.store.size(file)
            except Exception as error:
                log.warning("sessions: %s cannot be read: %s", file, error)
                continue
            if head is not None and size is not None:
                yield head, size

    def remove(self, name: str) -> bool:
        """All of a session; whether there was anything. Raises SessionError (`storage`)."""
        was_there = self.exists(name)
        with storing(name):
            # a journal without what it follows on could not be read again after a kill
            self.store.remove_journal(file_name(name))
            self.store.remove(file_name(name))
        return was_there

    def recover(self, engine: Engine, say: Callable[[str], None]) -> int:
        """Read every turn again that no file holds yet, and write the files; returns how many sessions had any.

        Before anything else runs. What cannot be read again stays as it is, and is logged.
        """
        found = 0
        for file in self.store.journals():
            try:
                turns, spoilt = parse_journal(self.store.read_journal(file))
                if spoilt:
                    log.warning("sessions: %s: %d lines of the journal are not whole: never acknowledged", file, spoilt)
                if turns:
                    self._recover_one(engine, file, turns, say)
                    found += 1
                else:
                    self.store.remove_journal(file)
            except (SessionError, OSError, ValueError) as error:
                log.error("sessions: the journal %s cannot be read again: %s", file, error)
        return found

    def _recover_one(self, engine: Engine, file: str, turns: list[Turn], say: Callable[[str], None]) -> None:
        if any(turn.model != self.model for turn in turns):
            raise SessionError("model", "it is of another model, or of other weights; serve that one to go on with it")
        content = self.store.read(file)
        slot = torch.zeros(1, dtype=torch.int64, device=engine.slots.position.device)
        before = 0
        engine.slots.reset(slot)
        if content is not None:
            record, tensors = self.checked(content)
            before = record.turns
            engine.slots.restore(slot, tensors)
        left = [turn for turn in turns if turn.after.turns > before]
        if left and left[0].after.turns != before + 1:
            raise SessionError("damaged", f"turns {before + 1} to {left[0].after.turns - 1} are missing")
        last = turns[-1].after
        if left:
            say(f"session {last.session}: reading {sum(len(turn.tokens) for turn in left):,} tokens of its last turns")
            replay(engine, left)
            self.save(last, engine.slots.snapshot(slot))
        else:
            self.store.remove_journal(file)


@contextmanager
def storing(name: str) -> Iterator[None]:
    """While entered, an OSError becomes a SessionError (`storage`) that names the session."""
    try:
        yield
    except OSError as error:
        said = error.strerror or str(error) or type(error).__name__
        raise SessionError("storage", f"session {name!r}: the store of sessions failed: {said}") from error
