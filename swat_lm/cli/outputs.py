"""Places that a command will write to, tried before any work is done."""

from contextlib import suppress
from pathlib import Path

from swat_lm.files import whole
from swat_lm.paths import check_name

__all__ = ["check_file", "check_folder", "check_new_file"]


def check_new_file(path: Path, option: str) -> None:
    """Raise OSError, naming the option, for a file that is there already or could not be written; leaves nothing."""
    if path.exists():
        raise FileExistsError(f"{path} exists: name another file for {option}, or remove it")
    try_writing(path, option, path)


def check_file(path: Path, option: str) -> None:
    """Raise OSError, naming the option, for a file that could not be written, be it there or not; leaves nothing."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file for {option}")
    try_writing(path, option, path)


def check_folder(path: Path, option: str) -> None:
    """Raise OSError, naming the option, for a folder that could not be made or written to; leaves nothing."""
    try_writing(path, option, path / ".swat-lm-probe")


class TakenBackError(Exception):
    """A file could be written, and is taken away again."""


def try_writing(path: Path, option: str, file: Path) -> None:
    """Make what a file needs, begin to write it and take all of it away again."""
    check_name(path, option)
    try:
        with suppress(TakenBackError), whole(file) as beside:
            beside.write_bytes(b"\0" * 4096)
            raise TakenBackError
    except OSError as error:
        raise OSError(error.errno, f"cannot write {option} {path}: {error.strerror}") from None
