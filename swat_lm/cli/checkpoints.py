"""From what the user names to a model and its tokenizer: an exported folder, a run's folder, or a name on the hub."""

from pathlib import Path
from typing import TYPE_CHECKING, cast

from swat_lm.cli.console import messages
from swat_lm.cli.options import NO_WINDOW, OWN_WINDOW, parse_windows
from swat_lm.hub import nearest_name
from swat_lm.model.loading import find_model_folder, load_causal_lm, model_type
from swat_lm.paths import local_path
from swat_lm.words import counted

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

    from swat_lm.model.modeling import SwatForCausalLM

__all__ = [
    "behind_window", "find_export", "load_any_checkpoint", "load_behind_window", "load_checkpoint", "load_model",
    "matching_tokenizer",
]  # fmt: skip


def find_export(name: str) -> str:
    """The folder of one of our models behind a name, or a hub name as it is.

    Raises ValueError that says what the folder is instead.
    """
    if not local_path(name).exists() and name.count("/") != 1:
        raise ValueError(
            f"no checkpoint at {name}: expected a run's folder or its `export` folder{nearest_name(local_path(name))}"
        )
    folder = find_model_folder(name)
    kind = model_type(Path(folder)) if Path(folder).exists() else "swat"
    from swat_lm.model.families import FAMILIES, family_words

    if kind in FAMILIES:
        raise ValueError(f"{folder} holds a {kind} model: convert it first with `swat-lm convert {folder} OUT`")
    if kind != "swat":
        raise ValueError(
            f"{folder} holds a model of type {kind!r}: expected swat (or {family_words('and')}, to convert); "
            "transformers' own generate() runs the others"
        )
    return folder


def load_model(name: str, device: str | None = None) -> "SwatForCausalLM":
    """One of our models in evaluation mode, whole: a weight that is missing or has another shape is an error."""
    from swat_lm.model.modeling import SwatForCausalLM

    model = load_causal_lm(find_export(name), device)
    if not isinstance(model, SwatForCausalLM):
        raise ValueError(f"{name} is a model of type {model.config.model_type!r}: expected swat")
    return model


def load_checkpoint(
    name: str, tokenizer: str | None = None, device: str | None = None
) -> "tuple[SwatForCausalLM, PreTrainedTokenizerFast]":
    """One of our models and its tokenizer (or the one named instead), checked to belong together."""
    model, folder = load_model(name, device), find_export(name)
    return model, matching_tokenizer(model.config, folder, tokenizer)


def load_any_checkpoint(
    name: str, tokenizer: str | None = None, device: str | None = None
) -> "tuple[PreTrainedModel, PreTrainedTokenizerFast]":
    """Any causal language model and its tokenizer (or the one named instead), checked to belong together."""
    model, folder = load_causal_lm(name, device), find_model_folder(name)
    return model, matching_tokenizer(model.config, folder, tokenizer)


def load_behind_window(
    name: str, window: str, tokenizer: str | None, device: str | None
) -> "tuple[PreTrainedModel, PreTrainedTokenizerFast]":
    """Any causal language model behind the one window that --window names, and its tokenizer."""
    windows = parse_windows(window)
    if len(windows) != 1:
        raise ValueError(f"--window: this command takes one window, got {window!r}")
    model, tokens = load_any_checkpoint(name, tokenizer, device)
    return behind_window(model, windows[0]), tokens


def behind_window(model: "PreTrainedModel", window: str, sinks: int | None = None) -> "PreTrainedModel":
    """The model itself, or a twin that shares its weights and has the window of this name, and so many sinks."""
    from swat_lm.evaluate.windows import with_window

    if window == OWN_WINDOW:
        return model if sinks is None else with_window(model, "keep", sinks)
    return with_window(model, None if window == NO_WINDOW else int(window), sinks)


def matching_tokenizer(config: "PreTrainedConfig", folder: str, tokenizer: str | None) -> "PreTrainedTokenizerFast":
    """The tokenizer of a model; the model may have more ids than it (a padded vocabulary).

    Special tokens added to the tokenizer may lie beyond the model's (Gemma 3's, for images). Raises ValueError
    that names both if it has fewer otherwise.
    """
    from swat_lm.data import load_tokenizer, vocabulary_size

    tokens = load_tokenizer(tokenizer or folder)
    known, has = vocabulary_size(tokens), cast(int, config.get_text_config().vocab_size)
    added = tokens.added_tokens_decoder
    if known > has and all(number in added and added[number].special for number in range(has, known)):
        messages().print(
            f"note: {counted(known - has, 'token')} added to the tokenizer lie beyond the model's {has:,}: a text that "
            "names one cannot be read",
            markup=False,
        )
    elif known > has:
        raise ValueError(
            f"the tokenizer {tokenizer or folder} has {counted(known, 'id')}, the model {folder} only {has}: "
            "they do not belong together; give the model's own with --tokenizer"
        )
    return tokens
