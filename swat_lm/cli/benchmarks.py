"""`swat-lm evaluate tasks`: the benchmarks of SWAT's Table 1 through lm-evaluation-harness."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from swat_lm.cli.checkpoints import load_any_checkpoint, matching_tokenizer
from swat_lm.cli.console import print_table, results, text_table
from swat_lm.cli.options import DEVICE, number_or_word, split_name
from swat_lm.cli.outputs import check_folder
from swat_lm.cli.progress import RunProgress, clock
from swat_lm.model.loading import find_model_folder
from swat_lm.paths import local_path

if TYPE_CHECKING:
    from swat_lm.evaluate.harness import HarnessModel
    from swat_lm.evaluate.suite import Subject, Suite, TaskResult
    from swat_lm.evaluate.table1 import TableRow

__all__ = ["tasks"]


def tasks(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CHECKPOINT...",
            help="Runs' folders, model folders or hub names of any causal language models; NAME=CHECKPOINT names one.",
        ),
    ],
    names: Annotated[
        str | None, typer.Option("--tasks", "-t", help="Tasks with commas between; default: all of Table 1.")
    ] = None,
    data: Annotated[
        str, typer.Option("--data", "-d", help="Folder of local files, or `hub` for the harness's own data.")
    ] = "hub",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N documents of each task.")] = None,
    batch_size: Annotated[str, typer.Option(help="Rows per batch, or auto: as many as fit.")] = "auto",
    max_length: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens a prediction may see; default: the model's own, for windowed models no end."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of results; a rerun continues what is in it.")
    ] = None,
    log_samples: Annotated[
        bool, typer.Option("--log-samples", help="Also write each document's requests, answers and metrics to --out.")
    ] = False,
    tokenizer: Annotated[str | None, typer.Option(help="Another tokenizer than the checkpoints' own.")] = None,
    device: DEVICE = None,
) -> None:
    """Score checkpoints on the eight benchmarks and two perplexities of SWAT's Table 1.

    PIQA, HellaSwag, WinoGrande, ARC-easy, ARC-challenge, SIQA, BoolQ, LAMBADA and WikiText, with the prompts and
    metrics of lm-evaluation-harness, beside the paper's rows. From the hub, any other task of the
    harness can be named too. With --out, each finished task is kept, and the table is written as table.md, table.html
    and table.json; --log-samples adds samples_TASK.jsonl, a row for each document as the harness writes it.

    \b
    Examples:
      swat-lm evaluate tasks runs/mine --limit 100
      swat-lm evaluate tasks SWAT=runs/mine Llama=models/llama --data benchmarks/ --out table1
      swat-lm evaluate tasks runs/mine --tasks wikitext,wikitext_streamed --data benchmarks/
    """
    # the harness and its libraries draw their own bars otherwise; read when they are first imported
    os.environ.setdefault("TQDM_DISABLE", "1")
    rows = number_or_word(batch_size, "--batch-size", {"auto": None})
    if out is not None:
        if out.is_file():
            raise ValueError(f"--out {out} is a file: expected a folder")
        check_folder(out, "--out")
    elif log_samples:
        raise ValueError("--log-samples writes to the folder of --out: name one")
    chosen = label_checkpoints(checkpoints)
    from swat_lm.evaluate.tasks import check_harness, load_tasks, task_names

    check_harness()
    from swat_lm.evaluate.harness import HarnessModel
    from swat_lm.evaluate.suite import Suite
    from swat_lm.evaluate.table1 import PAPER, chance_row, notes, our_row, save_table

    # whatever may be wrong is found before anything is measured
    wanted = task_names(names)
    subjects = {label: describe(label, name, tokenizer, max_length, limit) for label, name in chosen.items()}
    loaded = load_tasks(wanted, data)
    suites = {label: Suite(subject, loaded, out, log_samples=log_samples) for label, subject in subjects.items()}
    found: dict[str, dict[str, TaskResult]] = {}
    with RunProgress() as progress:
        for label, suite in suites.items():
            if suite.missing:
                model, tokens = load_any_checkpoint(chosen[label], tokenizer, device)
                harness = HarnessModel(model, tokens, max_length=max_length, batch_size=rows)
                run_suite(suite, harness, progress)
                del harness, model
            elif out is not None:
                progress.say(f"{label}: all results are there already, in {suite.folder}")
            found[label] = suite.results
    ours = [our_row(label, answered) for label, answered in found.items()]
    guess = chance_row(next(iter(found.values())))
    remarks = notes(found, limit)
    show(ours, guess, found, remarks)
    if out is not None:
        written = save_table(out, [*ours, guess, *PAPER], remarks)
        results().print(", ".join(map(str, written)), markup=False)


def label_checkpoints(given: Sequence[str]) -> dict[str, str]:
    """Checkpoints by the names they have in tables: NAME=CHECKPOINT, or the last part of the path.

    Raises ValueError for two of one name, or a name that cannot be a folder's.
    """
    chosen: dict[str, str] = {}
    for text in given:
        label, name = split_name(text)
        if label is None:
            path = local_path(name)
            label = path.absolute().parent.name if path.name == "export" else path.name
        if not label or label.startswith("."):
            raise ValueError(f"{text}: a name to show is needed: write NAME={name}")
        if label in chosen:
            raise ValueError(f"two checkpoints are called {label}: name them apart with NAME=CHECKPOINT")
        chosen[label] = name
    return chosen


def describe(label: str, name: str, tokenizer: str | None, max_length: int | None, limit: int | None) -> "Subject":
    """What decides a checkpoint's results, its weights unread; raises ValueError for one that will not run."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from swat_lm.data.tokenizer import tokenizer_facts
    from swat_lm.evaluate.harness import check_max_length
    from swat_lm.evaluate.suite import Subject, weights_fingerprint

    folder = find_model_folder(name)
    checkpoint = weights_fingerprint(folder)
    config = AutoConfig.from_pretrained(folder)
    tokens = matching_tokenizer(config, folder, tokenizer)
    if max_length is not None:
        with torch.device("meta"):
            check_max_length(AutoModelForCausalLM.from_config(config), max_length)
    return Subject(label, checkpoint, tokenizer_facts(tokens).fingerprint, max_length, limit)


