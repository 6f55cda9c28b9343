"""What a recipe's `data.sources` name: files, folders, hub data sets, the standard library's own text.

Names are resolved to an ordered list of sources, each with an identity that changes when its content does. Reading is
`swat_lm/data/source_text.py`.
"""

import os
import re
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from swat_lm.data.folders import LinkedWalk, walk
from swat_lm.hub import nearest_name
from swat_lm.paths import local_path

KINDS = (".txt", ".md", ".py", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".xz")
ACCEPTED = f"accepted are {' '.join(KINDS)}, each also with {' or '.join(COMPRESSIONS)} added"
STANDARD_LIBRARY = "python:stdlib"
# installed packages are not the library; tests are left out because many distributions do not install them
OUTSIDE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class DataError(ValueError):
    """Data that cannot be used; the message names the file and place, what was expected and what came."""


@dataclass(frozen=True)
class SourceFile:
    """One file of documents."""

    path: Path
    size: int
    """Bytes on disk."""
    modified: int
    """Modification time, nanoseconds."""
    named: bool = True
    """Whether the user named the file itself rather than a folder around it."""

    def __str__(self) -> str:
        return str(self.path)

    @property
    def compression(self) -> str:
        """`.gz`, `.xz` or nothing."""
        return self.path.suffix.lower() if self.path.suffix.lower() in COMPRESSIONS else ""

    @property
    def kind(self) -> str:
        """One of KINDS."""
        return (self.path.with_suffix("") if self.compression else self.path).suffix.lower()

    @property
    def identity(self) -> tuple[Any, ...]:
        """Changes when the file does: place, size and modification time (content is not read for this)."""
        return ("file", str(self.path.resolve()), self.size, self.modified)


@dataclass(frozen=True)
class HubSource:
    """One split of a data set that the `datasets` library loads, from the hub, its local cache, or a local folder."""

    name: str
    config: str | None = None
    split: str = "train"

    def __str__(self) -> str:
        return ":".join(filter(None, ("hub", self.name, self.config, self.split)))

    @cached_property
    def dataset(self) -> Any:
        """The loaded `datasets.Dataset`; DataError if it cannot be had."""
        try:
            import datasets
        except ImportError:
            raise DataError(f"{self}: reading hub data sets needs the datasets library: pip install datasets") from None
        try:
            return datasets.load_dataset(self.name, self.config, split=self.split)
        except (ValueError, OSError) as error:
            # the library raises ConnectionError offline, FileNotFoundError for unknown names, ValueError for the rest
            offline = any(os.environ.get(name, "0").upper() in ("1", "TRUE", "YES", "ON") for name in OFFLINE_SWITCHES)
            advice = (
                f"; {' / '.join(OFFLINE_SWITCHES)} is set, so only data sets already cached load" if offline else ""
            )
            reason = str(error).strip().splitlines()[0]
            raise DataError(f"{self}: cannot load this data set: {reason}{advice}") from error

    @property
    def size(self) -> int:
        """Bytes of the table."""
        return self.dataset.data.nbytes

    @property
    def identity(self) -> tuple[Any, ...]:
        """Changes when the downloaded files do: their names carry the version and hash that `datasets` gave them."""
        files = tuple(
            (file["filename"], os.stat(file["filename"]).st_size, os.stat(file["filename"]).st_mtime_ns)
            for file in self.dataset.cache_files
        )
        return ("hub", self.name, self.config, self.split, self.dataset.num_rows, files)


OFFLINE_SWITCHES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
Source = SourceFile | HubSource


def resolve_sources(names: Iterable[str]) -> list[Source]:
    """The sources behind the names, in the order given, each folder's files sorted by path.

    Raises DataError for a name that leads nowhere or to nothing readable.
    """
    found: list[Source] = []
    for name in names:
        path = local_path(name)
        if name == STANDARD_LIBRARY:
            found += standard_library()
        elif name.startswith("python:"):
            raise DataError(f"{name}: only {STANDARD_LIBRARY} is known")
        elif name.startswith("hub:"):
            found.append(hub_source(name))
        elif name.startswith("synthetic:"):
            raise DataError(f"{name}: rows of a task are drawn while training; there is no text to prepare")
        elif path.is_dir():
            found += folder_files(path)
        elif path.exists():
            if not is_readable_kind(path):
                raise DataError(f"{path}: unknown kind of file; {ACCEPTED}")
            found.append(source_file(path))
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not is_readable_kind(path) and not path.parent.exists():
            found.append(HubSource(name))
        else:
            raise DataError(f"no file or folder {name}{nearest_name(path)}")
    return found


def hub_source(name: str) -> HubSource:
    """`hub:NAME[:CONFIG][:SPLIT]`; with one part after the name, that part is the split if it reads like one."""
    _, *parts = name.split(":")
    if not 1 <= len(parts) <= 3 or not all(parts):
        raise DataError(f"{name}: write hub:NAME, hub:NAME:SPLIT or hub:NAME:CONFIG:SPLIT")
    if len(parts) == 2 and re.fullmatch(r"(train|test|validation|all)(\[.*\])?", parts[1]):
        return HubSource(parts[0], None, parts[1])
    return HubSource(*parts)


def folder_files(folder: Path) -> list[Source]:
    """Every readable file below a folder and its links, sorted by path; names that begin with a dot are skipped."""
    files = LinkedWalk(lambda name: name.startswith("."), is_readable_kind).files_below(folder)
    if not files:
        raise DataError(f"{folder}: the folder holds no file to read; {ACCEPTED}")
    return [source_file(file, named=False) for file in files]


def standard_library() -> list[Source]:
    """The .py files of the running interpreter's standard library, sorted by path, without its tests."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(file for file in walk(folder, lambda name: name in OUTSIDE_LIBRARY) if file.suffix == ".py")
    if not files:
        raise DataError(f"{STANDARD_LIBRARY}: no sources at {folder}; this Python ships without them")
    return [source_file(file, named=False) for file in files]


def source_file(path: Path, named: bool = True) -> SourceFile:
    """The file with its size and time now."""
    status = path.stat()
    return SourceFile(path, status.st_size, status.st_mtime_ns, named)


def is_readable_kind(path: Path) -> bool:
    """Whether the suffixes say one of KINDS, maybe compressed."""
    plain = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    return plain.suffix.lower() in KINDS
