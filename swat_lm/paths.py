"""Paths as users write them: `~` is a home folder, and what no library could open is refused. No torch here."""

import os
from pathlib import Path

__all__ = ["check_name", "local_path"]


def local_path(name: str | Path) -> Path:
    """The path with `~` and `~user` resolved; raises ValueError where nobody knows that home folder."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        user = str(name).partition(os.sep)[0].removeprefix("~")
        whose = f"there is no user {user} here" if user else "HOME is not set and this user has no home folder"
        raise ValueError(f"{name}: {whose}; write the path without ~, or ./{name} for a folder of that name") from None


def check_name(path: str | Path, what: str) -> None:
    """Raise ValueError for a name whose bytes are not UTF-8: the libraries that read and write weights know no other.

    `what` begins the message.
    """
    try:
        os.fsencode(path).decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{what} {str(path)!r} is not UTF-8 (byte {error.start}), which weights and pages cannot be read or "
            "written under: rename it, or choose another"
        ) from None
