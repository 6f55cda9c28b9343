"""Llama and Mistral checkpoints as SWAT models: the same function, or a windowed one to train on.

Names and shapes of the parameters are Llama's already, so weights are taken over unchanged.
"""

import os
import shutil
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from swat_lm.hub import nearest_name
from swat_lm.model.configuration import RECIPE_KEYS, ROPE_TYPES, SwatConfig, check_fields
from swat_lm.model.loading import find_model_folder
from swat_lm.model.modeling import SwatForCausalLM
from swat_lm.model.weight_files import check_readable, give_usual_permissions
from swat_lm.paths import local_path

SOURCES = ("llama", "mistral")
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
TAKEN_OVER = (
    *SIZES,
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
)
WEIGHT_SHAPES = (*SIZES, "tie_word_embeddings", "attention_bias", "mlp_bias")
# parameters that options of ours add to the source's
ADDED = (".q_norm.", ".k_norm.", ".output_norm.", ".sink")
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
    """Take a Llama or Mistral model over.

    Without further arguments the result computes the same function: softmax, no slopes, the source's window.

    Args:
        source: a folder with `config.json` and safetensors weights, a run's folder that holds such an `export`, or a
            loaded model (its weights are copied).
        window: "keep" = the source's own (Llama: None), None = full attention, or a number of keys.
        changes: SwatConfig fields to set otherwise, such as `score_function="sigmoid", slopes="balanced",
            score_bias="-log(window)"` for a model to train on.

    Raises:
        ValueError: another architecture, something that cannot be taken over exactly (the message names it), or a
            checkpoint whose parameters do not fit.
        OSError: the folder cannot be read.
    """
    if isinstance(source, PreTrainedModel):
        config = convert_config(source.config, window, **changes)
        model = SwatForCausalLM(config).to(device=source.device, dtype=source.dtype)  # type: ignore[call-arg]
        missing, unexpected = model.load_state_dict(source.state_dict(), strict=False)
        _check_keys(missing, unexpected, config)
        model.generation_config = source.generation_config  # type: ignore[assignment]
        return model
    folder = _existing_folder(source)
    config = convert_config(AutoConfig.from_pretrained(folder), window, **changes)
    check_readable(folder)
    try:
        loaded: Any = SwatForCausalLM.from_pretrained(folder, config=config, dtype="auto", output_loading_info=True)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{folder}: the weights cannot be read or do not fit config.json: {error}") from error
    model, report = loaded
    _check_keys(report["missing_keys"], report["unexpected_keys"], config)
    return model


def convert_config(
    source: PreTrainedConfig, window: int | Literal["keep"] | None = "keep", **changes: Any
) -> SwatConfig:
    """The SwatConfig of a Llama or Mistral configuration; arguments and errors as in `convert`."""
    if source.model_type not in SOURCES:
        raise ValueError(f"source: expected a {' or '.join(SOURCES)} model, got {source.model_type!r}")
    check_fields(changes, [name for name in RECIPE_KEYS if name != "sliding_window"], "changes")
    _refuse_what_differs(source)
    fields = {name: getattr(source, name, None) for name in TAKEN_OVER}
    fields.update(
        attention_bias=getattr(source, "attention_bias", False),
        mlp_bias=getattr(source, "mlp_bias", False),
        rope_parameters=dict(source.rope_parameters),
        sliding_window=getattr(source, "sliding_window", None) if window == "keep" else window,
        score_function="softmax",
        slopes="none",
    )
    of_weights = [name for name in WEIGHT_SHAPES if changes.get(name, fields[name]) != fields[name]]
    if of_weights:
        name = of_weights[0]
        raise ValueError(
            f"changes: {', '.join(of_weights)} would change the shapes of the weights, which are taken over as they "
            f"are; leave {name} at the source's {fields[name]}"
        )
    return SwatConfig(**{**fields, **changes}, dtype=source.dtype)


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
    beside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        beside.mkdir(parents=True)
        model.save_pretrained(beside)
        give_usual_permissions(beside)
        for name in FILES_BESIDE:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, beside / name)
        if out.exists():
            out.rmdir()
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return model


def _existing_folder(source: str | Path) -> Path:
    if not local_path(source).exists():
        raise ValueError(f"source: {source} is not a checkpoint folder{nearest_name(local_path(source))}")
    return Path(find_model_folder(str(source)))


def _refuse_what_differs(source: PreTrainedConfig) -> None:
    """What our model has no counterpart for, so that the result would compute something else."""
    activation = getattr(source, "hidden_act", "silu")
    if activation != "silu":
        raise ValueError(f"source: hidden_act {activation!r} is not supported, only 'silu'")
    dropout = getattr(source, "attention_dropout", 0.0)
    if dropout:
        raise ValueError(f"source: attention_dropout {dropout} has no counterpart; set it to 0 in the source's config")
    rope = source.rope_parameters
    if rope["rope_type"] not in ROPE_TYPES:
        raise ValueError(
            f"source: rotary of type {rope['rope_type']!r} changes with the sequence's length: not taken over; "
            f"supported are {', '.join(ROPE_TYPES)}"
        )
    if getattr(source, "pretraining_tp", 1) not in (None, 1):
        raise ValueError("source: pretraining_tp other than 1 is not supported")


def _check_keys(missing: Any, unexpected: Any, config: SwatConfig) -> None:
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    lacking = sorted(key for key in set(missing) - tied if not any(part in key for part in ADDED))
    # old checkpoints stored the frequencies
    surplus = sorted(key for key in unexpected if not key.endswith("rotary_emb.inv_freq"))
    if lacking or surplus:
        raise ValueError(
            f"source: its parameters do not fit; missing: {', '.join(lacking) or 'none'}; "
            f"not understood: {', '.join(surplus) or 'none'}"
        )
