"""What the tests of papers share: a data folder in the expected layout, and runs without processes of their own."""

import random
from pathlib import Path
from typing import Any

import pytest

from swat_lm.papers import reproduction
from swat_lm.papers.watching import Watcher

WORDS = ["the", "red", "blue", "slow", "quick", "fox", "dog", "tree", "runs", "sleeps", "sings", "over", "under", "but"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder in the expected layout."""
    folder, source = tmp_path_factory.mktemp("data"), random.Random(0)
    for name, count, words in (("corpus", 60, 200), ("books", 4, 900)):
        (folder / name).mkdir()
        for number in range(count):
            (folder / name / f"{number}.txt").write_text(" ".join(source.choices(WORDS, k=words)))
    return folder


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs without processes of their own; the list learns which jobs were done."""
    done: list[str] = []

    def run_here(out: Path, names: Any, threads: int, watcher: Watcher, module: str) -> None:
        for name in names:
            reproduction.do_model(out, name, watcher)
            done.append(name)

    monkeypatch.setattr(reproduction, "run_workers", run_here)
    return done
