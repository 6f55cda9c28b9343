"""The one way in which a file or a folder is written: beside its place, and renamed when it is whole.

Whoever looks sees the old one or the new one; an error leaves nothing behind and names the place. Checkpoints, exports
and token stores have rules of their own: they take the place of full folders, or of nobody's. No torch here.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["BESIDE", "beside_of", "naming", "whole", "write_bytes", "write_text"]

BESIDE = ".tmp-"
"""How the name of whatever is not whole yet begins."""


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, in one piece. Raises OSError, naming the place."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file in one piece. Raises OSError, naming the place."""
    with whole(path) as beside:
        beside.write_bytes(content)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place to write a file or a folder at, which becomes `path` when all went well and is removed otherwise.

    A file takes the place of another, a folder only that of an empty one; folders on the way are made. Several
    processes may do so at once. Raises OSError, naming the place.
    """
    path = path if path.name else path.resolve()
    beside = beside_of(path)
    made = [folder for folder in path.parents if not folder.exists()]
    with naming(path, beside):
        try:
            for folder in reversed(made):
                folder.mkdir(exist_ok=True)
            yield beside
            if beside.is_file():
                # a name that is there after a crash of the machine must not stand for a file that is not
                with beside.open("rb") as written:
                    os.fsync(written.fileno())
            beside.replace(path)
        except BaseException:
            with suppress(OSError):
                shutil.rmtree(beside) if beside.is_dir() else beside.unlink(missing_ok=True)
            for folder in made:
                with suppress(OSError):
                    folder.rmdir()
            raise


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
