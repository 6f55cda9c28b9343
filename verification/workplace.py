"""Where a check works: a folder of its own, a copy of what git tracks, empty environments, and commands in them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
CONSTRAINTS = REPOSITORY / "constraints.txt"


class CheckFailedError(Exception):
    """A check found something wrong."""


@dataclass
class Workplace:
    """One check's folder, removed afterwards, and the list of what was done."""

    folder: Path
    report: Callable[[str], None]
    did: list[str] = field(default_factory=list)

    def done(self, what: str) -> None:
        """Note a step that went well."""
        self.did.append(what)
        self.report(what)

    def copy(self) -> Path:
        """What git tracks, as it is in the working tree: nothing that lies about here can be missed elsewhere."""
        target = self.folder / "tree"
        for name in tracked():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, target / name)
        return target

    def environment(self, name: str) -> Path:
        """An empty virtual environment; returns its folder of programs."""
        self.run([sys.executable, "-m", "venv", self.folder / name])
        return self.folder / name / "bin"

    def run(self, command: Sequence[str | Path], cwd: Path | None = None, expect: int = 0, timeout: float = 900) -> str:
        """Run a command outside the repository, which must end as expected; returns what it wrote to both streams."""
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        ran = subprocess.run(
            [str(word) for word in command],
            cwd=cwd or self.folder, env={**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=timeout,
        )  # fmt: skip
        if ran.returncode != expect:
            shown = " ".join(Path(word).name if Path(word).is_absolute() else str(word) for word in command)
            raise CheckFailedError(f"{shown}: exit code {ran.returncode}, expected {expect}\n{ran.stdout[-3000:]}")
        return ran.stdout


def tracked(*paths: str) -> list[str]:
    """Files that git tracks, and new ones that it does not ignore."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *paths]
    names = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted(name for name in names if (REPOSITORY / name).is_file())


def require(condition: bool, otherwise: str) -> None:
    """Raise CheckFailedError with the words unless the condition holds."""
    if not condition:
        raise CheckFailedError(otherwise)
