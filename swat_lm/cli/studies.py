"""`swat-lm study`: variants of one recipe over the same seeds, and how far apart they are."""

from pathlib import Path
from typing import Annotated

import typer

from swat_lm.cli.console import key_value_table, results
from swat_lm.cli.demonstration import watching
from swat_lm.cli.outputs import check_folder
from swat_lm.cli.reproduction import check_texts, parse_seeds, show_outcome, show_plan

__all__ = ["study"]


def study(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="One of ours, or a YAML file; leave out to list ours.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for everything; default: studies/NAME.")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="Train on this instead of the recipe's text; repeatable.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds of the runs, by commas; default: the study's.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny models: does everything work?")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the runs: parameters, FLOPs.")] = False,
) -> None:
    """Compare variants of one recipe over the same text and seeds.

    Each run leaves one JSON record in OUT/records with its recipe and losses. A run whose record is there is not run
    again, wherever the record was made, and the same command continues after an interruption. Writes NAME.html and
    NAME.json: losses, differences from the baseline with standard errors, paired by text and seed, and plots.

    \b
    Examples:
      swat-lm study
      swat-lm study windows --text notes/ --out studies/windows
      swat-lm study mine.yaml --quick
    """
    from swat_lm.papers.studies import load_study, study_names, study_summary

    if name is None:
        results().print(key_value_table([(known, study_summary(known)) for known in study_names()]))
        return
    chosen = load_study(name)
    numbers = list(chosen.spec.seeds) if seeds is None else parse_seeds(seeds)
    folder, scale = out or Path("studies", chosen.name), "quick" if quick else "full"
    check_folder(folder, "--out")
    if dry_run:
        check_texts(chosen, None, text or [])
        show_plan(chosen.key, scale, len(numbers))
        return
    results().print("importing torch and transformers ...", style="dim")
    from swat_lm.papers.reproduction import Sources, reproduce

    sources = Sources(tuple(text or chosen.load((), scale).data.sources), (), "hub")
    with watching() as watcher:
        outcome = reproduce(chosen.key, scale, sources, folder, numbers, watcher)
    show_outcome(outcome, folder)
