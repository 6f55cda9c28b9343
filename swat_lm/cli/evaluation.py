"""`swat-lm evaluate length`: loss against the length of the context."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from swat_lm.cli.checkpoints import load_any_checkpoint
from swat_lm.cli.console import messages, print_table, results, text_table
from swat_lm.cli.outputs import check_folder
from swat_lm.cli.progress import counting
from swat_lm.cli.texts import HELD_OUT, read_documents
from swat_lm.words import counted

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from swat_lm.evaluate.curves import LengthCurve, WindowMatrix
    from swat_lm.evaluate.partial import PartialResults

__all__ = ["length"]

OWN, NONE = "own", "none"
DEFAULT_LENGTHS = "128,256,512,1024,2048,4096"


def length(
    checkpoint: Annotated[str, typer.Argument(help="A run's folder, a folder of any causal model, or a hub name.")],
    data: Annotated[list[str], typer.Option("--data", "-d", help="Text to evaluate on; may be given several times.")],
    lengths: Annotated[str, typer.Option(help="Evaluation lengths in tokens, by commas.")] = DEFAULT_LENGTHS,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="New folder for the JSON and the picture.")] = None,
    whole: Annotated[
        bool, typer.Option("--whole-documents", help="Read each document from its start, instead of joining them.")
    ] = False,
    held_out: HELD_OUT = None,
    most: Annotated[int, typer.Option(min=1, help="Most streams to read, spread over the text.")] = 64,
    window: Annotated[
        str, typer.Option(help="Window of every layer: a number, none or own; several by commas give a heat map.")
    ] = OWN,
    sinks: Annotated[
        int, typer.Option(min=0, help="Keep so many first tokens of each stream beside --window, untrained.")
    ] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Streams read side by side.")] = 8,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens per forward pass; speed and memory only.")] = 512,
    text_field: Annotated[
        str, typer.Option(help="Field of a .jsonl, .parquet or hub row that holds the text.")
    ] = "text",
    tokenizer: Annotated[str | None, typer.Option(help="Another tokenizer than the checkpoint's own.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: a GPU if there is one.")] = None,
) -> None:
    """Measure loss against the length of the context, of any causal language model.

    Streams are read in chunks, in constant memory where the model's state is constant. For each length N: the mean
    loss of the first N tokens of a stream, with its perplexity per token, and the loss of tokens N/2+1 .. N, where the
    context is about N long; with standard errors over streams. Documents are joined and cut into streams of the
    greatest length, unless --whole-documents. An interrupted measurement with --out goes on where it was.

    Documents that a run was trained on are recognised by their content, wherever they lie, and left out, unless
    --held-out 0: of its own text what it held out is read.

    --window runs the same weights with another window: a number of tokens, none (full attention) or own (as trained).
    That works for our models, Llama and Mistral. Several windows give the matrix of Figure 2 of the paper. --sinks
    keeps first tokens beside the window, as StreamingLLM does; for softmax models that were trained without.

    \b
    Examples:
      swat-lm evaluate length demo/swat --data python:stdlib --lengths 256,1024,4096
      swat-lm evaluate length runs/mine --data books/ --whole-documents --lengths 1024,16384,131072 --out books-length
      swat-lm evaluate length llama-folder --data books/ --window 64,128,256,none --out windows
      swat-lm evaluate length llama-folder --data books/ --window 128 --sinks 4 --out kept
    """
    sizes, windows = parse_lengths(lengths), parse_windows(window)
    if sinks and not all(name.isdigit() for name in windows):
        raise ValueError(
            f"--sinks: sinks are kept beside a window: give a number of tokens with --window, not {window}"
        )
    check_output(out, "length.json", "windows.json")
    from swat_lm.evaluate.curves import WindowMatrix, with_bytes
    from swat_lm.evaluate.length import reader_behind
    from swat_lm.evaluate.limits import extrapolates_beyond

    model, tokens = load_any_checkpoint(checkpoint, tokenizer, device)
    twins = {name: model if sinks else model_with_window(model, name) for name in windows}
    if sinks:
        # a model that cannot keep them is refused before any text is read
        reader_behind(model, int(windows[0]), sinks)
    documents = read_documents(checkpoint, data, tokenizer, text_field, held_out, model)
    streams = choose_streams(documents, sizes, whole, most)
    made_for = extrapolates_beyond(model)
    # sinks count positions within what is kept
    if made_for is not None and max(sizes) > made_for and not sinks:
        messages().print(f"note: this model was made for {counted(made_for, 'token')}; positions beyond are new to it")
    measure = Measurement(streams, sizes, batch_size, chunk, out, sinks)
    # what a model cannot hold is said before the first one is measured
    for twin in twins.values() if not sinks else ():
        measure.check(twin)
    counts = bytes_of_tokens(tokens)
    curves = [with_bytes(measure(twin, name), streams, counts) for name, twin in twins.items()]
    matrix = WindowMatrix(tuple(windows), tuple(curves))
    if out is not None:
        # what was measured is kept before anything is drawn
        out.mkdir(parents=True, exist_ok=True)
        if len(windows) > 1:
            matrix.save(out / "windows.json")
        else:
            curves[0].save(out / "length.json")
        measure.finish()
    for name, curve in zip(windows, curves, strict=True):
        if len(windows) > 1:
            results().print(f"window {name}", markup=False)
        print_table(curve_table(curve))
    if out is not None:
        title = Path(checkpoint).name + (f", window {window} and the first {counted(sinks, 'token')}" if sinks else "")
        if len(windows) > 1:
            draw_matrix(matrix, out, title)
        else:
            draw_curve(curves[0], out, title)


def bytes_of_tokens(tokens: "PreTrainedTokenizerFast") -> "np.ndarray | None":
    """UTF-8 bytes behind each token id; None if the tokenizer does not let them be counted."""
    from swat_lm.data.tokenizer import tokenizer_facts

    return tokenizer_facts(tokens).token_bytes


def parse_lengths(text: str) -> list[int]:
    """`128,256` as numbers; raises ValueError for anything else."""
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"--lengths: expected whole numbers with commas between, such as 256,1024; got {text!r}"
        ) from None
    if min(sizes) < 2:
        raise ValueError(f"--lengths: expected at least 2 tokens each; got {min(sizes)}")
    return sizes


def parse_windows(text: str) -> list[str]:
    """`64,none` as names of windows, each once; raises ValueError for anything else."""
    names = list(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name not in (OWN, NONE) and not (name.isdigit() and int(name) >= 1):
            raise ValueError(
                f"--window: expected numbers of at least 1, `{NONE}` or `{OWN}`, with commas between; got {text!r}"
            )
    return names


def check_output(out: Path | None, *names: str) -> None:
    """Raise OSError before any work is done if the results are there already, or could not be written there."""
    if out is None:
        return
    check_folder(out, "--out")
    for name in names:
        if (out / name).exists():
            raise FileExistsError(f"{out} already holds {name}: name another folder for --out, or remove it")


def model_with_window(model: "PreTrainedModel", name: str) -> "PreTrainedModel":
    """The model itself or a twin that shares its weights."""
    from swat_lm.evaluate.windows import with_window

    return model if name == OWN else with_window(model, None if name == NONE else int(name))


class Measurement:
    """One command's streams and lengths, measured for one window after another, keeping what is done in `out`."""

    def __init__(
        self,
        streams: "list[np.ndarray]",
        sizes: list[int],
        batch_size: int,
        chunk: int,
        out: Path | None,
        num_sinks: int = 0,
    ) -> None:
        self.streams, self.sizes, self.batch_size, self.chunk, self.out = streams, sizes, batch_size, chunk, out
        self.num_sinks = num_sinks
        self.partials: list[PartialResults] = []

    def check(self, model: "PreTrainedModel") -> None:
        """Raise ValueError for streams that the model cannot hold."""
        from swat_lm.evaluate.limits import check_length
        from swat_lm.evaluate.reader import reader_for

        check_length(reader_for(model), max(self.sizes), min(self.batch_size, len(self.streams)))

    def __call__(self, model: "PreTrainedModel", name: str) -> "LengthCurve":
        """Loss by length of a model, whose window has this name, or will have with sinks beside it."""
        from swat_lm.evaluate.length import loss_by_length
        from swat_lm.evaluate.partial import PartialResults, measurement_key

        partial = None
        if self.out is not None:
            sinks = ["window", name, "sinks", self.num_sinks] if self.num_sinks else []
            key = measurement_key(model, self.streams, [*self.sizes, *sinks])
            partial = PartialResults(self.out / f"partial-{name}.json", key)
            self.partials.append(partial)
        with counting(f"evaluating, window {name}", "tokens") as counter:
            return loss_by_length(
                model, self.streams, self.sizes, chunk=self.chunk, batch_size=self.batch_size,
                window=int(name) if self.num_sinks else None, num_sinks=self.num_sinks, partial=partial,
                on_progress=counter,
            )  # fmt: skip

    def finish(self) -> None:
        """The results are written: what was kept of them on the way is removed."""
        for partial in self.partials:
            partial.remove()


