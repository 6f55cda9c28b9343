"""Places that a command will write to, tried before any work is done."""

from pathlib import Path

__all__ = ["check_new_file", "check_new_folder"]


def check_new_file(path: Path, option: str) -> None:
    """Raise OSError, naming the option, for a file that is there already or could not be written; leaves nothing."""
    refuse_existing(path, option, "file")
    try_writing(path, option, folder=False)


def check_new_folder(path: Path, option: str) -> None:
    """As `check_new_file`, for a folder."""
    refuse_existing(path, option, "folder")
    try_writing(path, option, folder=True)


def refuse_existing(path: Path, option: str, kind: str) -> None:
    """Raise FileExistsError for what is there."""
    if path.exists():
        raise FileExistsError(f"{path} exists: name another {kind} for {option}, or remove it")


def try_writing(path: Path, option: str, folder: bool) -> None:
    """Make what `path` needs, write a file there and take all of it away again."""
    holding = path if folder else path.parent
    missing = [one for one in (holding, *holding.parents) if not one.exists()]
    # as long as the name of the file beside, since its length may be what is refused
    probe = holding / (".swat-lm-probe" if folder else f".{path.name}.1234567")
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
            one.rmdir()
