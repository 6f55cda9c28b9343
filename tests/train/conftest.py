import random
from pathlib import Path
from typing import Any, Protocol

import pytest

from swat_lm.recipe import DataRecipe, Recipe, TrainRecipe

MODEL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "sliding_window": 8,
}
WORDS = ["the", "red", "blue", "slow", "quick", "fox", "dog", "tree", "runs", "sleeps", "sings", "over", "under", "but"]


class MakeRecipe(Protocol):
    def __call__(self, out: str, /, **train: Any) -> Recipe: ...


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of short documents, about 40 kB."""
    folder = tmp_path_factory.mktemp("text")
    source = random.Random(0)
    for number in range(120):
        words = source.choices(WORDS, k=source.randint(5, 120))
        (folder / f"{number:03d}.txt").write_text(" ".join(words))
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the prepared tokens go."""
    return tmp_path_factory.mktemp("tokens")


@pytest.fixture
def make_recipe(tmp_path: Path, text: Path, cache: Path) -> MakeRecipe:
    """`make_recipe("name", steps=3, ...)`: a tiny run in its own folder; keywords are train keys."""

    def make(out: str, /, **train: Any) -> Recipe:
        settings = {
            "steps": 8,
            "batch_size": 4,
            "learning_rate": 3e-3,
            "warmup_steps": 2,
            "log_every": 1,
            "evaluate_every": 4,
            "evaluate_batches": 2,
            "save_every": 3,
            "export": False,
        }
        data = DataRecipe(sources=(str(text),), sequence_length=64, held_out=0.1, cache=str(cache))
        return Recipe(
            name=out, out=str(tmp_path / out), model=MODEL, data=data, train=TrainRecipe(**(settings | train))
        )

    return make
