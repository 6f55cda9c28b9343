"""SWAT's Table 1: benchmarks at equal size."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import override

from swat_lm.evaluate.standard_errors import joined_error, mean_and_error
from swat_lm.evaluate.table1 import ACCURACIES, AVERAGE, COLUMNS, PAPER, chance_row, headings, notes, our_row, shown
from swat_lm.papers.experiment import Measurement, Run, Section
from swat_lm.papers.findings import Findings
from swat_lm.papers.measuring import missing_tasks
from swat_lm.papers.scales import Scale
from swat_lm.papers.sized import SizedVariant
from swat_lm.papers.swat.scales import TABLE1
from swat_lm.papers.swat.variants import TABLE1_LABELS, SwatExperiment
from swat_lm.papers.verdicts import Samples, Verdict, judge

__all__ = ["Benchmarks"]

CLAIMS = (
    ("SWAT (-) has a higher average than Transformer++", "46.88 against 42.92 (340M)", "swat-negative", "llama"),
    ("SWAT (-+) has a higher average than Transformer++", "45.85 against 42.92 (340M)", "swat-balanced", "llama"),
    ("SWAT (-) has a higher average than SWAT (-+)", "46.88 against 45.85 (340M)", "swat-negative", "swat-balanced"),
    ("SWAT (-+) has a higher average than SWAT (+)", "45.85 against 45.05 (340M)", "swat-balanced", "swat-positive"),
    ("SWAT (-+) has a higher average than Gated DeltaNet", "45.85 against 45.42 (340M)", "swat-balanced",
     "gated-deltanet"),
)  # fmt: skip
"""What is said of the average of the eight accuracies, the paper's numbers, who is ahead and of whom."""


class Benchmarks(SwatExperiment):
    """Average of eight accuracies, and the loss of WikiText per word."""

    reads_benchmarks: ClassVar[bool] = True
    leaves_out: ClassVar[bool] = True
    budget_name: ClassVar[str] = "benchmarks"

    @override
    def variants(self, scale: Scale) -> Mapping[str, SizedVariant]:
        return {
            name: SizedVariant(name, TABLE1_LABELS[name], "BL", None, fields)
            for name, fields in TABLE1[scale.name].items()
        }

    @override
    def measure(self, variant: SizedVariant, run: Run) -> list[Measurement]:
        return missing_tasks(run, run.scale.sizes["BL"])

    @override
    def verdicts(self, found: Findings) -> list[Verdict]:
        averages = [
            judge(says, paper, average_accuracy(found, ahead), average_accuracy(found, behind))
            for says, paper, ahead, behind in CLAIMS
        ]
        words = judge(
            "on WikiText SWAT (-+) is worse than Transformer++", "perplexity 35.53 against 31.52 (340M)",
            wikitext(found, "swat-balanced"), wikitext(found, "llama"), "Gap in nats per word.",
        )  # fmt: skip
        return [*averages, words]

    @override
    def sections(self, found: Findings) -> list[Section]:
        results = {
            f"{variant.label}, seed {seed}": found.tasks(variant, seed)
            for variant in found.chosen.values()
            for seed in found.seeds
        }
        rows = [*(our_row(label, answered) for label, answered in results.items()), *PAPER]
        columns = headings(rows)
        cells = [
            [row.name, row.group, *(shown(row.cells.get(heading), "\u00b1") for heading in columns)] for row in rows
        ]
        kinds = ["paper" if row.group.startswith("printed") else "" for row in rows]
        remarks = notes(results, found.scale.task_limit)
        return [Section("Benchmarks", ("model", "source", *columns), cells, kinds, remarks=remarks)]

    @override
    def pictures(self, found: Findings, out: Path) -> dict[str, Path]:
        from swat_lm.papers.pictures import plot_rows

        rows = [(variant.label, *mean_average(found, variant)) for variant in found.chosen.values()]
        if all(value is None for _, value, _ in rows):
            return {}
        path = out / f"{self.name}.png"
        what = "average accuracy of the eight tasks (%)"
        plot_rows(rows, path, xlabel=what, mark=(guessing(found), "guessing"))
        return {"Average of the eight accuracies": path}


def answers(found: Findings, name: str) -> dict[int, dict[str, Any]]:
    """A variant's results by seed and task; empty for one that was left out."""
    return {seed: found.tasks(found.chosen[name], seed) for seed in found.seeds if name in found.chosen}


def average_accuracy(found: Findings, name: str) -> Samples | None:
    """Percent per document, weighted so that their mean is the average of the eight tasks."""
    columns = [(column.task, column.metric) for column in COLUMNS if column.is_percent]
    samples: dict[int, list[float]] = {}
    for seed, results in answers(found, name).items():
        if all(task in results for task, _ in columns):
            scores = [[float(x) for x in results[task].documents[metric]] for task, metric in columns]
            total = sum(map(len, scores))
            samples[seed] = [100 * x * total / (len(columns) * len(row)) for row in scores for x in row]
    return samples or None


def wikitext(found: Findings, name: str) -> Samples | None:
    """Nats per word of each article."""
    task = "wikitext"
    pairs = {
        seed: answered[task].documents["word_perplexity"]
        for seed, answered in answers(found, name).items()
        if task in answered
    }
    return {seed: [-value / words for value, words in row] for seed, row in pairs.items()} or None


def mean_average(found: Findings, variant: SizedVariant) -> tuple[float | None, float | None]:
    """Average of the eight accuracies over seeds, in per cent; its error joins documents and seeds."""
    rows = [our_row(variant.label, found.tasks(variant, seed)) for seed in found.seeds]
    cells = [row.cells[AVERAGE] for row in rows if AVERAGE in row.cells]
    if not cells:
        return None, None
    mean, over_seeds = mean_and_error([cell.value for cell in cells])
    # the seeds answer the same documents, so that their errors do not shrink each other
    errors = [cell.error for cell in cells if cell.error is not None]
    return mean, joined_error(math.fsum(errors) / len(errors) if len(errors) == len(cells) else None, over_seeds)


def guessing(found: Findings) -> float | None:
    """The average of the eight accuracies of guessing, in per cent; a last word cannot be guessed."""
    for variant in found.chosen.values():
        results = found.tasks(variant, found.seeds[0])
        if results:
            return math.fsum(cell.value for cell in chance_row(results).cells.values()) / len(ACCURACIES)
    return None
