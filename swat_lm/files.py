"""The one way in which a file or a folder is written: beside its place, and renamed when it is whole.

Whoever looks sees the old one or the new one; an error leaves nothing behind and names the place. What has its name is
on the disk whole, and what it takes the place of goes only then, so nothing is lost to a kill or a power cut at any
moment. No torch here.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = [
    "BESIDE", "beside_of", "clear_leftover", "discard", "discard_if_possible", "naming", "put_in_place", "whole",
    "write_bytes", "write_text",
]  # fmt: skip

BESIDE = ".tmp-"
"""How the name of whatever is not whole yet begins."""
SET_ASIDE = f"{BESIDE}was-"
"""How the name of a folder begins while another takes its place: it gets its own back where none came to."""
OLD = f"{BESIDE}old-"
"""How the name of a folder begins while it is removed: it may be half gone and never gets its own back."""
# what systems say of a folder that they cannot write out
FOLDER_ONLY = (errno.EACCES, errno.EPERM, errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EOPNOTSUPP)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, in one piece. Raises OSError, naming the place."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file in one piece. Raises OSError, naming the place."""
    with whole(path) as beside:
        beside.write_bytes(content)


@contextmanager
def whole(path: Path, *, over_full: bool = False) -> Iterator[Path]:
    """A place to write a file or a folder at, which becomes `path` when all went well and is removed otherwise.

    See `put_in_place` for what it may take the place of; folders on the way are made. Several processes may do so at
    once, but for `over_full`. Raises OSError, naming the place.
    """
    path = path if path.name else path.resolve()
    beside = beside_of(path)
    made = [folder for folder in path.parents if not folder.exists()]
    with naming(path, beside):
        try:
            for folder in reversed(made):
                folder.mkdir(exist_ok=True)
            yield beside
            put_in_place(beside, path, over_full=over_full)
        except BaseException:
            with suppress(OSError):
                discard(beside)
            for folder in made:
                with suppress(OSError):
                    folder.rmdir()
            raise


def put_in_place(beside: Path, path: Path, *, over_full: bool = False) -> None:
    """Give what was written beside its name, once the disk holds all of it. Raises OSError.

    A file takes the place of another, a folder that of an empty one, or with `over_full` of any, also of a link to one,
    of which only the link goes. The old folder is then set aside and removed last: `clear_leftover` puts it back where
    a process was killed in between. Its name aside is the same for all processes, so `over_full` is for those that hold
    the lock of a run.
    """
    for written in (*beside.rglob("*"), beside):
        flush(written)
    aside = path.with_name(f"{SET_ASIDE}{path.name}")
    try:
        if over_full and os.path.lexists(path):
            # of an earlier write, whose folder stands
            remove_aside(aside)
            path.rename(aside)
        beside.replace(path)
    except BaseException:
        if over_full and os.path.lexists(aside) and not os.path.lexists(path):
            aside.rename(path)
        raise
    with suppress(OSError):
        # it stands, whatever the disk says now
        flush(path.parent)
    if over_full:
        with suppress(OSError):
            remove_aside(aside)


def flush(path: Path) -> None:
    """Make a file's content survive a power cut, or the names in a folder where that can be asked for.

    It cannot be on Windows, on some file systems of a network, nor of a folder that one may write to and not read.
    """
    if os.name == "nt" or not (path.is_file() or path.is_dir()):
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in FOLDER_ONLY or not path.is_dir():
            raise


def clear_leftover(path: Path) -> None:
    """Remove what a killed process left beside; a folder that it had set aside gets its name back where that is free.

    Raises OSError.
    """
    place = path.with_name(path.name.removeprefix(SET_ASIDE))
    if place == path:
        discard(path)
    elif os.path.lexists(place):
        remove_aside(path)
    else:
        path.rename(place)


def remove_aside(aside: Path) -> None:
    """Remove what was set aside, if it is there; half of it must not be put back, so it loses that name first."""
    if os.path.lexists(aside):
        old = aside.with_name(aside.name.replace(SET_ASIDE, OLD, 1))
        discard(old)
        aside.rename(old)
        discard(old)


def discard(path: Path) -> None:
    """Remove a file, a folder with all in it, or a link; what a link points to stays. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def discard_if_possible(path: Path) -> None:
    """The same; what cannot be removed stays, and is met again by whoever writes there."""
    with suppress(OSError):
        discard(path)


def beside_of(path: Path) -> Path:
    """Where this process writes what is to be `path`."""
    return path.with_name(f"{BESIDE}{path.name}.{os.getpid()}")


@contextmanager
def naming(path: Path, beside: Path | None = None) -> Iterator[None]:
    """Puts the path into an OSError, which reading or writing an open file leaves out.

    `beside` is a temporary file or folder that is written for it; an error there names the path as well.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or (error.filename and not (beside and str(error.filename).startswith(str(beside)))):
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from error
