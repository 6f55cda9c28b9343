"""Where sessions lie: a folder of files, or whatever `fsspec` opens. What a call has written is there when it returns.

A store has snapshots, each whole or not there, and journals, which grow by lines. No torch.
"""

import errno
import os
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from swat_lm.files import BESIDE, clear_leftover, flush, naming, write_bytes
from swat_lm.serve.sessions.record import SessionError

__all__ = ["FolderStore", "RemoteStore", "Store", "open_store"]

SNAPSHOT, JOURNAL = ".safetensors", ".journal"
LOCK = ".lock"


class Store(ABC):
    """Snapshots and journals by name. Every method may raise OSError."""

    @abstractmethod
    def read(self, name: str, most: int | None = None) -> bytes | None:
        """A snapshot, or its first bytes; None where there is none."""

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """A snapshot, in the place of an older one."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Bytes of a snapshot; None where there is none."""

    @abstractmethod
    def append(self, name: str, number: int, line: bytes) -> None:
        """One more line of a journal; `number` grows with every line."""

    @abstractmethod
    def read_journal(self, name: str) -> bytes:
        """All lines of a journal, in order; none where there is no journal."""

    @abstractmethod
    def remove_journal(self, name: str) -> None:
        """Remove a journal, if there is one."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a snapshot, if there is one."""

    @abstractmethod
    def snapshots(self) -> list[str]:
        """Names of all snapshots, in order."""

    @abstractmethod
    def journals(self) -> list[str]:
        """Names of all journals, in order."""

    @abstractmethod
    def close(self) -> None:
        """Let others have the store."""


class FolderStore(Store):
    """A folder on this machine, for one process at a time; a lock that dies with the process sees to that."""

    def __init__(self, folder: Path) -> None:
        """Make the folder if need be. Raises OSError, and BlockingIOError where another process has it."""
        self.folder = folder
        with naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # let go in another thread than the one that took it
            self._lock = FileLock(folder / LOCK, thread_local=False)
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise BlockingIOError(
                    errno.EAGAIN, "another server has these sessions; stop it, or name another folder", str(folder)
                ) from None
            for path in folder.glob(f"{BESIDE}*"):
                clear_leftover(path)

    def read(self, name: str, most: int | None = None) -> bytes | None:
        """See Store."""
        try:
            with open(self.folder / f"{name}{SNAPSHOT}", "rb") as file:
                return file.read() if most is None else file.read(most)
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """See Store."""
        write_bytes(self.folder / f"{name}{SNAPSHOT}", content)

    def size(self, name: str) -> int | None:
        """See Store."""
        try:
            return (self.folder / f"{name}{SNAPSHOT}").stat().st_size
        except FileNotFoundError:
            return None

    def append(self, name: str, number: int, line: bytes) -> None:
        """See Store."""
        path = self.folder / f"{name}{JOURNAL}"
        is_new = not path.exists()
        with naming(path), open(path, "ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[file.write(rest) or 0 :]
                os.fsync(file.fileno())
                if is_new:
                    flush(self.folder)
            except BaseException:
                # half a line would do no harm, but takes room on a disk that is full
                with suppress(OSError):
                    file.truncate(end)
                raise

    def read_journal(self, name: str) -> bytes:
        """See Store."""
        try:
            return (self.folder / f"{name}{JOURNAL}").read_bytes()
        except FileNotFoundError:
            return b""

    def remove_journal(self, name: str) -> None:
        """See Store."""
        (self.folder / f"{name}{JOURNAL}").unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """See Store."""
        (self.folder / f"{name}{SNAPSHOT}").unlink(missing_ok=True)

    def snapshots(self) -> list[str]:
        """See Store."""
        return sorted(path.name.removesuffix(SNAPSHOT) for path in self.folder.glob(f"[!.]*{SNAPSHOT}"))

    def journals(self) -> list[str]:
        """See Store."""
        return sorted(path.name.removesuffix(JOURNAL) for path in self.folder.glob(f"[!.]*{JOURNAL}"))

    def close(self) -> None:
        """See Store."""
        self._lock.release()


class RemoteStore(Store):
    """A place that `fsspec` opens by its address. Such stores cannot append, so a journal is a folder of one object a
    turn. Nothing keeps two servers from using one place at once.
    """

    def __init__(self, address: str, **options: Any) -> None:
        """`options` are the file system's own. Raises OSError, and ValueError for an address that nothing opens."""
        import fsspec

        self.files, self.root = fsspec.core.url_to_fs(address, **options)
        self.files.makedirs(self.root, exist_ok=True)

    def read(self, name: str, most: int | None = None) -> bytes | None:
        """See Store."""
        try:
            return self.files.cat_file(self._snapshot(name), end=most)
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """See Store."""
        self.files.pipe_file(self._snapshot(name), content)

    def size(self, name: str) -> int | None:
        """See Store."""
        try:
            return self.files.size(self._snapshot(name))
        except FileNotFoundError:
            return None

    def append(self, name: str, number: int, line: bytes) -> None:
        """See Store."""
        folder = self._journal(name)
        self.files.makedirs(folder, exist_ok=True)
        self.files.pipe_file(f"{folder}/{number:012d}", line)

    def read_journal(self, name: str) -> bytes:
        """See Store."""
        return b"".join(self.files.cat_file(path) for path in self._listed(self._journal(name)))

    def remove_journal(self, name: str) -> None:
        """See Store."""
        # the newest first: what a kill leaves has no gap
        for path in reversed(self._listed(self._journal(name))):
            self.files.rm_file(path)
        with suppress(FileNotFoundError, OSError):
            self.files.rmdir(self._journal(name))

    def remove(self, name: str) -> None:
        """See Store."""
        with suppress(FileNotFoundError):
            self.files.rm_file(self._snapshot(name))

    def snapshots(self) -> list[str]:
        """See Store."""
        names = [path.rsplit("/", 1)[-1] for path in self._listed(self.root)]
        return [name.removesuffix(SNAPSHOT) for name in names if name.endswith(SNAPSHOT)]

    def journals(self) -> list[str]:
        """See Store."""
        names = [path.rstrip("/").rsplit("/", 1)[-1] for path in self._listed(self.root)]
        found = [name.removesuffix(JOURNAL) for name in names if name.endswith(JOURNAL)]
        return [name for name in found if self._listed(self._journal(name))]

    def close(self) -> None:
        """See Store."""

    def _snapshot(self, name: str) -> str:
        return f"{self.root}/{name}{SNAPSHOT}"

    def _journal(self, name: str) -> str:
        return f"{self.root}/{name}{JOURNAL}"

    def _listed(self, folder: str) -> list[str]:
        try:
            self.files.invalidate_cache(folder)
            return sorted(self.files.ls(folder, detail=False))
        except FileNotFoundError:
            return []


def open_store(address: str) -> Store:
    """A folder's name, or an address with `://` that fsspec opens.

    Raises:
        OSError: it cannot be made or read, or another server has it.
        SessionError: `storage`, an address of a kind that nothing here opens.
    """
    if "://" not in address:
        return FolderStore(Path(address))
    try:
        return RemoteStore(address)
    except (ImportError, ValueError) as error:
        raise SessionError("storage", f"--sessions {address}: {error}") from error