def choose_streams(documents: "list[np.ndarray]", sizes: list[int], whole: bool, most: int) -> "list[np.ndarray]":
    """Streams of the greatest length cut from the joined documents, or the documents as they are; at most `most`.

    Of whole documents those that reach the greatest length come first, then those that reach any, each spread over the
    text: short ones would else crowd them out.
    """
    from swat_lm.evaluate.length import segments

    if not whole:
        return segments(documents, max(sizes), most)
    long = [index for index, one in enumerate(documents) if len(one) >= max(sizes)]
    other = [index for index, one in enumerate(documents) if min(sizes) <= len(one) < max(sizes)]
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


def draw_curve(curve: "LengthCurve", out: Path, name: str) -> None:
    """Draw length.png into the folder."""
    from swat_lm.evaluate.plots import Series, plot_loss_by_length

    series = [
        Series("first N tokens", curve.lengths, [p.mean_loss for p in curve.points],
               [p.mean_loss_error for p in curve.points]),
        Series("tokens N/2+1 .. N", curve.lengths, [p.tail_loss for p in curve.points],
               [p.tail_loss_error for p in curve.points]),
    ]  # fmt: skip
    plot_loss_by_length(series, out / "length.png", window=curve.window, title=name)
    results().print(f"{out / 'length.json'}, {out / 'length.png'}", markup=False)


def draw_matrix(matrix: "WindowMatrix", out: Path, name: str) -> None:
    """Draw windows.png into the folder."""
    from swat_lm.evaluate.heatmaps import plot_heat_map
    from swat_lm.evaluate.plots import short_number

    plot_heat_map(
        matrix.losses(), out / "windows.png", rows=matrix.names, columns=[short_number(one) for one in matrix.lengths],
        ylabel="evaluation window (tokens)", xlabel="evaluation length (tokens)", scale="loss (nats per token)",
        title=name,
    )  # fmt: skip
    results().print(f"{out / 'windows.json'}, {out / 'windows.png'}", markup=False)
