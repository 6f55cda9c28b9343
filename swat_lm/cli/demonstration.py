"""`swat-lm demo`: train a few small models, compare them, and stream from the first."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swat_lm.cli.console import messages, on_main_process, print_table, results, text_table
from swat_lm.cli.failures import INTERRUPTED
from swat_lm.cli.generation import write
from swat_lm.cli.progress import RunProgress

if TYPE_CHECKING:
    from swat_lm.papers.watching import Watcher
    from swat_lm.train.events import Event

__all__ = ["demo", "watching"]


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for everything; continued if begun before.")] = Path(
        "demo"
    ),
    minutes: Annotated[
        float | None,
        typer.Option(
            help="Most minutes on this machine; a slow one trains fewer steps.", show_default="6; with --all 10"
        ),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Also a softmax window, and full attention with ALiBi.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny model: does everything work?")] = False,
    source: Annotated[
        list[str] | None, typer.Option(help="Train on this text instead of Python's own library; repeatable.")
    ] = None,
    prompt: Annotated[str, typer.Option(help="What the generated text begins with.")] = "def main(",
) -> None:
    """Train a small SWAT model beside one with the paper's slopes and full attention, and compare.

    All have one size and one budget, each its best learning rate, and are evaluated far beyond the length they were
    trained on. Uses text that every
    machine has: Python's own library. Needs no network and no compiler. Everything lands in one
    folder: models, recipes, metrics, results.json, and report.html with the plots. Run it again to continue after an
    interruption.

    \b
    Examples:
      swat-lm demo
      swat-lm demo --all --out demo-all
      swat-lm demo --out mine --source notes/ --prompt 'Today'
    """
    if not prompt:
        raise ValueError("--prompt: expected some text, got none")
    results().print("importing torch and transformers ...", style="dim")
    from swat_lm.papers.demo.run import DemoSettings, run_demo

    settings = DemoSettings(
        minutes=(10.0 if everything else 6.0) if minutes is None else minutes, quick=quick,
        sources=tuple(source) if source else ("python:stdlib",), prompt=prompt, all=everything,
    )  # fmt: skip
    with watching() as watcher:
        found = run_demo(out, settings, watcher)
    show_results(found, out)


@contextmanager
def watching() -> "Iterator[Watcher]":
    """A watcher that draws; an interruption that saved ends the command with a sentence."""
    from swat_lm.papers.watching import InterruptedRunError, Watcher

    class TerminalWatcher(Watcher):
        """Stages as lines, counts and runs as bars, generated text as it comes."""

        def __init__(self) -> None:
            self._console = results()
            self._progress = RunProgress()

        def stage(self, text: str) -> None:
            self.close()
            self._console.print(f"[bold]{text}[/bold]")

        def count(self, name: str, done: int, total: int) -> None:
            self._progress.count(name, done, total)

        def event(self, name: str, event: "Event") -> None:
            self._progress.event(name, event)

        def text(self, text: str) -> None:
            if on_main_process():
                write(text)

        def state(self, first: int, last: int, tokens: int) -> None:
            same = "constant" if first == last else "not constant"
            self._console.print(
                f"[bold]state: {first:,} bytes at the first token, {last:,} at the last ({same})[/bold]"
            )

        def close(self) -> None:
            self._progress.__exit__()
            self._progress = RunProgress()

    watcher = TerminalWatcher()
    try:
        yield watcher
    except InterruptedRunError as stopped:
        messages().print(f"{stopped}; the same command continues", markup=False)
        raise typer.Exit(INTERRUPTED) from None
    finally:
        watcher.close()


def show_results(found: dict[str, Any], out: Path) -> None:
    """The table, the verdicts and where to look."""
    console = results()
    models = list(found["models"].values())
    swat, twin = found["models"]["swat"], found["models"]["twin"]
    headings = ("length", *(model["short"] for model in models), "SWAT state", "full state")
    rows = [
        [
            f"{point['length']:,}{' *' if point['length'] == found['training_length'] else ''}",
            *(f"{model['curve'][at]['mean_loss']:.3f}" for model in models),
            *(f"{model['curve'][at]['state_bytes']:,}" for model in (swat, twin)),
        ]
        for at, point in enumerate(swat["curve"])
    ]
    console.print()
    print_table(text_table(headings, rows, title="loss against evaluation length (nats per token)"), console)
    console.print("* training length; states in bytes per stream", style="dim")
    console.print()
    for claim in found["claims"]:
        verdict = "[green]held[/green]" if claim["held"] else "[red]did not hold[/red]"
        console.print(f"{verdict}: {claim['claim']} ({claim['numbers']})")
    console.print(f"\nreport: {(out / 'report.html').resolve()}", markup=False)
