"""The table of `swat-lm info RECIPE --memory`: what a training step will need under every execution."""

import re
from typing import TYPE_CHECKING

from rich.table import Table

from swat_lm.cli.console import messages, results

if TYPE_CHECKING:
    from swat_lm.recipe import Recipe

__all__ = ["print_memory", "read_size"]

UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
GIB, MIB = 2**30, 2**20


def read_size(text: str) -> int:
    """Bytes of `80GiB`, `512M` or a number of bytes. Raises ValueError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if found is None:
        raise ValueError(f"--available: expected a size such as 80GiB or 512M; got {text!r}")
    size = int(float(found[1]) * UNITS[found[2]])
    if size < MIB:
        raise ValueError(f"--available: {size} bytes hold no training step; write the unit too, such as 16GiB")
    return size


def print_memory(recipe: "Recipe", length: int | None, processes: int, available: str | None) -> None:
    """Predict for rows of `length` (default the recipe's) on so many processes, and the longest row that fits.

    Raises ValueError for a model of a library, or a batch that the processes cannot share.
    """
    from swat_lm.cli.information import find_recipe_config
    from swat_lm.model.configuration import SwatConfig
    from swat_lm.model.execution.predicted import MemoryNeed, Predicted
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
    chosen = "checkpoint" if train.activation_checkpointing else train.execution
    found: list[tuple[str, MemoryNeed, str]] = []
    for name in EXECUTIONS:
        settings = train.execution_settings if name == chosen else {}
        try:
            with messages().status(f"{name}: running a step on shapes"):
                predicted = Predicted(
                    config, name, settings, rows=rows, narrow=train.precision == "bf16", shards=max(shards, 1)
                )
                need = predicted.need(tokens)
                longest = "" if most is None else f"{predicted.longest(most, tokens):,} tokens"
        except ValueError as error:
            # the other executions are predicted all the same
            reason = str(error).removeprefix("execution: ")
            messages().print(reason if reason.startswith(name) else f"{name}: {reason}", markup=False)
            continue
        found.append((name, need, longest))
    words = f"{counted(rows, 'row')} of {tokens:,} tokens a pass, {counted(processes, 'process', 'processes')}"
    if not found:
        raise ValueError(f"--memory: no execution can be predicted for {words}; the reasons are above")
    divisor, unit = (GIB, "GiB") if max(need.total for _, need, _ in found) >= GIB else (MIB, "MiB")
    columns = ["execution", "weights", "optimizer", "a pass", f"together, {unit}"]
    table = Table(*columns, *([] if most is None else [f"longest row in {available}"]))
    for name, need, longest in found:
        cells = [f"{size / divisor:.2f}" for size in (need.weights, need.optimizer, need.one_pass, need.total)]
        table.add_row(name, *cells, *([] if most is None else [longest]))
    results().print(f"{words}, bytes in {unit}", markup=False)
    results().print(table)


def counted(number: int, one: str, several: str | None = None) -> str:
    """A number and its noun."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"
