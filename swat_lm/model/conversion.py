"""Checkpoints of other architectures as SWAT models: the same function, or a windowed one to train on.

Which architectures, and what theirs is called here, is in families.py.
"""

import copy
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from swat_lm.files import whole
from swat_lm.hub import nearest_name
from swat_lm.model.building import layers_without_weights
from swat_lm.model.configuration import RECIPE_KEYS, SwatConfig, check_fields
from swat_lm.model.families import Family, family_of, left_out
from swat_lm.model.loading import find_model_folder
from swat_lm.model.modeling import SwatForCausalLM
from swat_lm.model.plan import kinds_with
from swat_lm.model.weight_files import check_readable, give_usual_permissions
from swat_lm.paths import local_path

WEIGHT_SHAPES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
    "attention_bias",
    "output_bias",
    "mlp_bias",
    "norm",
    "feed_forward",
)
# of the tokenizer, and the record of the text that the weights were trained on
FILES_BESIDE = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "trained_text.npz",
)


def convert(
    source: str | Path | PreTrainedModel, window: int | Literal["keep"] | None = "keep", **changes: Any
) -> SwatForCausalLM:
    """Take a model of one of `swat_lm.model.families.FAMILIES` over.

    Without further arguments the result computes the same function: for Llama softmax, no slopes, the source's window.

    Args:
        source: a folder with `config.json` and safetensors weights, a run's folder that holds such an `export`, or a
            loaded model (its weights are copied).
        window: "keep" = the source's own (Llama: None), None = full attention, or a number of keys.
        changes: SwatConfig fields to set otherwise, such as `score_function="sigmoid", slopes="balanced",
            score_bias="-log(window)"` for a model to train on.

    Raises:
        ValueError: another architecture, something that cannot be taken over exactly (the message names it), a change
            that has no meaning for the source, or a checkpoint whose parameters do not fit.
        OSError: the folder cannot be read.
    """
    if isinstance(source, PreTrainedModel):
        _tell_what_is_left_out(source.config)
        config = convert_config(source.config, window, **changes)
        family = family_of(source.config)
        model = SwatForCausalLM(config).to(device=source.device, dtype=source.dtype)  # type: ignore[call-arg]
        missing, unexpected = model.load_state_dict(family.weights(source.state_dict(), source.config), strict=False)
        _check_keys(missing, unexpected, family.fields(source.config))
        model.generation_config = copy.deepcopy(source.generation_config)  # type: ignore[assignment]
        return model
    folder = _existing_folder(source)
    theirs = AutoConfig.from_pretrained(folder)
    config, family = convert_config(theirs, window, **changes), family_of(theirs)
    _tell_what_is_left_out(theirs)
    check_readable(folder)
    if family.names or family.parts:
        return _read_through_theirs(folder, config, family)
    # their names are ours already
    model, report = _loaded(SwatForCausalLM, folder, config=config)
    _check_keys(report["missing_keys"], report["unexpected_keys"], family.fields(theirs))
    return model


def _tell_what_is_left_out(source: PreTrainedConfig) -> None:
    """Warn of dropout: what is computed of a text is the same without."""
    if words := left_out(source):
        warnings.warn(
            f"source: {', '.join(words)} left out: layers here have no dropout, so training on goes without",
            stacklevel=3,
        )


def _read_through_theirs(folder: Path, config: SwatConfig, family: Family) -> SwatForCausalLM:
    """Weights under their own names, or joined, in their own model, which then lends them to ours."""
    # with `key_mapping`, transformers would write ours under the source's names again
    source, report = _loaded(AutoModelForCausalLM, folder)
    same = family.fields(source.config)
    # named as theirs are
    _check_complete(report["missing_keys"], report["unexpected_keys"], source.config.tie_word_embeddings)
    with torch.device("meta"):
        model = SwatForCausalLM(config)
    missing, unexpected = model.load_state_dict(
        family.weights(source.state_dict(), source.config), strict=False, assign=True
    )
    _check_keys(missing, unexpected, same)
    if config.tie_word_embeddings:
        model.tie_weights()
    model.generation_config = source.generation_config
    return model.eval()


