"""Text to evaluate on: which of its documents, and their tokens."""

from typing import TYPE_CHECKING, cast

from swat_lm.cli.console import messages
from swat_lm.cli.progress import counting
from swat_lm.model.loading import find_model_folder
from swat_lm.paths import local_path
from swat_lm.words import counted

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

    from swat_lm.data import TokenStore
    from swat_lm.data.trained import Recognised, TrainedText

__all__ = ["read_documents", "trained_text_of"]

# a document that shares more than this with trained text, but not most of it, is read and spoken of
SHARED = 0.1


def read_documents(
    checkpoint: str,
    data: list[str],
    tokenizer: str | None,
    text_field: str,
    held_out: float | None,
    model: "PreTrainedModel",
) -> "list[np.ndarray]":
    """Token ids of every document that the model was not trained on, or of the share asked for.

    Each ends with the end-of-text token if the tokenizer has one. Raises ValueError where none is left.
    """
    from swat_lm.data import load_tokenizer, prepare
    from swat_lm.recipe import DataRecipe

    trained = trained_text_of(checkpoint)
    folder = tokenizer or find_model_folder(checkpoint)
    recipe = DataRecipe(
        sources=tuple(data), tokenizer=folder, text_field=text_field,
        add_eos=load_tokenizer(folder).eos_token_id is not None,
        held_out=held_out or 0.0, split_seed=trained.split_seed if trained else 0,
    )  # fmt: skip
    with counting("preparing text", "bytes") as counter:
        store = prepare(recipe, lambda at: counter(at.bytes_read, at.bytes_total))
    vocab_size = cast(int, model.config.get_text_config().vocab_size)
    if store.vocab_size > vocab_size:
        raise ValueError(
            f"the text was tokenised with {counted(store.vocab_size, 'id')}, the model knows {vocab_size:,}"
        )
    chosen = store.split("held_out" if held_out else "train")
    if trained is None:
        return [chosen[index] for index in range(len(chosen))]
    return choose_documents(store, trained, held_out)


def trained_text_of(checkpoint: str) -> "TrainedText | None":
    """What the model was trained on; None for one that was not trained here. Says so where it cannot be told."""
    from swat_lm.data import DataError
    from swat_lm.train.trained_text import find_trained_text

    folder = local_path(find_model_folder(checkpoint))
    try:
        trained = find_trained_text(folder) if folder.exists() else None
    except DataError as error:
        messages().print(f"note: {error}: text that the model was trained on is read like any other", markup=False)
        return None
    if trained is not None and not trained.whole:
        messages().print(
            "note: the record of what the model was trained on is of an earlier version or not whole: of its text only "
            "unchanged documents are recognised"
        )
    return trained


def choose_documents(store: "TokenStore", trained: "TrainedText", held_out: float | None) -> "list[np.ndarray]":
    """The documents asked for, or what of all the model was not trained on; says what was left out."""
    found = trained.recognise(store)
    partly = found.first > 0
    known = found.trained | partly
    if held_out == 0:
        if known.any():
            messages().print(
                f"note: the model was trained on this text: on {counted(int(known.sum()), 'document')} of {len(known)}"
            )
        return [store.document(number) for number in range(store.num_documents)]
    if held_out is not None:
        return drawn_documents(store, found, held_out)
    if found.trained.all():
        raise ValueError(
            f"the model was trained on this text: on all of it ({counted(len(known), 'document')}), or most of each "
            "document, so that nothing held out or new is left. Give other text, or --held-out 0 to read all of this"
        )
    if known.any():
        tell_left_out(store, found)
    tell_doubtful(found)
    return [
        store.document(number)[found.first[number] :]
        for number in range(store.num_documents)
        if not found.trained[number]
    ]


def drawn_documents(store: "TokenStore", found: "Recognised", held_out: float) -> "list[np.ndarray]":
    """A held-out share; ValueError if the model was trained on any of it."""
    import numpy as np

    chosen = store.split("held_out")
    numbers = np.searchsorted(store.offsets, chosen.spans[:, 0], side="right") - 1
    learnt = found.trained[numbers] | (chosen.spans[:, 0] < store.offsets[numbers] + found.first[numbers])
    if learnt.any():
        raise ValueError(
            f"--held-out {held_out}: the model was trained on {counted(int(learnt.sum()), 'document')} of the "
            f"{len(chosen)} that this share holds; another share would hold documents that it has learnt: leave the "
            "option out to read all that it has not, or give 0 for all"
        )
    return [chosen[index] for index in range(len(chosen))]


def tell_left_out(store: "TokenStore", found: "Recognised") -> None:
    """Say how much was left out, and what is read instead."""
    import numpy as np

    lengths = np.diff(store.offsets)
    left_out = np.where(found.trained, lengths, found.first)
    kept = ~found.trained
    held, new = int((kept & found.held_out).sum()), int((kept & ~found.held_out).sum())
    partly = int((kept & (found.first > 0)).sum())
    parts = [f"{counted(int(found.trained.sum()), 'document')} of {len(lengths)}"] if found.trained.any() else []
    parts += [f"the beginning of {counted(partly, 'document')}"] if partly else []
    if held and not new:
        read = f"reading only what the run held out of this text ({counted(held, 'document')})"
    elif held:
        read = f"reading what the run held out of this text ({counted(held, 'document')}) and {new:,} new to the model"
    else:
        read = f"reading {counted(new, 'document')} new to the model"
    messages().print(
        f"note: {read}; left out: {' and '.join(parts)}, {int(left_out.sum()):,} of {store.num_tokens:,} tokens, that "
        "the model was trained on; --held-out 0 reads all of it",
        markup=False,
    )


def tell_doubtful(found: "Recognised") -> None:
    """Say of documents that are read what they share with trained text, and what nothing can be told of."""
    shared = ~found.trained & (found.shared > SHARED)
    if shared.any():
        messages().print(
            f"note: {counted(int(shared.sum()), 'document')} that {'is' if shared.sum() == 1 else 'are'} read share "
            f"passages with text that the model was trained on, at most {100 * found.shared[shared].max():.0f} % of one"
        )
    # short documents matter where the text is one that was cut into other documents for training
    if found.silent.any() and (found.trained & (found.shared > 0)).any():
        messages().print(
            f"note: {counted(int(found.silent.sum()), 'document')} that {'is' if found.silent.sum() == 1 else 'are'} "
            "read may be parts of text that the model was trained on: too short to tell"
        )
