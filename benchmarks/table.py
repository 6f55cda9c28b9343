"""Writes the tables of docs/performance.md from benchmarks/results/*.json.

python -m benchmarks.table            rewrite what stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`
python -m benchmarks.table --check    change nothing; exit 1 where the page differs from the results
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.measure import REPOSITORY, RESULTS

PAGE = REPOSITORY / "docs" / "performance.md"
BENCHMARKS = (
    "attention_cpu", "train_cpu", "training_memory", "decode_cpu", "spade_cpu", "longvq_cpu", "hybrids_cpu",
    "selection_cpu", "serve",
    "attention_gpu", "attention_gpu_code",
)  # fmt: skip
NOT_RECORDED = "Not recorded yet: `python -m benchmarks.{name} --record` measures it and records it here."


def main(arguments: list[str] | None = None) -> int:
    """Rewrite or check the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 where the page is stale")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    before = options.page.read_text(encoding="utf-8")
    after = fill(before, options.results)
    if before == after:
        return 0
    if options.check:
        sys.stderr.write(f"{options.page} does not show what {options.results} holds: run python -m benchmarks.table\n")
        return 1
    options.page.write_text(after, encoding="utf-8")
    sys.stdout.write(f"{options.page}\n")
    return 0


def fill(page: str, results: Path) -> str:
    """The page with every benchmark's block replaced.

    Raises:
        ValueError: a recorded benchmark without its markers, or markers of something that is no benchmark.
    """
    named = re.findall(r"<!-- (\w+):begin -->", page)
    for name in named:
        if name not in BENCHMARKS:
            raise ValueError(f"the page has a block {name!r}; benchmarks are {', '.join(BENCHMARKS)}")
    for path in sorted(results.glob("*.json")):
        if path.stem not in named:
            raise ValueError(f"{path.name}: the page lacks <!-- {path.stem}:begin --> and <!-- {path.stem}:end -->")
    for name in named:
        path = results / f"{name}.json"
        text = render(json.loads(path.read_text())) if path.exists() else NOT_RECORDED.format(name=name)
        pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        page, count = pattern.subn(lambda found, text=text: f"{found[1]}{text}\n{found[2]}", page)
        if count != 1:
            raise ValueError(f"expected <!-- {name}:begin --> and <!-- {name}:end --> once each, found {count}")
    return page


def render(record: dict[str, Any]) -> str:
    """One benchmark: where it was measured, its goals, and its rows, those with equal columns in one table.

    A record with `lines` has many rows of few figures: there a row is a line of the table.
    """
    parts = [describe(record["machine"], record["settings"], record.get("gpu"))]
    if record["goals"]:
        goals = [
            [
                line["goal"],
                number(line["wanted"]),
                number(line["measured"]),
                "reached" if line["reached"] else "**missed**",
            ]
            for line in record["goals"]
        ]
        parts.append(table(["goal", "at least", "measured", ""], goals))
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in record["rows"]:
        groups.setdefault(tuple(row), []).append(row)
    for columns, rows in groups.items():
        if record.get("lines"):
            head = [heading(column) for column in columns]
            parts.append(table(head, [[cell(row[column]) for column in columns] for row in rows]))
            continue
        # figures run down, so that a comparison of many figures stays readable
        body = [[heading(column), *(cell(row[column]) for row in rows)] for column in columns]
        parts.append(table(body[0], body[1:]))
    return "\n\n".join(parts)


def describe(machine: dict[str, Any], settings: dict[str, Any], gpu: dict[str, Any] | None = None) -> str:
    """The machine, its GPU where that is what was measured, the versions and the settings in one paragraph."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    shown = "; ".join(f"{heading(name)} {cell(value)}" for name, value in settings.items())
    card = "" if gpu is None else f"{gpu['name']} ({cell({k: v for k, v in gpu.items() if k != 'name'})}); "
    return (
        f"{card}{machine['processor']}, {machine['threads']} threads, {machine['memory_gib']} GiB; "
        f"Python {machine['python']}, {versions}; commit {machine['commit']}, {machine['date']}. Settings: {shown}."
    )


def table(head: list[str], body: list[list[str]]) -> str:
    """A table in Markdown, the first column to the left, the others to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def heading(name: str) -> str:
    """A key as words."""
    return name.replace("_", " ").replace("|", "/")


def cell(value: Any) -> str:
    """A value of a row as text."""
    if value is None or isinstance(value, str):
        return (value or "").replace("|", "/")
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(cell(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{heading(key)}: {cell(item)}" for key, item in value.items())
    return number(value)


def number(value: float) -> str:
    """Three significant digits; whole numbers in full."""
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e15):
        return f"{int(value):,}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
