"""Checkpoints of other architectures as SWAT models: the same function, or a windowed one to train on.

Which architectures, and what theirs is called here, is in families.py.
"""

import copy
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from swat_lm.files import whole
from swat_lm.model.building import layers_without_weights
from swat_lm.model.configuration import RECIPE_KEYS, SwatConfig
from swat_lm.model.families import Family, family_of, left_out
from swat_lm.model.gguf import GgufSource, open_gguf, read_gguf_model
from swat_lm.model.modeling import SwatForCausalLM
from swat_lm.model.plan import kinds_with
from swat_lm.model.recipe_fields import check_fields
from swat_lm.model.sources import find_source
from swat_lm.model.weight_files import (
    check_present,
    check_readable,
    check_tokenizer,
    check_whole,
    give_usual_permissions,
)
from swat_lm.model.window_plan import FullLayers, with_full_layers
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
# by the names that transformers also takes them by
DTYPES = {str(kind).removeprefix("torch."): kind for kind in (torch.float32, torch.bfloat16, torch.float16)}
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
    source: str | Path | PreTrainedModel,
    window: int | Literal["keep"] | None = "keep",
    *,
    full_layers: FullLayers | None = None,
    dtype: torch.dtype | str | None = None,
    **changes: Any,
) -> SwatForCausalLM:
    """Take a model of one of `swat_lm.model.families.FAMILIES` over.

    Without further arguments the result computes the same function: for Llama softmax, no slopes, the source's window.
    It is in evaluation mode, whatever mode a loaded source is in.

    Args:
        source: a folder with `config.json` and safetensors weights, a run's folder that holds such an `export`, a GGUF
            file or a folder with one, a word of `swat_lm.model.sources.PACKAGED`, or a loaded model (its weights are
            copied).
        window: "keep" = the source's own (Llama: None), None = full attention, or a number of keys.
        full_layers: which layers keep full attention beside the window of the others, such as "every:3"; see
            `swat_lm.model.window_plan.window_plan`. A source some of whose layers have no window needs a number as
            `window` beside it.
        dtype: of the result, float32, bfloat16 or float16, as torch has it or by name; None = as the source has it, and
            float32 for a GGUF file of quantised blocks.
        changes: SwatConfig fields to set otherwise, such as `score_function="sigmoid", slopes="balanced",
            score_bias="-log(window)"` for a model to train on.

    Raises:
        ValueError: another architecture, something that cannot be taken over exactly (the message names it), a change
            that has no meaning for the source, or a checkpoint that is cut short or whose parameters do not fit.
        OSError: the folder or file cannot be read.
    """
    dtype = _checked_dtype(dtype)
    if not isinstance(source, PreTrainedModel):
        return _convert_opened(_open(source, dtype), window, full_layers, changes)
    theirs = _with_dtype(source.config, dtype or source.dtype)
    _refuse_packed(source)
    _tell_what_is_left_out(theirs)
    config, family = convert_config(theirs, window, full_layers, **changes), family_of(theirs)
    model = SwatForCausalLM(config).to(device=source.device, dtype=theirs.dtype)  # type: ignore[call-arg]
    missing, unexpected = model.load_state_dict(family.weights(source.state_dict(), theirs), strict=False)
    _check_keys(missing, unexpected, family.fields(theirs))
    model.generation_config = copy.deepcopy(source.generation_config)  # type: ignore[assignment]
    return model.eval()


def _checked_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """As torch has it; raises ValueError for what weights are not stored in."""
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in DTYPES.values():
        raise ValueError(f"dtype: expected {', '.join(DTYPES)} (as torch has them or by name) or None; got {dtype!r}")
    return found


class _Opened(NamedTuple):
    """A source on disk of which all but the weights has been looked at."""

    place: Path
    config: PreTrainedConfig
    gguf: GgufSource | None


def _open(source: str | Path, dtype: torch.dtype | None) -> _Opened:
    """What can be known of a source without reading weights. Raises as `convert` does."""
    place = find_source(source)
    if place.is_file():
        gguf = open_gguf(place, dtype)
        return _Opened(place, gguf.config, gguf)
    theirs = AutoConfig.from_pretrained(place)
    # before anything is looked for that another kind of model may not have
    family_of(theirs)
    quantised = getattr(theirs, "quantization_config", None)
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        raise ValueError(f"source: the weights in {place} are quantised ({method}): save the model without that first")
    if not getattr(theirs, "transformers_weights", None):
        check_present(place)
    check_readable(place)
    check_whole(place)
    check_tokenizer(place, theirs.vocab_size)
    return _Opened(place, theirs if dtype is None else _with_dtype(theirs, dtype), None)


