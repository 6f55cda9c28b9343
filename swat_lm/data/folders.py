"""Finds the files below a folder, through links too: what several names lead to is found once, and that is said."""

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

logger = logging.getLogger(__name__)


def walk(folder: Path, skipped: Callable[[str], bool]) -> Iterator[Path]:
    """Paths of the files below a folder; `skipped(name)` prunes; links to folders are not followed.

    Raises OSError, naming it, for a folder that cannot be read.
    """
    for parent, folders, files in os.walk(folder, onerror=raise_error):
        folders[:] = [name for name in folders if not skipped(name)]
        yield from (Path(parent, name) for name in files if not skipped(name))


def raise_error(error: OSError) -> None:
    """For os.walk, which otherwise passes over a folder it cannot read."""
    raise error


class LinkedWalk:
    """The wanted files below a folder and below the folders that links lead to, by real path; `skipped(name)` prunes.

    A file or folder to which several names lead is found once: by its own name if that lies below the folder, else by
    the first link in the order of paths. A link that is left out because of this, that leads to a folder around it or
    nowhere, is named in the log.
    """

    def __init__(self, skipped: Callable[[str], bool], wanted: Callable[[Path], bool]) -> None:
        self.skipped, self.wanted = skipped, wanted
        # real path -> the path by which it was found
        self.folders: dict[Path, Path] = {}
        self.files: dict[Path, Path] = {}

    def files_below(self, folder: Path) -> list[Path]:
        """Paths of all files found, sorted; call once. Raises OSError, naming it, for a folder that cannot be read."""
        links = self.visit(folder)
        # what lies below a link may hold links; each round follows those of the one before
        file_links: list[Path] = []
        while links:
            file_links += [link for link in links if link.is_file() and self.wanted(link)]
            links = [found for link in links if self.is_new_folder(link) for found in self.visit(link)]
        for link in sorted(file_links):
            real = link.resolve()
            if real in self.files:
                self.say(link, f"a link to {self.files[real]}, which is read under that name")
            else:
                self.files[real] = link
        return sorted(self.files.values())

    def visit(self, folder: Path) -> list[Path]:
        """Take the regular files below a folder that are not yet known; returns the links, sorted."""
        links: list[Path] = []
        for parent, folders, files in os.walk(folder, onerror=raise_error):
            place, real = Path(parent), Path(parent).resolve()
            if real in self.folders:
                # the folder itself, or one below a link to a folder around it
                self.say(place, f"the same folder as {self.folders[real]}, which is read under that name")
                folders[:] = []
                continue
            self.folders[real] = place
            names = [name for name in (*folders, *files) if not self.skipped(name)]
            links += [place / name for name in names if (place / name).is_symlink()]
            folders[:] = sorted(name for name in folders if name in names and not (place / name).is_symlink())
            for name in set(names) - set(folders):
                path = place / name
                if self.wanted(path) and path.is_file() and not path.is_symlink():
                    self.files[real / name] = path
        return sorted(links)

    def is_new_folder(self, link: Path) -> bool:
        """Whether a link leads to a folder that is to be visited; says why not where it is not."""
        # unlike Path.resolve this ends for links in a circle
        real = Path(os.path.realpath(link))
        if not link.exists():
            self.say(link, f"a link that leads nowhere (to {os.readlink(link)})")
        elif link.is_dir() and link.parent.resolve().is_relative_to(real):
            self.say(link, f"a link to {real}, a folder around it")
        elif real in self.folders:
            self.say(link, f"a link to {self.folders[real]}, which is read under that name")
        else:
            return link.is_dir()
        return False

    def say(self, path: Path, what: str) -> None:
        """Name what is left out."""
        logger.warning("%s is left out: %s", path, what)
