"""`swat-lm evaluate length`: loss against the length of the context."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from swat_lm.cli.checkpoints import behind_window, load_any_checkpoint
from swat_lm.cli.console import messages, print_table, results, text_table
from swat_lm.cli.evaluation_text import read_documents
from swat_lm.cli.options import (
    CHECKPOINT,
    DEVICE,
    HELD_OUT,
    NO_WINDOW,
    OWN_WINDOW,
    TEXT_FIELD,
    TOKENIZER,
    parse_windows,
    whole_numbers,
)
from swat_lm.cli.outputs import check_folder
from swat_lm.cli.progress import counting
from swat_lm.words import counted

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

    from swat_lm.evaluate.curves import LengthCurve, WindowMatrix
    from swat_lm.evaluate.partial import PartialResults

__all__ = ["length"]


def length(
    checkpoint: CHECKPOINT,
    data: Annotated[list[str], typer.Option("--data", "-d", help="Text to evaluate on; may be given several times.")],
    lengths: Annotated[
        str, typer.Option(help="Evaluation lengths in tokens, by commas.")
    ] = "128,256,512,1024,2048,4096",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="New folder for the JSON and the picture.")] = None,
    whole: Annotated[
        bool, typer.Option("--whole-documents", help="Read each document from its start, instead of joining them.")
    ] = False,
    held_out: HELD_OUT = None,
    most: Annotated[int, typer.Option(min=1, help="Most streams to read, spread over the text.")] = 64,
    window: Annotated[
        str, typer.Option(help="Window of every layer: a number, none or own; several by commas give a heat map.")
    ] = OWN_WINDOW,
    sinks: Annotated[
        int | None,
        typer.Option(
            min=0, help="Keep so many first tokens of each stream beside the window; default the model's own."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Streams read side by side.")] = 8,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens per forward pass; speed and memory only.")] = 512,
    text_field: TEXT_FIELD = "text",
    tokenizer: TOKENIZER = None,
    device: DEVICE = None,
) -> None:
    """Measure loss against the length of the context, of any causal language model.

    Streams are read in chunks, in constant memory where the model's state is constant. For each length N: the mean
    loss of the first N tokens of a stream, with its perplexity per token, and the loss of tokens N/2+1 .. N, where the
    context is about N long; with standard errors over streams. Documents are joined and cut into streams of the
    greatest length, unless --whole-documents. An interrupted measurement with --out goes on where it was.

    Documents that a run was trained on are recognised by their content, wherever they lie, and left out, unless
    --held-out 0: of its own text what it held out is read.

    --window runs the same weights with another window: a number of tokens, none (full attention) or own (as trained).
    That works for our models and those that `swat-lm convert` takes. Several windows give the matrix of Figure 2 of
    the paper. --sinks keeps first tokens beside the window, as StreamingLLM does, without training.

    \b
    Examples:
      swat-lm evaluate length demo/swat --data python:stdlib --lengths 256,1024,4096
      swat-lm evaluate length runs/mine --data books/ --whole-documents --lengths 1024,16384,131072 --out books-length
      swat-lm evaluate length llama-folder --data books/ --window 64,128,256,none --out windows
      swat-lm evaluate length llama-folder --data books/ --window 128 --sinks 4 --out kept
    """
    sizes, windows = whole_numbers(lengths, "--lengths", 2, "256,1024"), parse_windows(window)
    if sinks and NO_WINDOW in windows:
        raise ValueError(
            f"--sinks: first tokens are kept beside a window: give a number of tokens with --window, not {window}"
        )
    check_output(out, "length.json", "windows.json")
    from swat_lm.data.tokenizer import tokenizer_facts
    from swat_lm.evaluate.curves import WindowMatrix, with_bytes
    from swat_lm.evaluate.limits import check_length, extrapolates_beyond
    from swat_lm.evaluate.streaming_model import streaming_model

    model, tokens = load_any_checkpoint(checkpoint, tokenizer, device)
    twins = {name: behind_window(model, name, sinks) for name in windows}
    documents = read_documents(checkpoint, data, tokenizer, text_field, held_out, model)
    streams = choose_streams(documents, sizes, whole, most)
    made_for = max((limit for twin in twins.values() if (limit := extrapolates_beyond(twin))), default=None)
    if made_for is not None and max(sizes) > made_for:
        messages().print(f"note: this model was made for {counted(made_for, 'token')}; positions beyond are new to it")
    # what a model cannot hold is said before the first one is measured
    for twin in twins.values():
        check_length(streaming_model(twin), max(sizes), min(batch_size, len(streams)))
    found, partials = measure_behind_windows(twins, streams, sizes, out, batch_size, chunk)
    counts = tokenizer_facts(tokens).token_bytes
    curves = [with_bytes(curve, streams, counts) for curve in found]
    matrix = WindowMatrix(tuple(windows), tuple(curves))
    is_matrix = len(windows) > 1
    name = "windows" if is_matrix else "length"
    if out is not None:
        # what was measured is kept before anything is drawn
        (matrix if is_matrix else curves[0]).save(out / f"{name}.json")
        for partial in partials:
            partial.remove()
    for behind, curve in zip(windows, curves, strict=True):
        if is_matrix:
            results().print(f"window {behind}", markup=False)
        print_table(curve_table(curve))
    if out is not None:
        kept = curves[0].num_sinks
        title = Path(checkpoint).name + (f", window {window} and the first {counted(kept, 'token')}" if kept else "")
        picture = out / f"{name}.png"
        draw_matrix(matrix, picture, title) if is_matrix else draw_curve(curves[0], picture, title)
        results().print(f"{out / name}.json, {picture}", markup=False)


def check_output(out: Path | None, *names: str) -> None:
    """Raise OSError before any work is done if the results are there already, or could not be written there."""
    if out is None:
        return
    check_folder(out, "--out")
    for name in names:
        if (out / name).exists():
            raise FileExistsError(f"{out} already holds {name}: name another folder for --out, or remove it")


def measure_behind_windows(
    models: Mapping[str, "PreTrainedModel"],
    streams: "list[np.ndarray]",
    sizes: list[int],
    out: Path | None,
    batch_size: int,
    chunk: int,
) -> "tuple[list[LengthCurve], list[PartialResults]]":
    """Loss by length of models by the names of their windows.

    What is done is kept in `out`; the second list is to be removed when the results are there.
    """
    from swat_lm.evaluate.length import loss_by_length
    from swat_lm.evaluate.partial import PartialResults, measurement_key

    curves, partials = [], []
    for name, model in models.items():
        if out is not None:
            partials.append(PartialResults(out / f"partial-{name}.json", measurement_key(model, streams, sizes)))
        with counting(f"evaluating, window {name}", "tokens") as counter:
            curves.append(loss_by_length(
                model, streams, sizes, chunk=chunk, batch_size=batch_size,
                partial=partials[-1] if partials else None, on_progress=counter,
            ))  # fmt: skip
    return curves, partials


def choose_streams(documents: "list[np.ndarray]", sizes: list[int], whole: bool, most: int) -> "list[np.ndarray]":
    """Streams of the greatest length cut from the joined documents, or the documents as they are; at most `most`.

    Of whole documents those that reach the greatest length come first, then those that reach any, each spread over the
    text: short ones would else crowd them out.
    """
    from swat_lm.evaluate.length import segments

    if not whole:
        return segments(documents, max(sizes), most)
    long = [index for index, document in enumerate(documents) if len(document) >= max(sizes)]
    other = [index for index, document in enumerate(documents) if min(sizes) <= len(document) < max(sizes)]
    chosen = spread(long, most)
    chosen += spread(other, most - len(chosen))
    # with nothing of use all are handed on, so that the measurement says what they lack
    return [documents[index] for index in sorted(chosen)] or documents


def spread(indices: list[int], most: int) -> list[int]:
    """At most so many of the indices, evenly spread."""
    count = len(indices)
    return indices if count <= most else [indices[i * count // most] for i in range(most)]


def curve_table(curve: "LengthCurve") -> Table:
    """The curve as a table of text."""
    from swat_lm.evaluate.figures import figure_text, perplexity

    bits = ["bits per byte"] if any(point.bits_per_byte is not None for point in curve.points) else []
    headings = (
        "length", "loss, first N tokens", "perplexity", *bits, "loss, tokens N/2+1..N", "streams", "state bytes",
    )  # fmt: skip
    rows = [
        [
            f"{point.length:,}",
            with_error(point.mean_loss, point.mean_loss_error),
            figure_text(perplexity(point.mean_loss), 2),
            *("-" if point.bits_per_byte is None else f"{point.bits_per_byte:,.3f}" for _ in bits),
            with_error(point.tail_loss, point.tail_loss_error),
            f"{point.num_documents}",
            f"{point.state_bytes:,}",
        ]
        for point in curve.points
    ]
    return text_table(headings, rows)


def with_error(value: float, error: float | None, form: str = ".4f") -> str:
    """3.2104 +- 0.0123."""
    return f"{value:{form}}" if error is None else f"{value:{form}} +- {error:{form}}"


def draw_curve(curve: "LengthCurve", path: Path, title: str) -> None:
    """Draw one curve of all tokens and one of the later half."""
    from swat_lm.evaluate.plots import Series, plot_loss_by_length

    series = [
        Series("first N tokens", curve.lengths, [p.mean_loss for p in curve.points],
               [p.mean_loss_error for p in curve.points]),
        Series("tokens N/2+1 .. N", curve.lengths, [p.tail_loss for p in curve.points],
               [p.tail_loss_error for p in curve.points]),
    ]  # fmt: skip
    plot_loss_by_length(series, path, window=curve.window, title=title)


def draw_matrix(matrix: "WindowMatrix", path: Path, title: str) -> None:
    """Draw a heat map of windows and lengths."""
    from swat_lm.evaluate.heatmaps import plot_heat_map
    from swat_lm.evaluate.plots import short_number

    plot_heat_map(
        matrix.losses(), path, rows=matrix.names, columns=[short_number(length) for length in matrix.lengths],
        ylabel="evaluation window (tokens)", xlabel="evaluation length (tokens)", scale="loss (nats per token)",
        title=title,
    )  # fmt: skip
