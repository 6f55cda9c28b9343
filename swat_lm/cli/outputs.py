"""Places that a command will write to, tried before any work is done."""

from contextlib import suppress
from pathlib import Path

from swat_lm.files import BESIDE
from swat_lm.paths import check_name

__all__ = ["check_file", "check_folder", "check_new_file"]


def check_new_file(path: Path, option: str) -> None:
    """Raise OSError, naming the option, for a file that is there already or could not be written; leaves nothing."""
    if path.exists():
        raise FileExistsError(f"{path} exists: name another file for {option}, or remove it")
    try_writing(path, option, folder=False)


def check_file(path: Path, option: str) -> None:
    """Raise OSError, naming the option, for a file that could not be written, be it there or not; leaves nothing."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file for {option}")
    try_writing(path, option, folder=False)


def check_folder(path: Path, option: str) -> None:
    """Raise OSError, naming the option, for a folder that could not be made or written to; leaves nothing."""
    try_writing(path, option, folder=True)


def try_writing(path: Path, option: str, folder: bool) -> None:
    """Make what `path` needs, write a file there and take all of it away again."""
    check_name(path, option)
    holding = path if folder else path.parent
    missing = [one for one in (holding, *holding.parents) if not one.exists()]
    # as long as the name of the file beside, since its length may be what is refused
    probe = holding / (".swat-lm-probe" if folder else f"{BESIDE}{path.name}.1234567")
    made: list[Path] = []
    try:
        for one in reversed(missing):
            one.mkdir()
            made.append(one)
        try:
            probe.write_bytes(b"\0" * 4096)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {option} {path}: {error.strerror}") from None
    finally:
        for one in reversed(made):
            # another program may have put something there
            with suppress(OSError):
                one.rmdir()
