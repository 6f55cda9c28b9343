"""The table of `swat-lm info RECIPE --memory`: what a training step will need under every execution."""

import re
from typing import TYPE_CHECKING

from rich.table import Table

from swat_lm.cli.console import messages, results

if TYPE_CHECKING:
    from swat_lm.recipe import Recipe

__all__ = ["print_memory", "read_size"]

UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
GIB = 2**30


def read_size(text: str) -> int:
    """Bytes of `80GiB`, `512M` or a number of bytes. Raises ValueError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if found is None:
        raise ValueError(f"--available: expected a size such as 80GiB or 512M; got {text!r}")
    return int(float(found[1]) * UNITS[found[2]])


def print_memory(recipe: "Recipe", length: int | None, processes: int, available: str | None) -> None:
    """Predict for rows of `length` (default the recipe's) on so many processes, and the longest row that fits.

    Raises ValueError for a model of a library, or a batch that the processes cannot share.
    """
    from swat_lm.cli.information import find_recipe_config
    from swat_lm.model.configuration import SwatConfig
    from swat_lm.model.execution.predicted import Predicted
    from swat_lm.model.execution.table import EXECUTIONS

    config = find_recipe_config(recipe)
    if not isinstance(config, SwatConfig):
        raise ValueError("--memory: predicts models of swat-lm; this recipe's is one of a library")
    train, tokens = recipe.train, length or recipe.data.sequence_length
    share, rest = divmod(train.batch_size, processes)
    if rest:
        raise ValueError(f"--processes: {processes} cannot share train.batch_size ({train.batch_size}) equally")
    rows = train.micro_batch_size or share
    shards = {"none": 1, "hybrid": processes // train.replicas}.get(train.sharding, processes)
    most = None if available is None else read_size(available)
    columns = ["execution", "weights", "optimizer", "a pass", "together, GiB"]
    table = Table(*columns, *([] if most is None else [f"longest row in {available}"]))
    chosen = "checkpoint" if train.activation_checkpointing else train.execution
    for name in EXECUTIONS:
        settings = train.execution_settings if name == chosen else {}
        try:
            predicted = Predicted(
                config, name, settings, rows=rows, narrow=train.precision == "bf16", shards=max(shards, 1)
            )
        except ValueError as error:
            messages().print(f"{name}: {error}", markup=False)
            continue
        need = predicted.need(tokens)
        cells = [f"{size / GIB:.2f}" for size in (need.weights, need.optimizer, need.one_pass, need.total)]
        table.add_row(name, *cells, *([] if most is None else [f"{predicted.longest(most, tokens):,} tokens"]))
    results().print(f"{rows} rows of {tokens:,} tokens a pass, {processes} processes, bytes in GiB", markup=False)
    results().print(table)
