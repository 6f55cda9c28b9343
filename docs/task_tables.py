"""Tables of the small models on synthetic tasks whose records are committed in docs/results/tasks, for generate.py."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from markdown_rows import rows

from swat_lm.words import counted

__all__ = ["task_tables"]

TASKS = ("taipan_recall", "ecp_copy", "selective_copy", "longvq_tasks")
NOT_MEASURED = {"model", "place", "label", "seed", "recipe", "parameters", "guessing", "accuracy", "seconds", "machine"}

Record = dict[str, Any]


def task_tables(folder: Path) -> dict[str, str]:
    """By the name of its marker, the table of each benchmark; one without records says how to run it."""
    found = {}
    for name in TASKS:
        records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / name).glob("*.json"))]
        found[name] = table(records) if records else f"Not run yet: `python -m benchmarks.{name} --record`."
    return found


def table(records: list[Record]) -> str:
    """A line for each model, with what was measured seed by seed, and what it was measured with."""
    models: dict[int, list[Record]] = defaultdict(list)
    records = sorted(records, key=lambda one: (one["place"], one["seed"]))
    for record in records:
        models[record["place"]].append(record)
    more = list(dict.fromkeys(name for record in records for name in record if name not in NOT_MEASURED))
    body = []
    for runs in models.values():
        first = runs[0]
        shares = [f"{100 * first['guessing']:.1f} %", by_seed([f"{100 * run['accuracy']:.1f} %" for run in runs])]
        others = [by_seed([shown(run[name]) for run in runs if name in run]) for name in more]
        body.append([first["label"], f"{first['parameters']:,}", by_seed([str(run["seed"]) for run in runs]),
                     *shares, *others])  # fmt: skip
    machines = sorted({f"{one['machine']['processor']}, commit {one['machine']['commit']}" for one in records})
    head = ["model", "parameters", "seeds", "guessing", "accuracy", *more]
    return f"{rows(head, body)}\n\n{counted(len(records), 'run')}, one thread each; {'; '.join(machines)}."


def by_seed(values: list[str]) -> str:
    """Seed by seed."""
    return ", ".join(values)


def shown(value: float) -> str:
    """A share as such, another number with three digits."""
    return f"{100 * value:.1f} %" if value <= 1 else f"{value:.3g}"
