"""Names that may mean a path or something on the Hugging Face hub: which to ask it for, and whether it answers.

Knows neither models nor tokenizers; no torch and no transformers here.
"""

import re
import socket
import ssl
import urllib.error
import urllib.request
from functools import cache
from pathlib import Path

from swat_lm.paths import local_path
from swat_lm.words import nearest

__all__ = ["hub_answers", "is_path", "nearest_name", "stored_folder"]

HUB_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
SECONDS = 5.0


def is_path(name: str) -> bool:
    """Whether a name, under which nothing exists here, can only have meant a path.

    It is no valid name on the hub, or its parent folder exists.
    """
    return HUB_NAME.fullmatch(name) is None or ("/" in name and local_path(name).parent.is_dir())


def nearest_name(path: Path) -> str:
    """A hint naming the nearest existing name, the first folder on the way that does not exist, or a dangling link."""
    if path.is_symlink() and not path.exists():
        return f"; {path} is a link to {path.readlink()}, which does not exist"
    parent = path.parent
    while not parent.exists():
        path, parent = parent, parent.parent
        if path.is_symlink():
            return nearest_name(path)
    near = nearest(path.name, [entry.name for entry in parent.iterdir()] if parent.is_dir() else [])
    return f"; the nearest is {parent / near[0]}" if near else f"; {path} does not exist"


@cache
def hub_answers() -> bool:
    """Whether the hub can be reached: one short try, so that libraries need not retry for a minute where it cannot.

    Asked once per process. Where it is False, `local_files_only=True` still finds what is stored here.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        # someone is there; the library has certificates of its own
        return isinstance(error.reason, ssl.SSLError) and not isinstance(error.reason, socket.timeout)
    except OSError:
        return False
    return True


def stored_folder(name: str) -> str:
    """Where something of the hub is stored on this machine; FileNotFoundError where it is not. Asks no one."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return snapshot_download(name, local_files_only=True)
    except LocalEntryNotFoundError:
        raise FileNotFoundError("the hub does not answer, and no copy is stored on this machine") from None
