"""Text to evaluate on: which of its documents, and their tokens."""

from typing import TYPE_CHECKING, Annotated, NamedTuple, cast

import typer

from swat_lm.cli.console import messages
from swat_lm.cli.progress import Counter
from swat_lm.paths import local_path
from swat_lm.wording import counted

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

__all__ = ["HELD_OUT", "Split", "choose_split", "read_documents"]

HELD_OUT = Annotated[
    float | None,
    typer.Option(
        help="Read this held-out share of the documents; 0: all. Default: of the text that a run was trained on "
        "what it held out, of any other text all."
    ),
]


class Split(NamedTuple):
    """Which documents of a text are read: a held-out share, drawn by a seed; all where the share is 0."""

    held_out: float
    seed: int = 0


def choose_split(checkpoint: str, data: list[str], held_out: float | None) -> Split:
    """The split asked for, or the one of the run behind the checkpoint where it was trained on this very text."""
    from swat_lm.recipe import load_recipe

    folder = local_path(checkpoint)
    recipes = [path for path in (folder / "recipe.yaml", folder.parent / "recipe.yaml") if path.is_file()]
    trained = load_recipe(recipes[0]).data if recipes else None
    if trained is None or {real_path(one) for one in trained.sources} != {real_path(one) for one in data}:
        return Split(held_out or 0.0)
    if held_out is not None and held_out not in (0.0, trained.held_out):
        raise ValueError(
            f"--held-out {held_out}: the run was trained on this text and held {trained.held_out} of its documents "
            f"out; another share would hold documents that it has learnt: leave the option out, or give 0 for all"
        )
    if held_out is None and trained.held_out:
        messages().print("note: reading only what the run held out of this text; --held-out 0 reads all of it")
    else:
        messages().print("note: the model was trained on this text")
    return Split(trained.held_out if held_out is None else held_out, trained.split_seed)


def real_path(source: str) -> str:
    """A source's absolute path; names of data sets as they are."""
    path = local_path(source)
    return str(path.resolve()) if path.exists() else source


def read_documents(
    data: list[str], tokenizer: str, text_field: str, split: Split, model: "PreTrainedModel"
) -> "list[np.ndarray]":
    """Token ids of every document; each ends with the end-of-text token if the tokenizer has one."""
    from swat_lm.data import load_tokenizer, prepare
    from swat_lm.recipe import DataRecipe

    has_end = load_tokenizer(tokenizer).eos_token_id is not None
    recipe = DataRecipe(
        sources=tuple(data), tokenizer=tokenizer, text_field=text_field, add_eos=has_end,
        held_out=split.held_out, split_seed=split.seed,
    )  # fmt: skip
    with Counter("preparing text", "bytes") as counter:
        store = prepare(recipe, lambda at: counter(at.bytes_read, at.bytes_total))
    vocab_size = cast(int, model.config.get_text_config().vocab_size)
    if store.vocab_size > vocab_size:
        raise ValueError(
            f"the text was tokenised with {counted(store.vocab_size, 'id')}, the model knows {vocab_size:,}"
        )
    chosen = store.split("held_out" if split.held_out else "train")
    return [chosen[index] for index in range(len(chosen))]
