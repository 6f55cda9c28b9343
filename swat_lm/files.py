"""The one way in which a file or a folder is written: beside its place, and renamed when it is whole.

Whoever looks sees the old one or the new one; an error leaves nothing behind and names the place. What has its name is
on the disk whole, and what it takes the place of goes only then, so nothing is lost to a kill or a power cut at any
moment. No torch here.
"""

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
"""How the name of a folder begins while another takes its place."""


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
    once. Raises OSError, naming the place.
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
    a process was killed in between.
    """
    for written in (*beside.rglob("*"), beside):
        flush(written)
    aside = path.with_name(f"{SET_ASIDE}{path.name}")
    if over_full and os.path.lexists(path):
        discard_if_possible(aside)
        path.rename(aside)
    try:
        beside.replace(path)
    except OSError:
        if over_full and os.path.lexists(aside):
            aside.rename(path)
        raise
    flush(path.parent)
    if over_full:
        discard_if_possible(aside)


def flush(path: Path) -> None:
    """Make a file's content, or the names in a folder, survive a power cut; Windows has no such call for them."""
    if os.name == "nt" or not (path.is_file() or path.is_dir()):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def clear_leftover(path: Path) -> None:
    """Remove what a killed process left beside; a folder that it had set aside gets its name back where that is free.

    Raises OSError.
    """
    place = path.with_name(path.name.removeprefix(SET_ASIDE))
    if os.path.lexists(place):
        discard(path)
    else:
        path.rename(place)


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
