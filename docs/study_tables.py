"""Tables of the studies whose records are committed in docs/results/studies, for generate.py."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from markdown_rows import rows, with_error

from swat_lm.evaluate.standard_errors import Samples
from swat_lm.papers.studies import load_study
from swat_lm.papers.verdicts import paired_gap
from swat_lm.words import counted

__all__ = ["study_tables"]

ARMS = {
    "sigmoid-geo": "sigmoid window, slopes from 64 to 4 over it",
    "sigmoid": "sigmoid window, negative slopes 2^-k",
    "balanced": "sigmoid window, balanced slopes (the paper's)",
    "softmax-geo": "softmax window, slopes from 64 to 4 over it",
    "softmax-slopes": "softmax window, negative slopes 2^-k",
    "softmax": "softmax window, no slopes",
    "softmax-sink": "softmax window, no slopes, learned sink",
    "full": "full attention",
    "full-alibi": "full attention, ALiBi",
}
FACTORS = {
    "base": "sigmoid, slopes from 64 to 4 over the window",
    "bias-zero": "`score_bias: 0`",
    "bias-6": "`score_bias: -6`",
    "bias-8": "`score_bias: -8`",
    "bias-learned": "`learned_score_bias`",
    "slopes-learned": "`learned_slopes`",
    "slopes-mixed": "a quarter of the heads with gentle positive slopes",
    "no-rotary": "no RoPE",
    "qk-norm": "`qk_norm`",
    "output-norm": "`output_norm`",
    "output-gate": "`output_gate`",
    "output-start": "`output_projection_init_scale: 0.35`",
    "softmax": "softmax over the same windows and slopes",
    "softmax-qk-norm": "softmax, `qk_norm`",
    "full-qk-norm": "full attention, `qk_norm`",
    "full-alibi-qk-norm": "full attention, ALiBi, `qk_norm`",
    "softmax-output-norm": "softmax, `output_norm`",
    "softmax-output-gate": "softmax, `output_gate`",
}


@dataclass(frozen=True)
class Record:
    """What a study kept of one run."""

    variant: str
    seed: int
    kept: dict[str, Any]

    def losses(self, at: int) -> list[float]:
        """Of each piece, at one of the lengths, counted from the training length."""
        return [row[at] for row in self.kept["curve"]["document_mean_loss"]]

    def loss(self, at: int) -> float:
        """Their mean."""
        return self.kept["curve"]["points"][at]["mean_loss"]


def study_tables(folder: Path) -> dict[str, str]:
    """By the name of its marker, the table of each study; one without records says how to run it."""
    found = {}
    for name, table in TABLES.items():
        records = sorted(read_records(folder / name), key=lambda one: (one.variant, one.seed))
        found[f"study-{name}"] = table(records) if records else f"Not run yet: `swat-lm study {name}`."
    return found


def read_records(folder: Path) -> Iterator[Record]:
    """Those of a study."""
    for path in (folder / "records").glob("*.json"):
        variant, seed = re.fullmatch(r"(.+)-seed(\d+)", path.stem).groups()  # type: ignore[union-attr]
        yield Record(variant, int(seed), json.loads(path.read_text(encoding="utf-8")))


def rates(records: list[Record]) -> str:
    """Loss at the training length by arm and learning rate; the best of each arm stands out."""
    runs: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        runs[split_rate(record.variant)].append(record)
    columns = sorted({rate for _, rate in runs}, key=float)
    body = []
    for arm, label in ARMS.items():
        losses = {rate: mean(run.loss(0) for run in found) for (of, rate), found in runs.items() if of == arm}
        if losses:
            far = mean(run.loss(-1) for run in runs[arm, min(losses, key=lambda rate: losses[rate])])
            body.append([label, *(marked(losses, rate) for rate in columns), f"{far:.3f}"])
    return table(["", *columns, f"best, at {times(records)} times the length"], body, records)


def schedules(records: list[Record]) -> str:
    """Loss at the training length by window, heads and schedule, and how far each schedule is above a cell's best."""
    found: dict[tuple[int, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        window, heads, schedule = re.fullmatch(r"w(\d+)-h(\d+)-([\w-]+)", record.variant).groups()  # type: ignore[union-attr]
        found[int(window), int(heads)][schedule].append(record.loss(0))
    cells = {at: {name: mean(losses) for name, losses in found[at].items()} for at in sorted(found)}
    names = sorted({name for cell in cells.values() for name in cell}, key=schedule_order)
    body = [
        [f"{window}", f"{heads}", *(marked(cell, name) for name in names)] for (window, heads), cell in cells.items()
    ]
    body.append(["mean above the best", "", *(excess(name, [*cells.values()]) for name in names)])
    return table(["window", "heads", *(f"`{name}`" for name in names)], body, records)


def excess(name: str, cells: list[dict[str, float]]) -> str:
    """Mean over all cells of a schedule's loss less that of the cell's best; nothing if it lacks a cell.

    Means over different cells could not be compared.
    """
    if not all(name in cell for cell in cells):
        return ""
    return f"{mean(cell[name] - min(cell.values()) for cell in cells):.3f}"


def schedule_order(name: str) -> tuple[int, list[int]]:
    """Published ones first, then by kind and span."""
    kinds = ["swat", "alibi", "span", "geo"]
    return kinds.index(re.match(r"[a-z]+", name)[0]), [int(number) for number in re.findall(r"\d+", name)]  # type: ignore[index]


def arms(name: str, records: list[Record]) -> str:
    """Arms at learning rates: by arm, then by rate."""

    def place(variant: str) -> tuple[int, float]:
        arm, rate = split_rate(variant)
        return list(ARMS).index(arm), float(rate)

    called = {}
    for variant in sorted({one.variant for one in records}, key=place):
        arm, rate = split_rate(variant)
        called[variant] = [ARMS[arm], rate]
    return compared_variants(name, records, ["", "rate"], called)


def factors(name: str, records: list[Record]) -> str:
    """Single changes."""
    there = {one.variant for one in records}
    called = {variant: [label] for variant, label in FACTORS.items() if variant in there}
    return compared_variants(name, records, [""], called)


def compared_variants(name: str, records: list[Record], head: list[str], called: dict[str, list[str]]) -> str:
    """Losses of every variant by length, its gap to the study's baseline, and what else was measured, over all seeds.

    `called` are the first cells of a row, by variant and in their order.
    """
    runs: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        runs[record.variant].append(record)
    first = runs[load_study(name).spec.baseline]
    lengths = [point["length"] for point in first[0].kept["curve"]["points"]]
    losses, outcomes = [], []
    for variant, words in called.items():
        here = runs[variant]
        seeds = counted(len(here), "seed")
        gap = ["", ""] if here is first else [compared(here, first, 0), compared(here, first, -1)]
        means = (f"{mean(run.loss(at) for run in here):.3f}" for at in range(len(lengths)))
        losses.append([*words, seeds, *means, *gap])
        outcomes.append([*words, *measured(here)])
    heads = [*head, "runs", *(f"{length:,} tokens" for length in lengths)]
    gaps = [f"gap to the baseline, at {length:,}" for length in (lengths[0], lengths[-1])]
    more = [*head, "first token's share (uniform)", "norm of outputs, first and last token",
            "training loss at a quarter", "at the end", "tokens/s"]  # fmt: skip
    return f"{table([*heads, *gaps], losses, records)}\n\n{rows(more, outcomes)}\n\n{recalled(records)}"


def samples(runs: list[Record], at: int) -> Samples:
    """Losses of the pieces by seed."""
    return {run.seed: run.losses(at) for run in runs}


def compared(runs: list[Record], first: list[Record], at: int) -> str:
    """How far a loss is above the baseline's, paired by piece and seed; undecided within two errors or by one seed."""
    if not {run.seed for run in runs} & {run.seed for run in first}:
        return ""
    gap, error, _, seeds = paired_gap(samples(runs, at), samples(first, at))
    decided = error is not None and abs(gap) > 2 * error and seeds > 1
    return with_error(gap, error, sign="+") + ("" if decided else " (undecided)")


def measured(runs: list[Record]) -> list[str]:
    """What attention does, training loss around a quarter and in the last twentieth of the tokens, and speed."""
    attention = [run.kept["outcomes"]["attention"] for run in runs]
    norms = [list(one["output_norm"].values()) for one in attention]
    share, uniform = (mean(one[key] for one in attention) for key in ("first_token_mass", "first_token_uniform"))
    return [
        f"{share:.3f} ({uniform:.3f})",
        f"{mean(norm[0] for norm in norms):.2f} and {mean(norm[-1] for norm in norms):.2f}",
        f"{mean(trained_loss(run, 0.2, 0.3) for run in runs):.3f}",
        f"{mean(trained_loss(run, 0.95, 1.0) for run in runs):.3f}",
        f"{mean(run.kept['tokens_per_second'] for run in runs):,.0f}",
    ]


def trained_loss(run: Record, begin: float, end: float) -> float:
    """Mean of the logged training losses between two shares of the tokens."""
    last = run.kept["training"][-1]["tokens"]
    return mean(row["loss"] for row in run.kept["training"] if begin * last < row["tokens"] <= end * last)


def recalled(records: list[Record]) -> str:
    """The best recall of any arm."""
    best: dict[str, float] = defaultdict(float)
    for curve in (curve for record in records for curve in record.kept["outcomes"]["recall"]):
        best[curve["task"]] = max(best[curve["task"]], *(point["accuracy"] for point in curve["points"]))
    said = " and ".join(f"{100 * share:.0f}% of {task}" for task, share in best.items())
    return f"Recall within the window and across it: at most {said} in any run, at any distance."


def split_rate(variant: str) -> tuple[str, str]:
    """`softmax-slopes-7.5e-4` is an arm and a learning rate."""
    return re.fullmatch(r"(.+?)-([\d.]+e-\d+)", variant).groups()  # type: ignore[union-attr, return-value]


def marked(cell: dict[str, float], name: str) -> str:
    """A loss, of which the lowest stands out; nothing where there is none."""
    if name not in cell:
        return ""
    return f"**{cell[name]:.3f}**" if cell[name] == min(cell.values()) else f"{cell[name]:.3f}"


def table(head: list[str], body: list[list[str]], records: list[Record]) -> str:
    """A table and what it was measured with."""
    machines = sorted({f"{one.kept['machine']['processor']}, torch {one.kept['machine']['torch']}" for one in records})
    seeds = sorted({one.seed for one in records})
    tokens = records[0].kept["training"][-1]["tokens"]
    said = (
        f"{counted(len(records), 'run')}, {counted(len(seeds), 'seed')}, {tokens:,} tokens each; {'; '.join(machines)}."
    )
    return f"{rows(head, body)}\n\n{said}"


def times(records: list[Record]) -> int:
    """The longest evaluation in training lengths."""
    points = records[0].kept["curve"]["points"]
    return points[-1]["length"] // points[0]["length"]


def mean(values: Any) -> float:
    """Of numbers."""
    found = list(values)
    return sum(found) / len(found)


TABLES: dict[str, Callable[[list[Record]], str]] = {
    "sigmoid-rates": rates, "slope-schedules": schedules,
    **{name: partial(arms, name) for name in ("sigmoid-windows", "sigmoid-large")},
    "sigmoid-factors": partial(factors, "sigmoid-factors"),
}  # fmt: skip
