"""`swat-lm tokenizer` and `swat-lm prepare`: from text to a tokenizer, and to tokens on disk."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swat_lm.cli.console import key_value_table, results
from swat_lm.cli.options import TEXT_FIELD
from swat_lm.cli.outputs import check_folder
from swat_lm.cli.progress import counting
from swat_lm.named_recipes import is_recipe
from swat_lm.words import counted

if TYPE_CHECKING:
    from swat_lm.recipe import DataRecipe

__all__ = ["prepare", "tokenizer"]

SOURCES_HELP = (
    "Files or folders of .txt .md .py .jsonl .parquet (also .gz .xz), hub:NAME[:CONFIG][:SPLIT], or python:stdlib."
)


def tokenizer(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCES...", help=SOURCES_HELP)],
    out: Annotated[Path, typer.Option("--out", "-o", help="New folder for the tokenizer.")],
    vocab_size: Annotated[int, typer.Option(help="Tokens in all: 256 bytes, 3 special ones, the rest merges.")] = 8192,
    text_field: TEXT_FIELD = "text",
) -> None:
    """Train a tokenizer on text.

    It is a byte-level BPE, lossless for any input. Recipes use it with `data.tokenizer: FOLDER`.

    \b
    Example:
      swat-lm tokenizer notes/ book.txt.gz --vocab-size 4096 --out tokenizers/mine
    """
    if not out.exists():
        check_folder(out, "--out")
    from swat_lm.data import train_tokenizer, vocabulary_size
    from swat_lm.files import naming

    # files that are read name themselves
    with naming(out), counting("reading text", "bytes") as counter:
        trained = train_tokenizer(sources, vocab_size, out, text_field, counter)
    results().print(f"{out}: {counted(vocabulary_size(trained), 'token')}", markup=False)


def prepare(
    sources: Annotated[list[str], typer.Argument(metavar="RECIPE [KEY=VALUE]... | SOURCES...", help=SOURCES_HELP)],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="`bytes`, a folder, a tokenizer.json or a hub name; default: the recipe's, or bytes."),
    ] = None,
    text_field: Annotated[
        str | None, typer.Option(help="Field that holds a row's text; default: the recipe's, or text.")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder for prepared tokens; default in the user's cache.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that tokenise; default one per core.")] = None,
) -> None:
    """Turn text into tokens on disk, once.

    `train` with the same data finds them.

    \b
    Examples:
      swat-lm prepare own-text data.sources=notes/
      swat-lm prepare notes/ --tokenizer tokenizers/mine
    """
    from swat_lm.data import prepare as prepare_tokens

    data = data_settings(sources, tokenizer, text_field, cache, workers)
    with counting("preparing text", "bytes") as counter:
        store = prepare_tokens(data, lambda at: counter(at.bytes_read, at.bytes_total))
    rows = [
        ("folder", str(store.folder)),
        ("documents", f"{store.num_documents:,}"),
        ("tokens", f"{store.num_tokens:,} of {store.vocab_size:,} kinds"),
        ("text", f"{counted(store.num_bytes, 'byte')}, {store.num_bytes / max(store.num_tokens, 1):.2f} per token"),
    ]
    # bare sources come without a share to hold out: the recipe that trains on them says it
    if is_recipe(sources[0]):
        part = store.split("held_out")
        held_out = (
            f"{counted(len(part), 'document')} (data.held_out is {data.held_out:g}), "
            f"{part.num_tokens:,} tokens, {100 * part.num_tokens / store.num_tokens:.3g} % of all"
        )
        rows.append(("held out", held_out if data.held_out else "nothing"))
    results().print(key_value_table(rows))


def data_settings(
    sources: list[str], tokenizer: str | None, text_field: str | None, cache: Path | None, workers: int | None
) -> "DataRecipe":
    """The data part of a recipe with overrides, or the defaults for bare sources."""
    from swat_lm.recipe import DataRecipe, load_recipe

    given = {
        "tokenizer": tokenizer,
        "text_field": text_field,
        "cache": str(cache) if cache else None,
        "workers": workers,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if not is_recipe(sources[0]):
        return DataRecipe(sources=tuple(sources), **given)  # type: ignore[arg-type]
    return replace(load_recipe(sources[0], sources[1:]).data, **given)  # type: ignore[arg-type]
