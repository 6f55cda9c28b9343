"""SWAT's Table 1 with our rows beside the paper's: as text, Markdown, HTML and JSON."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from jinja2 import Environment

from swat_lm.evaluate.figures import write_figures
from swat_lm.evaluate.standard_errors import joined_error
from swat_lm.evaluate.suite import TaskResult
from swat_lm.evaluate.tasks import STREAMED
from swat_lm.files import write_text
from swat_lm.words import counted

__all__ = [
    "ACCURACIES",
    "AVERAGE",
    "COLUMNS",
    "PAPER",
    "Cell",
    "Column",
    "TableRow",
    "chance_row",
    "notes",
    "our_row",
    "save_table",
]


@dataclass(frozen=True)
class Column:
    """A heading of Table 1 and where its value is from."""

    heading: str
    task: str
    metric: str
    is_percent: bool = True


@dataclass(frozen=True)
class Cell:
    """A value as it is shown: a perplexity or a percentage."""

    value: float
    error: float | None = None
    """Standard error, in the value's unit."""


@dataclass(frozen=True)
class TableRow:
    """A model's line."""

    name: str
    group: str
    """Who measured it."""
    cells: Mapping[str, Cell]
    """By heading."""


COLUMNS = (
    Column("Wiki ppl", "wikitext", "word_perplexity", is_percent=False),
    Column("Wiki ppl, one stream", f"wikitext{STREAMED}", "word_perplexity", is_percent=False),
    Column("LMB ppl", "lambada_openai", "perplexity", is_percent=False),
    Column("LMB", "lambada_openai", "acc"),
    Column("PIQA", "piqa", "acc"),
    Column("Hella n", "hellaswag", "acc_norm"),
    Column("Wino", "winogrande", "acc"),
    Column("ARC-e", "arc_easy", "acc"),
    Column("ARC-c n", "arc_challenge", "acc_norm"),
    Column("SIQA", "social_iqa", "acc"),
    Column("BoolQ", "boolq", "acc"),
)
AVERAGE = "Average"
ACCURACIES = tuple(column.heading for column in COLUMNS if column.is_percent)
MEASURED = "measured here"
GUESSING = "expected of guessing, not measured"
PAPER_GROUP = "printed in the paper: {}"
# perplexity on WikiText and LAMBADA, average accuracy: arXiv 2502.18845, Table 1
PRINTED = {
    "340M, 15B tokens": (
        ("Transformer++", 31.52, 41.08, 42.92),
        ("RetNet", 32.50, 49.73, 42.54),
        ("GLA", 28.51, 43.02, 44.09),
        ("Mamba", 30.83, 40.21, 43.59),
        ("DeltaNet", 28.65, 47.30, 44.04),
        ("TTT", 27.44, 34.19, 44.51),
        ("Gated DeltaNet", 27.01, 30.94, 45.42),
        ("Titans", 26.18, 29.97, 46.17),
        ("SWAT (-)", 33.32, 36.75, 46.88),
        ("SWAT (+)", 37.47, 49.15, 45.05),
        ("SWAT (-+)", 35.53, 45.06, 45.85),
    ),
    "760M, 30B tokens": (
        ("Transformer++", 25.21, 27.64, 48.69),
        ("RetNet", 26.08, 24.45, 48.46),
        ("Mamba", 28.12, 23.96, 47.22),
        ("Mamba2", 22.94, 28.37, 48.34),
        ("DeltaNet", 24.37, 24.60, 48.97),
        ("TTT", 24.17, 23.51, 47.32),
        ("Gated DeltaNet", 21.18, 22.09, 49.69),
        ("Titans", 20.04, 21.96, 51.56),
        ("SWAT (-)", 23.41, 21.05, 51.85),
        ("SWAT (+)", 23.91, 21.05, 50.48),
        ("SWAT (-+)", 23.34, 21.36, 51.01),
    ),
}
PAPER = tuple(
    TableRow(name, PAPER_GROUP.format(size), {"Wiki ppl": Cell(wiki), "LMB ppl": Cell(lambada), AVERAGE: Cell(average)})
    for size, rows in PRINTED.items()
    for name, wiki, lambada, average in rows
)


def our_row(name: str, results: Mapping[str, TaskResult]) -> TableRow:
    """A checkpoint's line; the average only where all eight accuracies are there."""
    cells = {}
    for column in COLUMNS:
        found = results[column.task].value(column.metric) if column.task in results else None
        if found is not None:
            scale = 100 if column.is_percent else 1
            cells[column.heading] = Cell(found[0] * scale, None if found[1] is None else found[1] * scale)
    return TableRow(name, MEASURED, cells | averaged(cells))


def chance_row(results: Mapping[str, TaskResult]) -> TableRow:
    """What guessing among the choices gives."""
    chances = {task: result.chance for task, result in results.items() if result.chance is not None}
    guessed = [column for column in COLUMNS if column.is_percent and column.task in chances]
    cells = {column.heading: Cell(100 * chances[column.task]) for column in guessed}
    return TableRow("(guessing)", GUESSING, cells)


def averaged(cells: Mapping[str, Cell]) -> dict[str, Cell]:
    """The mean of the eight accuracies, whose documents are independent."""
    if not set(ACCURACIES) <= cells.keys():
        return {}
    chosen = [cells[heading] for heading in ACCURACIES]
    together = joined_error(*(cell.error for cell in chosen))
    error = None if together is None or any(cell.error is None for cell in chosen) else together / len(chosen)
    return {AVERAGE: Cell(math.fsum(cell.value for cell in chosen) / len(chosen), error)}