def _loaded(kind: Any, folder: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The model of a folder in the dtype of its weights, and transformers' report of what did not fit."""
    try:
        return kind.from_pretrained(folder, dtype="auto", output_loading_info=True, **options)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{folder}: the weights cannot be read or do not fit config.json: {error}") from error


def convert_config(
    source: PreTrainedConfig, window: int | Literal["keep"] | None = "keep", **changes: Any
) -> SwatConfig:
    """The SwatConfig of a configuration of such a family; arguments and errors as in `convert`."""
    family = family_of(source)
    check_fields(changes, [name for name in RECIPE_KEYS if name != "sliding_window"], "changes")
    family.refuse(source)
    ours = family.fields(source)
    same = SwatConfig(**ours, dtype=source.dtype)
    _refuse_meaningless([*changes] if window == "keep" else ["window", *changes], same, family)
    shapes = (*WEIGHT_SHAPES, "qk_norm_over") if same.qk_norm else WEIGHT_SHAPES
    of_weights = [name for name in shapes if name in changes and changes[name] != getattr(same, name)]
    if of_weights:
        name = of_weights[0]
        raise ValueError(
            f"changes: {', '.join(of_weights)} would change the shapes of the weights, which are taken over as they "
            f"are; leave {name} at the source's {getattr(same, name)}"
        )
    windowed = {} if window == "keep" else {"sliding_window": window}
    config = SwatConfig(**{**ours, **windowed, **changes}, dtype=source.dtype)
    if "layers" in changes:
        _check_layers(config, same)
    return config


def _refuse_meaningless(names: Iterable[str], config: SwatConfig, family: Family) -> None:
    """Settings of kinds of which the source has no layer."""
    kinds = {entry.kind.name for entry in config.plan()}
    for name in names:
        setting = "sliding_window" if name == "window" else name
        owners = kinds_with(setting)
        if owners and not kinds & set(owners):
            where = name if name == "window" else f"changes: {name}"
            raise ValueError(
                f"{where} is a setting of {' and '.join(owners)}, of which a {family.title} model has no layer; "
                "leave it out"
            )


def _check_layers(config: SwatConfig, same: SwatConfig) -> None:
    """Raise ValueError where a plan of layers has other weights than the source."""
    for index, (ours, theirs) in enumerate(zip(config.plan(), same.plan(), strict=True)):
        if ours.kind is not theirs.kind:
            raise ValueError(
                f"changes: layers makes layer {index} {ours.kind.name}, the source's is {theirs.kind.name}; "
                "its weights are taken over as they are"
            )
    pairs = zip(layers_without_weights(config), layers_without_weights(same), strict=True)
    for index, (ours, theirs) in enumerate(pairs):
        known = dict(theirs.named_parameters())
        for name, parameter in ours.named_parameters():
            if name in known and parameter.shape != known[name].shape:
                raise ValueError(
                    f"changes: layers makes {name} of layer {index} {list(parameter.shape)}, the source's is "
                    f"{list(known[name].shape)}; its weights are taken over as they are"
                )


def convert_folder(
    source: str | Path, out: str | Path, window: int | Literal["keep"] | None = "keep", **changes: Any
) -> SwatForCausalLM:
    """Convert a checkpoint folder into another, with its tokenizer and the record of what text it was trained on.

    It is written beside its place and renamed: whole or absent.

    Args:
        out: must not exist, or be an empty folder.
        source, window, changes: as in `convert`.

    Raises:
        ValueError: what `convert` refuses, or an `out` that holds something.
        OSError: a folder that cannot be read or written.
    """
    folder, out = _existing_folder(source), local_path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: {out} exists and is not an empty folder; choose another one or remove it")
    model = convert(folder, window, **changes)
    with whole(out) as beside:
        beside.mkdir()
        model.save_pretrained(beside)
        give_usual_permissions(beside)
        for name in FILES_BESIDE:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, beside / name)
    return model


def _existing_folder(source: str | Path) -> Path:
    if not local_path(source).exists():
        raise ValueError(f"source: {source} is not a checkpoint folder{nearest_name(local_path(source))}")
    return Path(find_model_folder(str(source)))


def _check_keys(missing: Iterable[str], unexpected: Iterable[str], same: dict[str, Any]) -> None:
    """Raise ValueError unless nothing is missing but what changes add to the function described by `same`."""
    with torch.device("meta"):
        known = {name for name, _ in SwatForCausalLM(SwatConfig(**same)).named_parameters()}
    _check_complete(known & set(missing), unexpected, same["tie_word_embeddings"])


def _check_complete(missing: Iterable[str], unexpected: Iterable[str], is_tied: bool) -> None:
    """Raise ValueError, naming them, where parameters are missing or not understood."""
    lacking = sorted(set(missing) - ({"lm_head.weight"} if is_tied else set()))
    # old checkpoints stored the frequencies
    surplus = sorted(key for key in unexpected if not key.endswith("rotary_emb.inv_freq"))
    if lacking or surplus:
        raise ValueError(
            f"source: its parameters do not fit; missing: {', '.join(lacking) or 'none'}; "
            f"not understood: {', '.join(surplus) or 'none'}"
        )
