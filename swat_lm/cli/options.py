"""Options that commands share, and the values behind what is typed for them."""

import re
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from swat_lm.paths import local_path

__all__ = [
    "CHECKPOINT", "DEVICE", "HELD_OUT", "NO_WINDOW", "OWN_WINDOW", "TEXT_FIELD", "TOKENIZER", "WINDOW",
    "number_or_word", "parse_windows", "split_name", "whole_numbers",
]  # fmt: skip

OWN_WINDOW, NO_WINDOW = "own", "none"
# a path, or a name on the hub, behind a name of the user's
NAMED = re.compile(r"(?P<name>[^=/]+)=(?P<place>.+)")

CHECKPOINT = Annotated[str, typer.Argument(help="A run's folder, a folder of any causal model, or a hub name.")]
WINDOW = Annotated[str, typer.Option(help="Window of every layer: a number, none or own.")]
TEXT_FIELD = Annotated[str, typer.Option(help="Field of a .jsonl, .parquet or hub row that holds the text.")]
TOKENIZER = Annotated[str | None, typer.Option(help="Another tokenizer than the checkpoint's own.")]
DEVICE = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: a GPU if there is one.")]
HELD_OUT = Annotated[
    float | None,
    typer.Option(
        help="Read this held-out share of the documents; 0: all. Default: all but those that the model's run was "
        "trained on, which are recognised by their content."
    ),
]


def whole_numbers(text: str, option: str, least: int, example: str, *, different: bool = False) -> list[int]:
    """`64,128` as numbers; raises ValueError for anything else, also for a number below `least`."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < least or (different and len(set(numbers)) < len(numbers)):
        raise ValueError(
            f"{option}: expected {'different ' * different}whole numbers of at least {least} with commas between, such "
            f"as {example}; got {text!r}"
        )
    return numbers


def number_or_word(text: str, option: str, words: Mapping[str, Any]) -> Any:
    """A whole number of at least 1, or what one of the words stands for; raises ValueError for anything else."""
    if text in words:
        return words[text]
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{option}: expected {', '.join(words)} or a whole number of at least 1; got {text!r}")
    return int(text)


def parse_windows(text: str) -> list[str]:
    """`64,none` as names of windows, each once; raises ValueError for anything else."""
    names = list(dict.fromkeys(part.strip() for part in text.split(",")))
    if not all(name in (OWN_WINDOW, NO_WINDOW) or (name.isdecimal() and int(name) >= 1) for name in names):
        words = f"`{NO_WINDOW}` or `{OWN_WINDOW}`"
        raise ValueError(f"--window: expected numbers of at least 1, {words}, with commas between; got {text!r}")
    return names


def split_name(text: str) -> tuple[str | None, str]:
    """The parts of `NAME=PLACE`; no name where none is given, or where all of it is a path that exists."""
    named = None if local_path(text).exists() else NAMED.fullmatch(text)
    return (named["name"], named["place"]) if named else (None, text)
