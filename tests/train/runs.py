"""Comparing finished runs: what they logged and the weights of their newest checkpoint."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from swat_lm.recipe import Recipe
from swat_lm.train.engine import Engine
from swat_lm.train.metrics import read_metrics
from swat_lm.train.setup import Training, set_up

MEASURED = ("step", "tokens", "loss", "grad_norm", "learning_rate", "held_out_loss")


def metrics(out: str | Path) -> list[tuple]:
    """What must not depend on the clock."""
    return [tuple(one.get(name) for name in MEASURED) for one in read_metrics(Path(out, "metrics.jsonl"))]


def weights(recipe: Recipe) -> dict[str, torch.Tensor]:
    """Of the newest checkpoint."""
    engine = Engine(recipe.train)
    training = set_up(engine, replace(recipe, train=replace(recipe.train, resume="auto")))
    return engine.whole_weights(training.model)


def ready(recipe: Recipe) -> Training:
    """A run before its next step."""
    Path(recipe.out).mkdir(exist_ok=True)
    return set_up(Engine(recipe.train), recipe)


def assert_same_run(one: Recipe, other: Recipe) -> None:
    """Bit for bit: every logged number and every weight."""
    assert metrics(one.out) == metrics(other.out)
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def assert_close(one: list[tuple], other: list[tuple], rel: float = 1e-5) -> None:
    """Equal but for rounding."""
    for left, right in zip(one, other, strict=True):
        assert [x is None for x in left] == [x is None for x in right]
        assert [x for x in left if x is not None] == pytest.approx([x for x in right if x is not None], rel=rel)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
