"""`swat-lm evaluate length`: loss against the length of the context."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from swat_lm.cli.checkpoints import find_export, load_checkpoint
from swat_lm.cli.console import results
from swat_lm.cli.progress import Counter

if TYPE_CHECKING:
    import numpy as np

    from swat_lm.evaluate.length import LengthCurve

__all__ = ["length"]

DEFAULT_LENGTHS = "128,256,512,1024,2048,4096"


def length(
    checkpoint: Annotated[str, typer.Argument(help="A run's folder, an exported folder, or a hub name.")],
    data: Annotated[list[str], typer.Option("--data", "-d", help="Text to evaluate on; may be given several times.")],
    lengths: Annotated[str, typer.Option(help="Evaluation lengths in tokens, by commas.")] = DEFAULT_LENGTHS,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="New folder for length.json and length.png.")] = None,
    whole: Annotated[
        bool, typer.Option("--whole-documents", help="Read each document from its start, instead of joining them.")
    ] = False,
    held_out: Annotated[float, typer.Option(help="Evaluate on this held-out share of the documents; 0: on all.")] = 0.0,
    most: Annotated[int, typer.Option(min=1, help="Most streams to read, spread over the text.")] = 64,
    window: Annotated[int | None, typer.Option(help="Evaluate with this window in every layer.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Streams read side by side.")] = 8,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens per forward pass; speed and memory only.")] = 512,
    text_field: Annotated[
        str, typer.Option(help="Field of a .jsonl, .parquet or hub row that holds the text.")
    ] = "text",
    tokenizer: Annotated[str | None, typer.Option(help="Another tokenizer than the checkpoint's own.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: a GPU if there is one.")] = None,
) -> None:
    """Measure loss against the length of the context.

    Streams are read in constant memory. For each length N: the mean loss of the first N tokens of a stream, and
    that of tokens N/2+1 .. N, where the context
    is about N long; with standard errors over streams. Documents are joined and cut into streams of the greatest
    length, unless --whole-documents.

    \b
    Examples:
      swat-lm evaluate length demo/swat --data python:stdlib --lengths 256,1024,4096
      swat-lm evaluate length runs/mine --data books/ --whole-documents --out books-length
    """
    sizes = parse_lengths(lengths)
    check_output(out)
    from swat_lm.evaluate.length import loss_by_length

    model, _ = load_checkpoint(checkpoint, tokenizer, device)
    documents = read_documents(
        data, tokenizer or find_export(checkpoint), text_field, held_out, model.config.vocab_size
    )
    streams = choose_streams(documents, max(sizes), whole, most)
    with Counter("evaluating", "tokens") as counter:
        curve = loss_by_length(
            model, streams, sizes, chunk=chunk, batch_size=batch_size, window=window, on_progress=counter
        )
    results().print(curve_table(curve))
    if out is not None:
        save_curve(curve, out, Path(checkpoint).name)
        results().print(f"{out / 'length.json'}, {out / 'length.png'}", markup=False)


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


def check_output(out: Path | None) -> None:
    """Raise FileExistsError before any work is done if the results are there already."""
    if out is not None and (out / "length.json").exists():
        raise FileExistsError(f"{out} already holds length.json: name another folder for --out, or remove it")


def read_documents(
    data: list[str], tokenizer: str, text_field: str, held_out: float, vocab_size: int
) -> "list[np.ndarray]":
    """Token ids of every document; each ends with the end-of-text token if the tokenizer has one."""
    from swat_lm.data import load_tokenizer, prepare
    from swat_lm.recipe import DataRecipe

    has_end = load_tokenizer(tokenizer).eos_token_id is not None
    recipe = DataRecipe(
        sources=tuple(data), tokenizer=tokenizer, text_field=text_field, held_out=held_out, add_eos=has_end
    )
    with Counter("preparing text", "bytes") as counter:
        store = prepare(recipe, lambda at: counter(at.bytes_read, at.bytes_total))
    if store.vocab_size > vocab_size:
        raise ValueError(f"the text was tokenised with {store.vocab_size} ids, the model knows only {vocab_size}")
    split = store.split("held_out" if held_out else "train")
    return [split[index] for index in range(len(split))]


def choose_streams(documents: "list[np.ndarray]", greatest: int, whole: bool, most: int) -> "list[np.ndarray]":
    """The documents as they are or joined and cut, at most `most`, spread over the text."""
    from swat_lm.evaluate.length import segments

    if not whole:
        return segments(documents, greatest, most)
    count = len(documents)
    return documents if count <= most else [documents[i * count // most] for i in range(most)]


def curve_table(curve: "LengthCurve") -> Table:
    """The curve as a table of text."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for name in ("length", "loss, first N tokens", "loss, tokens N/2+1..N", "streams", "state bytes"):
        table.add_column(name, justify="right")
    for point in curve.points:
        table.add_row(
            f"{point.length:,}",
            with_error(point.mean_loss, point.mean_loss_error),
            with_error(point.tail_loss, point.tail_loss_error),
            f"{point.num_documents}",
            f"{point.state_bytes:,}",
        )
    return table


def with_error(value: float, error: float | None) -> str:
    """3.210 +- 0.012."""
    return f"{value:.4f}" if error is None else f"{value:.4f} +- {error:.4f}"


def save_curve(curve: "LengthCurve", out: Path, name: str) -> None:
    """Write length.json and length.png into the folder."""
    from swat_lm.evaluate.plots import Series, plot_loss_by_length

    out.mkdir(parents=True, exist_ok=True)
    series = [
        Series("first N tokens", curve.lengths, [p.mean_loss for p in curve.points],
               [p.mean_loss_error for p in curve.points]),
        Series("tokens N/2+1 .. N", curve.lengths, [p.tail_loss for p in curve.points],
               [p.tail_loss_error for p in curve.points]),
    ]  # fmt: skip
    plot_loss_by_length(series, out / "length.png", window=curve.window, title=name)
    curve.save(out / "length.json")
