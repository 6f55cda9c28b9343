"""`swat-lm report`: runs side by side on one page."""

from pathlib import Path
from typing import Annotated

import typer

from swat_lm.cli.console import results
from swat_lm.cli.options import split_name
from swat_lm.cli.outputs import check_folder
from swat_lm.paths import local_path

__all__ = ["report"]


def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Runs' folders; NAME=FOLDER names one.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for report.html, report.json and the pictures.")],
) -> None:
    """Compare runs on one page.

    Training and held-out loss, loss against length and recall where they were measured, the state that a stream keeps,
    and speed. Pictures lie beside the page as PNG files. What was not measured is named with the command for it.

    \b
    Example:
      swat-lm report runs/swat full=runs/transformer --out comparison
    """
    check_folder(out, "--out")
    from swat_lm.papers.run_report import read_run, write_run_report

    found = []
    for name, place in map(split_name, runs):
        folder = local_path(place)
        if not folder.is_dir():
            raise ValueError(f"no folder {folder}: expected a run's folder, as `swat-lm train` writes it")
        found.append(read_run(folder, name))
    written = write_run_report(found, out)
    console = results()
    for line in written["not_measured"]:
        console.print(f"not measured: {line}", markup=False, style="dim")
    console.print(f"report: {(out / 'report.html').resolve()}", markup=False)