def _convert_opened(
    opened: _Opened, window: int | Literal["keep"] | None, full_layers: FullLayers | None, changes: Mapping[str, Any]
) -> SwatForCausalLM:
    folder, theirs, gguf = opened
    _tell_what_is_left_out(theirs)
    config, family = convert_config(theirs, window, full_layers, **changes), family_of(theirs)
    if gguf is not None:
        return _from_theirs(read_gguf_model(gguf), config, family)
    if family.names or family.parts:
        return _read_through_theirs(folder, config, family)
    # their names are ours already
    model, report = _loaded(SwatForCausalLM, folder, theirs.dtype, config=config)
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
    source, report = _loaded(AutoModelForCausalLM, folder, config.dtype)
    # named as theirs are
    _check_complete(report["missing_keys"], report["unexpected_keys"], source.config.tie_word_embeddings)
    return _from_theirs(source, config, family)


def _from_theirs(source: PreTrainedModel, config: SwatConfig, family: Family) -> SwatForCausalLM:
    """Our model with the weights of theirs, which is not to be used any more."""
    same = family.fields(source.config)
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


def _loaded(kind: Any, folder: Path, dtype: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The model of a folder in a dtype, None for that of its weights, and transformers' report of what did not fit."""
    dtype = "auto" if dtype is None else dtype
    try:
        return kind.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{folder}: the weights cannot be read or do not fit config.json: {error}") from error


def _with_dtype(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedConfig:
    """A copy for weights of another dtype, to which some families round numbers of theirs."""
    config = copy.deepcopy(config)
    config.dtype = dtype
    return config


def _refuse_packed(source: PreTrainedModel) -> None:
    """Raise ValueError for weights in quantised blocks."""
    for name, parameter in source.named_parameters():
        if not parameter.is_floating_point():
            raise ValueError(
                f"source: {name} holds quantised blocks ({parameter.dtype}); load the model dequantised, a GGUF file "
                "with quantization_config=GgufConfig(dequantize=True), or convert the file itself"
            )


def convert_config(
    source: PreTrainedConfig,
    window: int | Literal["keep"] | None = "keep",
    full_layers: FullLayers | None = None,
    **changes: Any,
) -> SwatConfig:
    """The SwatConfig of a configuration of such a family; arguments and errors as in `convert`."""
    family = family_of(source)
    if window not in ("keep", None) and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ValueError(
            f"window: expected 'keep', None for full attention or a whole number of at least 1, got {window!r}"
        )
    check_fields(changes, [name for name in RECIPE_KEYS if name != "sliding_window"], "changes")
    family.refuse(source)
    ours = family.fields(source)
    same = SwatConfig(**ours, dtype=source.dtype)
    windows = ["window"] * (window != "keep") + ["full_layers"] * (full_layers is not None)
    _refuse_meaningless([*windows, *changes], same, family)
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
    return config if full_layers is None else with_full_layers(config, full_layers)


def _refuse_meaningless(names: Iterable[str], config: SwatConfig, family: Family) -> None:
    """Settings of kinds of which the source has no layer."""
    kinds = {entry.kind.name for entry in config.plan()}
    for name in names:
        setting = "sliding_window" if name in ("window", "full_layers") else name
        owners = kinds_with(setting)
        if owners and not kinds & set(owners):
            where = name if setting != name else f"changes: {name}"
            raise ValueError(
                # the first is the one that models which are taken over have
                f"{where} is a setting of {owners[0]}, of which a {family.title} model has no layer; leave it out"
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
    source: str | Path,
    out: str | Path,
    window: int | Literal["keep"] | None = "keep",
    *,
    full_layers: FullLayers | None = None,
    dtype: torch.dtype | str | None = None,
    **changes: Any,
) -> SwatForCausalLM:
    """Convert a checkpoint on disk into a folder, with its tokenizer and the record of what text it was trained on.

    It is written beside its place and renamed: whole or absent.

    Args:
        out: must not exist, or be an empty folder.
        source, window, full_layers, dtype, changes: as in `convert`.

    Raises:
        ValueError: what `convert` refuses, or an `out` that holds something.
        OSError: a folder that cannot be read or written.
    """
    out = local_path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: {out} exists and is not an empty folder; choose another one or remove it")
    opened = _open(source, _checked_dtype(dtype))
    model = _convert_opened(opened, window, full_layers, changes)
    with whole(out) as beside:
        beside.mkdir()
        model.save_pretrained(beside)
        if opened.gguf is not None and opened.gguf.tokenizer is not None:
            opened.gguf.tokenizer.save_pretrained(beside)
        give_usual_permissions(beside)
        # beside a GGUF file lies what may be another model's
        for name in () if opened.gguf is not None else FILES_BESIDE:
            if (opened.place / name).is_file():
                shutil.copyfile(opened.place / name, beside / name)
    return model


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
