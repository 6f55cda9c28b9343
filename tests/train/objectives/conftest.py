import json
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import pytest

from swat_lm.layers import LAYERS
from swat_lm.recipe import Recipe
from swat_lm.train.objectives import OBJECTIVES
from tests.train import speaking


class MakeMarked(Protocol):
    def __call__(self, out: str, /, **train) -> Recipe: ...


@pytest.fixture
def marked_recipe(make_recipe, tmp_path: Path) -> MakeMarked:
    """As `make_recipe`, of pairs of prompt and answer, learning the answers."""
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{n} and {n % 7}?", "answer": f"{n * (n % 7)}"} for n in range(150)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(out: str, /, **train) -> Recipe:
        recipe = make_recipe(out, **{"objective": "masked_next_token", **train})
        data = replace(recipe.data, sources=(str(path),), format="prompt_answer", cache=str(tmp_path / "pair-tokens"))
        return replace(recipe, data=data)

    return make


@pytest.fixture
def speaking_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer and the objective of `speaking.py` in their tables, for one test."""
    monkeypatch.setitem(LAYERS, "speaking", speaking.SpeakingLayer)
    monkeypatch.setitem(OBJECTIVES, "counting", speaking.Counting)