def headings(rows: Sequence[TableRow]) -> list[str]:
    """Headings for which a row has a value, in the table's order."""
    known = [*(column.heading for column in COLUMNS), AVERAGE]
    return [heading for heading in known if any(heading in row.cells for row in rows)]


def shown(cell: Cell | None, sign: str) -> str:
    """A cell as text: `45.21 +- 1.31`; a dash where nothing is known."""
    if cell is None:
        return "-"
    kind = ".2f" if cell.value < 1000 else ".0f" if cell.value < 1e6 else ".1e"
    return f"{cell.value:{kind}}" + ("" if cell.error is None else f" {sign} {cell.error:{kind}}")


def other_metrics(results: Mapping[str, TaskResult]) -> list[tuple[str, str, float, float | None]]:
    """Task, metric, value and error of whatever Table 1 does not show."""
    in_table = {(column.task, column.metric) for column in COLUMNS}
    found = []
    for name, result in results.items():
        for metric in result.metrics:
            value = result.value(metric)
            if (name, metric) not in in_table and value is not None:
                found.append((name, metric, *value))
    return found


def notes(results: Mapping[str, Mapping[str, TaskResult]], limit: int | None) -> list[str]:
    """What a reader must know to compare the rows."""
    everything = [result for by_task in results.values() for result in by_task.values()]
    found = [
        "Errors are standard errors over documents. n: log-likelihoods divided by the choice's length in characters."
    ]
    if limit is not None:
        found.append(f"Of each task only the first {counted(limit, 'document')}.")
    found += sorted({result.remark for result in everything if result.remark})
    lengths = {
        label: next((r.window_length for r in by_task.values() if r.task == "wikitext"), None)
        for label, by_task in results.items()
    }
    if any(lengths.values()):
        each = ", ".join(f"{label} {length:,}" for label, length in lengths.items() if length)
        found.append(
            f"Wiki ppl is the harness's: per word, over disjoint windows, each with one token before it ({each} tokens "
            "a window). A longer window has more context to predict from: compare equal ones (--max-length)."
        )
    if any(result.rolling == "whole" for result in everything):
        found.append(
            "Wiki ppl, one stream: each article read once from its start in constant memory, every token seeing all "
            "that the model keeps; not comparable with published values."
        )
    found.append(
        "Rows of the paper are as printed in arXiv 2502.18845, Table 1 (perplexities and the average of the eight "
        "accuracies), trained on other text and with another vocabulary than ours unless you did the same."
    )
    return found


def markdown(rows: Sequence[TableRow], remarks: Sequence[str]) -> str:
    """The table and its notes."""
    columns = headings(rows)
    lines = [
        "| model | source | " + " | ".join(columns) + " |",
        "| --- | --- |" + " ---: |" * len(columns),
        *(
            f"| {row.name} | {row.group} | "
            + " | ".join(shown(row.cells.get(heading), "\u00b1") for heading in columns)
            + " |"
            for row in rows
        ),
    ]
    return "\n".join([*lines, "", *(f"- {remark}" for remark in remarks), ""])


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Benchmarks</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em; color: #222; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .7em; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #222; }
tr.group th { text-align: left; padding-top: 1em; font-weight: 600; border-bottom: 1px solid #999; }
tr.paper td { color: #666; font-style: italic; }
.error { color: #888; font-size: 85%; }
li { max-width: 60em; }
</style></head><body>
<h1>Benchmarks of SWAT's Table 1</h1>
<div class="scroll"><table><thead><tr><th>model</th>
{%- for heading in columns %}<th>{{ heading }}</th>{% endfor %}</tr></thead><tbody>
{% for group, members in groups -%}
<tr class="group"><th colspan="{{ columns | length + 1 }}">{{ group }}</th></tr>
{% for row in members -%}
<tr class="{{ "ours" if group in ours else "paper" }}"><td>{{ row.name }}</td>
{%- for heading in columns -%}
{%- set value, _, error = shown(row.cells.get(heading), "\u00b1").partition(" ") -%}
<td>{{ value }}{% if error %} <span class="error">{{ error }}</span>{% endif %}</td>
{%- endfor %}</tr>
{% endfor %}
{%- endfor -%}
</tbody></table></div>
<ul>
{% for remark in remarks %}<li>{{ remark }}</li>
{% endfor -%}
</ul>
</body></html>
"""


def page(rows: Sequence[TableRow], remarks: Sequence[str]) -> str:
    """The table as one HTML page without anything from elsewhere; the paper's rows stand apart."""
    groups = [(group, list(members)) for group, members in itertools.groupby(rows, lambda row: row.group)]
    template = Environment(autoescape=True, keep_trailing_newline=True).from_string(PAGE)
    ours = (MEASURED, GUESSING)
    return template.render(columns=headings(rows), groups=groups, ours=ours, remarks=remarks, shown=shown)


def save_table(folder: Path, rows: Sequence[TableRow], remarks: Sequence[str]) -> list[Path]:
    """Write table.md, table.html and table.json; returns their paths."""
    content = {
        "table.md": markdown(rows, remarks),
        "table.html": page(rows, remarks),
        "table.json": write_figures({"rows": [asdict(row) for row in rows], "notes": list(remarks)}) + "\n",
    }
    for name, text in content.items():
        write_text(folder / name, text)
    return [folder / name for name in content]
