"""`swat-lm reproduce`: a table or figure of a paper, trained, measured and judged."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swat_lm.cli.console import print_table, results, text_table
from swat_lm.cli.demonstration import watching
from swat_lm.cli.options import whole_numbers
from swat_lm.cli.outputs import check_folder
from swat_lm.words import counted, lasting

if TYPE_CHECKING:
    from swat_lm.papers.experiment import Experiment

__all__ = ["reproduce"]


def reproduce(
    experiment: Annotated[
        str,
        typer.Argument(
            help="table1 to table3, figure2, figure3, figure5; spade; taipan, taipan-capacity; ecp; longvq."
        ),
    ],
    scale: Annotated[str, typer.Option(help="tiny (two cores), small (one GPU) or paper (a cluster, by torchrun).")],
    data: Annotated[
        Path | None, typer.Option("--data", "-d", help="Folder with corpus/, books/ and the benchmarks' files.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for everything; shared by experiments of one scale.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of the runs, by commas.")] = "0",
    text: Annotated[list[str] | None, typer.Option(help="Train on this instead of corpus/; repeatable.")] = None,
    books: Annotated[list[str] | None, typer.Option(help="Evaluate on these instead of books/; repeatable.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Benchmarks' folder, or `hub`; default: --data.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Instead of one trained on the text (paper: instead of the paper's).")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show the runs: parameters, FLOPs, GPU hours.")
    ] = False,
) -> None:
    """Train, measure and judge what a table or figure of a paper compares.

    Runs that are finished are not run again, and a variant that two experiments need is trained once, so the same
    command continues after an interruption. Writes one page, NAME.html, and NAME.json beside it, with our numbers
    beside the paper's and a verdict for each of its claims.

    \b
    Examples:
      swat-lm reproduce table3 --scale tiny --data data/ --out tiny --seeds 0,1
      swat-lm reproduce table2 --scale paper --dry-run
      swat-lm reproduce taipan --scale tiny --data data/ --out taipan --seeds 0,1
      torchrun --nproc-per-node 8 -m swat_lm.cli reproduce table3 --scale paper --books books/ --out paper
    """
    from swat_lm.papers import find_experiment
    from swat_lm.papers.scales import find_scale

    chosen = find_experiment(experiment)
    size = find_scale(scale, chosen.scales)
    numbers = parse_seeds(seeds)
    if out is not None:
        check_folder(out, "--out")
    if dry_run:
        check_texts(chosen, data, [*(text or []), *(books or [])])
        show_plan(experiment, scale, len(numbers))
        return
    if out is None:
        raise ValueError("--out: name the folder for models and results")
    results().print("importing torch and transformers ...", style="dim")
    from swat_lm.papers.reproduction import Sources, sources_from_folder
    from swat_lm.papers.reproduction import reproduce as run_experiment

    offered = chosen.budget(size).source
    source = text or ([offered] if data is None and offered else None)
    if data is None and source is None:
        raise ValueError(f"--scale {scale} needs text: give --data FOLDER, or --text and --books")
    is_named = text and (books or "books" not in chosen.texts)
    found = Sources((), (), "hub") if data is None else (
        Sources((), (), str(data)) if is_named else sources_from_folder(data, chosen)
    )  # fmt: skip
    sources = Sources(
        text=tuple(source or found.text),
        books=tuple(books or found.books),
        tasks=tasks or found.tasks,
        tokenizer=tokenizer,
    )
    with watching() as watcher:
        outcome = run_experiment(experiment, scale, sources, out, numbers, watcher)
    show_outcome(outcome, out)


def parse_seeds(text: str) -> list[int]:
    """`0,1` as numbers; raises ValueError for anything else."""
    return whole_numbers(text, "--seeds", 0, "0,1", different=True)


def check_texts(experiment: "Experiment", data: Path | None, named: list[str]) -> None:
    """Raise ValueError for texts that were given and are not there."""
    from swat_lm.data import resolve_sources
    from swat_lm.papers.reproduction import sources_from_folder

    resolve_sources(named)
    if data is not None and not named:
        sources_from_folder(data, experiment)


def show_plan(experiment: str, scale: str, num_seeds: int) -> None:
    """The runs of an experiment without running them."""
    from swat_lm.papers.reproduction import plan_without_running

    headings = ("variant", "parameters", "length", "steps", "rows a step", "tokens", "FLOPs", "A800 time")
    rows = plan_without_running(experiment, scale)
    cells = [
        [
            row["label"],
            "?" if row["remark"] else f"{row['parameters']:,}",
            *(f"{row[name]:,}" for name in ("length", "steps", "rows_per_step", "tokens")),
            "?" if row["remark"] else f"{row['flops']:.2e}{'' if row['flops_by'] == 'formula' else ' *'}",
            "?" if row["remark"] else lasting(3600 * row["gpu_hours"]),
        ]
        for row in rows
    ]
    console = results()
    print_table(text_table(headings, cells, left=("variant",)), console)
    total = num_seeds * sum(row.get("gpu_hours", 0.0) for row in rows)
    runs, of = counted(len(rows), "run"), counted(num_seeds, "seed")
    console.print(
        f"\n{runs} a seed, {of}: {lasting(3600 * total)} of one A800 at 40 % of 312 TFLOP/s (evaluation apart)",
        markup=False,
    )
    if any(row.get("flops_by", "formula") != "formula" for row in rows):
        console.print("* estimate: 6 x parameters without the input embedding", style="dim", markup=False)
    for remark in sorted({row["remark"] for row in rows if row["remark"]}):
        console.print(remark, markup=False)


def show_outcome(outcome: dict[str, Any], out: Path) -> None:
    """The verdicts and where to look."""
    console = results()
    console.print()
    colours = {"held": "green", "broken": "red"}
    for claim in outcome["claims"]:
        error = "" if claim["error"] is None else f" +- {claim['error']:.3f}"
        numbers = "" if claim["gap"] is None else f" (gap {claim['gap']:+.3f}{error})"
        colour = colours.get(claim["outcome"], "yellow")
        console.print(f"[{colour}]{claim['outcome']}[/{colour}]: {claim['says']}{numbers}", highlight=False)
    console.print(f"\npage: {(out / outcome['experiment']).with_suffix('.html').resolve()}", markup=False)
