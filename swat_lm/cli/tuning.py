"""`swat-lm tune`: the fastest tiles of the GPU kernels for a model's attention, measured on this machine."""

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from swat_lm.cli.console import messages, print_table, results, text_table
from swat_lm.cli.failures import INTERRUPTED
from swat_lm.cli.progress import RunProgress
from swat_lm.cli.tuning_plan import (
    DEFAULT_LENGTH,
    Call,
    Described,
    Round,
    check_tiles,
    check_word,
    from_options,
    from_source,
    plan_rounds,
    remarks,
)
from swat_lm.words import counted

if TYPE_CHECKING:
    from swat_lm.ops.triton.autotune import Candidate, Trials

__all__ = ["tune"]

# in a table's column
SHORT = {"backward key, five products": "five products"}


def tune(
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON file of tiles; one that is there is extended.")],
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE|CHECKPOINT|PRESET", help="Whose attention to measure; or describe it by options."
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For a recipe: settings that replace its own.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(min=1, help="Without a source: keys a query sees, itself included.")
    ] = None,
    head_dim: Annotated[int | None, typer.Option(min=1, help="Without a source: size of a head.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Without a source: query heads.")] = None,
    kv_heads: Annotated[
        int | None, typer.Option(min=1, help="Without a source: key/value heads; default as many.")
    ] = None,
    score_function: Annotated[str | None, typer.Option(help="Without a source: sigmoid (default) or softmax.")] = None,
    rotary: Annotated[
        bool | None,
        typer.Option("--rotary/--no-rotary", help="Without a source: whether the kernels rotate; default yes."),
    ] = None,
    packed: Annotated[
        bool | None,
        typer.Option("--packed/--not-packed", help="Documents packed apart; default as a recipe says, otherwise not."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    length: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"Tokens of a sequence; default as trained, without a source {DEFAULT_LENGTH:,} or more."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=65_535, help="Sequences of a call.")] = 1,
    kernels: Annotated[str, typer.Option(help="all, forward or backward.")] = "all",
) -> None:
    """Measure which tiles make the GPU kernels fastest on this machine.

    For every kind of attention in a model, or the one that options describe: some tiles of each kernel, then both forms
    of the backward, about thirty compilations in all. The kernels' own choice is measured first and stays where nothing
    is faster. The file is written after every kernel, so that Ctrl-C keeps what is finished.

    \b
    Examples:
      swat-lm tune runs/mine --out tiles.json
      swat-lm tune own-text --batch 4 --out tiles.json
      swat-lm tune --window 1024 --head-dim 64 --heads 16 --kv-heads 4 --out tiles.json
    """
    from swat_lm.ops.triton.autotune import BACKWARD, check_gpu

    # before anything is read, measured or written
    check_gpu()
    check_word(kernels, "--kernels", ("all", "forward", "backward"))
    check_word(dtype, "--dtype", ("bfloat16", "float16"))
    check_tiles(out)
    described = Described(window, head_dim, heads, kv_heads, score_function, rotary)
    model = from_options(described) if source is None else from_source(source, overrides or [], described)
    import torch

    call = Call(length or model.length, batch, getattr(torch, dtype), model.packed if packed is None else packed)
    rounds = plan_rounds(model.layers, call)
    for note in remarks(rounds, call):
        messages().print(f"note: {note}", markup=False)
    parts = {"forward": ("forward",), "backward": BACKWARD, "all": ("forward", *BACKWARD)}
    run_rounds(rounds, call, parts[kernels], out)


def run_rounds(rounds: list[Round], call: Call, kernels: tuple[str, ...], out: Path) -> None:
    """Measure, and show what was found, also what was found before an error or an interruption."""
    from swat_lm.ops.triton import autotune

    watches: list[Watch] = []
    interrupted = False
    try:
        with RunProgress() as progress:
            for attention, problem, _ in rounds:
                watches.append(Watch(attention.name, progress))
                heads, bias = attention.num_heads, attention.score_bias
                calls = autotune.call_for(problem, call.length, heads, call.batch, bias, call.packed)
                autotune.tune(calls, problem, kernels, out, report=watches[-1])
    except KeyboardInterrupt:
        interrupted = True
    finally:
        found = [(measured, watch.finished) for measured, watch in zip(rounds, watches, strict=False) if watch.finished]
        show(found, call, out)
    if interrupted:
        kept = f"{out} holds what is shown" if found else "no kernel was finished, so nothing was written"
        messages().print(f"{kept}; the same command begins anew", markup=False)
        raise typer.Exit(INTERRUPTED)


class Watch:
    """Shows the trials of one kind of attention as they are measured, and keeps those of finished kernels."""

    def __init__(self, name: str, progress: RunProgress) -> None:
        self.finished: list[Trials] = []
        self._name = name
        self._progress = progress
        self._began = 0.0

    def __call__(self, trials: "Trials") -> None:
        """Take what was measured so far of one kernel."""
        done, total = len(trials.times), len(trials.candidates)
        if not done:
            self._began = time.monotonic()
        left = (time.monotonic() - self._began) / done * (total - done) if done else None
        numbers = f"{done}/{total}"
        if trials.best is not None:
            numbers += f"  best {milliseconds(trials.times[trials.best])} ms, {in_short(trials.best)}"
        self._progress.count(f"{self._name}: {SHORT.get(trials.kernel, trials.kernel)}", done, total, numbers, left)
        if done == total and trials.best is not None:
            self.finished.append(trials)


def show(found: "list[tuple[Round, list[Trials]]]", call: Call, out: Path) -> None:
    """Print a table for each kind of attention, and how to use the file."""
    console = results()
    for (attention, _, layers), finished in found:
        shared = "" if attention.num_heads == attention.num_kv_heads else f" over {attention.num_kv_heads}"
        console.print(
            f"{attention.name}, {counted(attention.num_heads, 'head')}{shared} of {attention.head_dim}, "
            f"{counted(len(layers), 'layer')}; {call.batch} x {counted(call.length, 'token')}"
            f"{', packed' * call.packed}, "
            f"{str(call.dtype).removeprefix('torch.')}",
            markup=False,
        )
        print_table(tiles_table(finished), console)
    if found:
        console.print("a tile: rows x keys, warps, stages, registers at most; ms of a whole forward or backward")
        console.print(f"export SWAT_LM_TILES={shlex.quote(str(out.absolute()))}", markup=False)


def tiles_table(finished: "list[Trials]") -> Table:
    """One row per kernel: its own choice, the fastest, and how many times faster that is."""
    rows = []
    for trials in finished:
        assert trials.best is not None
        first, best = trials.times[trials.candidates[0]], trials.times[trials.best]
        assert best is not None
        rows.append([
            SHORT.get(trials.kernel, trials.kernel), in_short(trials.candidates[0]), milliseconds(first),
            in_short(trials.best), milliseconds(best), "-" if first is None else f"{first / best:.2f} x",
        ])  # fmt: skip
    headings = ("kernel", "without the file", "ms", "fastest", "ms", "gain")
    return text_table(headings, rows, left=("kernel", "without the file", "fastest"), gap=2)


def in_short(candidate: "Candidate") -> str:
    """`64x128 w8 s2 r168`: rows, keys, warps, stages and, where they are limited, registers; a form by its name."""
    if isinstance(candidate, str):
        return candidate
    most = "" if candidate.registers is None else f" r{candidate.registers}"
    return f"{candidate.rows}x{candidate.keys} w{candidate.warps} s{candidate.stages}{most}"


def milliseconds(value: float | None) -> str:
    """Four digits, or a dash for what does not fit the GPU."""
    return "-" if value is None else f"{value:.4g}"