def run_suite(suite: "Suite", model: "HarnessModel", progress: RunProgress) -> None:
    """Measure what is missing, a line for each finished task."""
    label = suite.subject.label
    for result in suite.run(model, lambda task, done, total: progress.count(f"{label}: {task}", done, total)):
        found = {metric: result.value(metric) for metric in result.metrics}
        values = [f"{metric} {value[0]:.4g}" for metric, value in found.items() if value is not None]
        progress.say(f"{label}: {result.task} done in {clock(result.seconds)}: {', '.join(values)}")


def show(
    rows: "Sequence[TableRow]",
    guess: "TableRow",
    others: "Mapping[str, Mapping[str, TaskResult]]",
    remarks: Sequence[str],
) -> None:
    """Print our results, a column for each checkpoint; the paper's rows; what Table 1 does not show; the notes."""
    from swat_lm.evaluate.figures import figure_text
    from swat_lm.evaluate.table1 import other_metrics

    console = results()
    if any(row.cells for row in rows):
        print_table(ours_table(rows, guess), console)
        print_table(paper_table(), console)
    for label, found in others.items():
        for task, metric, value, error in other_metrics(found):
            rest = "" if error is None else f" +- {figure_text(error, 4)}"
            console.print(f"{label}: {task} {metric} {figure_text(value, 4)}{rest}", markup=False)
    for remark in remarks:
        console.print(f"- {remark}", markup=False)


def ours_table(rows: "Sequence[TableRow]", guess: "TableRow") -> Table:
    """Our rows of Table 1, standing upright, and apart from them what guessing gives."""
    from swat_lm.evaluate.table1 import headings, shown

    columns = [*rows, guess] if guess.cells else rows
    return text_table(
        ["", *(f"| {row.name}" if row is guess else row.name for row in columns)],
        [[heading, *(shown(row.cells.get(heading), "+-") for row in columns)] for heading in headings(rows)],
        title=f"{rows[0].group} | {guess.group}" if guess.cells else rows[0].group,
        left=("",),
    )


def paper_table() -> Table:
    """The paper's rows, both sizes side by side."""
    from swat_lm.evaluate.table1 import PAPER, PRINTED, headings, shown

    cells = {(row.name, row.group): row.cells for row in PAPER}
    names, groups = (list(dict.fromkeys(part)) for part in zip(*cells, strict=True))
    first, *others = headings(PAPER)
    # a bar between the sizes
    bars = [f"| {first}", *others] * (len(groups) - 1)
    rows = [
        [name, *(shown(cells.get((name, group), {}).get(heading), "+-") for group in groups
                 for heading in (first, *others))]
        for name in names
    ]  # fmt: skip
    title = f"\nprinted in the paper, not measured here: {' | '.join(PRINTED)}"
    return text_table(["", first, *others, *bars], rows, title=title, left=("",))
