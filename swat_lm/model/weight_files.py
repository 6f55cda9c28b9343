"""Files of weights and states on disk: who may read them, and the error of whoever may not.

safetensors writes a file for its owner alone, whatever the umask, and calls one that it may not read absent.
"""

import stat
from pathlib import Path

__all__ = ["check_readable", "give_usual_permissions"]

WEIGHTS = ("*.safetensors", "*.bin")


def give_usual_permissions(path: Path) -> None:
    """Give a file, or each file of weights in a folder, the permissions of any new file there. Raises OSError."""
    for file in weights_in(path):
        # asked of the system, since reading the umask would change it for a moment, for all threads
        probe = file.with_name(f".{file.name}.new")
        probe.touch()
        try:
            mode = stat.S_IMODE(probe.stat().st_mode)
        finally:
            probe.unlink()
        file.chmod(mode)


def check_readable(path: Path) -> None:
    """Raise PermissionError, naming it, for a file, or a file of weights in a folder, that may not be read."""
    for file in weights_in(path):
        # a link that leads nowhere is for the reader to say
        if file.exists():
            file.open("rb").close()


def weights_in(path: Path) -> list[Path]:
    """The file itself, or the files of weights in a folder."""
    return sorted(file for pattern in WEIGHTS for file in path.glob(pattern)) if path.is_dir() else [path]
