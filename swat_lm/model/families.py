"""The checkpoints of others that become ours: what each family's configuration and parameters are called here.

A family is one row of `FAMILIES`. What its models compute otherwise than ours do is refused by name.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from swat_lm.layers.pre_norm import ACTIVATIONS
from swat_lm.model.configuration import ROPE_TYPES

__all__ = ["FAMILIES", "Family", "family_of", "family_words", "left_out"]

LAYER_TYPES = ("sliding_attention", "full_attention")
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id")
DROPOUTS = (
    "attention_dropout", "residual_dropout", "embedding_dropout", "resid_pdrop", "embd_pdrop", "hidden_dropout",
)  # fmt: skip
LLAMA_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "pad_token_id",
    "tie_word_embeddings",
    *SPECIAL_TOKENS,
)


@dataclass(frozen=True)
class Family:
    """How the models of one architecture are taken over."""

    title: str
    """What people call it."""
    fields: Callable[[PreTrainedConfig], dict[str, Any]]
    """The fields of SwatConfig that describe the same function."""
    refuse: Callable[[PreTrainedConfig], None]
    """Raises ValueError, naming it, for what our model has no counterpart for: the result would be another function."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Parameter names, as regular expressions and what stands for them here; {}: they are ours already."""

    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Projections that they join, and the projections here that have the rows one after the other."""

    are_norms_offset: bool = False
    """Whether a norm's weight is what is added to 1; here it is the whole factor."""

    def rename(self, name: str) -> str:
        """What a parameter of theirs is called here."""
        for pattern, ours in self.names.items():
            name = re.sub(pattern, ours, name)
        return name

    def weights(self, state: Mapping[str, Tensor], source: PreTrainedConfig) -> dict[str, Tensor]:
        """Their parameters by our names; memory is shared with theirs, but for norms that are offset."""
        found = self.renamed(state, source)
        if self.are_norms_offset:
            for name in [name for name in found if name.endswith("norm.weight")]:
                found[name] = (1 + found[name].float()).to(found[name].dtype)
        return found

    def renamed(self, state: Mapping[str, Tensor], source: PreTrainedConfig) -> dict[str, Tensor]:
        """What belongs to their parameters, such as gradients, by our names."""
        found = {}
        for name, tensor in state.items():
            module, _, kind = name.rpartition(".")
            parent, _, joined = module.rpartition(".")
            if joined not in self.parts:
                found[self.rename(name)] = tensor
                continue
            parts = self.parts[joined]
            sizes = projection_sizes(source)
            for part, rows in zip(parts, tensor.split([sizes[part] for part in parts]), strict=True):
                found[self.rename(f"{parent}.{part}.{kind}")] = rows
        return found


def projection_sizes(source: PreTrainedConfig) -> dict[str, int]:
    """Outputs of the projections that families join."""
    head_dim = getattr(source, "head_dim", None) or source.hidden_size // source.num_attention_heads
    keys, width = source.num_key_value_heads * head_dim, source.intermediate_size
    heads = {"q_proj": source.num_attention_heads * head_dim, "k_proj": keys, "v_proj": keys}
    return {**heads, "gate_proj": width, "up_proj": width}


def family_of(source: PreTrainedConfig) -> Family:
    """The family of a model; raises ValueError, naming those that there are, for one that has none."""
    kind = source.model_type
    if kind in FAMILIES:
        return FAMILIES[kind]
    # experts are counted under one of these names
    is_mixture = any(getattr(source, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts"))
    reason = "is a mixture of experts, whose feed-forward has no counterpart here" if is_mixture else REFUSED.get(kind)
    raise ValueError(
        f"source: expected a {family_words('or')} model, got {kind!r}" + ("" if reason is None else f", which {reason}")
    )


def family_words(joint: str) -> str:
    """The architectures that can be taken over, as `llama, mistral or mamba2`."""
    *others, last = FAMILIES
    return f"{', '.join(others)} {joint} {last}"


def llama_fields(source: PreTrainedConfig) -> dict[str, Any]:
    """Llama's layer around softmax attention, with the source's window, where it has one."""
    return {
        **{name: getattr(source, name, None) for name in LLAMA_FIELDS},
        "attention_bias": getattr(source, "attention_bias", False),
        "mlp_bias": getattr(source, "mlp_bias", False),
        "rope_parameters": dict(source.rope_parameters),
        "sliding_window": getattr(source, "sliding_window", None),
        "score_function": "softmax",
        "slopes": "none",
    }


def refuse_phi3(source: PreTrainedConfig) -> None:
    """What Llama's layer refuses, and rotary of a part of each head."""
    part = source.rope_parameters.get("partial_rotary_factor", 1.0)
    if part != 1:
        raise ValueError(
            f"source: partial_rotary_factor {part} rotates a part of each head, which layers here do not; "
            "it cannot be taken over"
        )
    refuse_llama(source)


def windows_by_layer(source: PreTrainedConfig) -> int | list[int | None] | None:
    """The windows of a model that says of each layer whether it has one."""
    kinds = source.layer_types
    if any(kind not in LAYER_TYPES for kind in kinds):
        raise ValueError(
            f"source: layer_types {sorted(set(kinds))}: expected sliding_attention or full_attention for each"
        )
    return [source.sliding_window if kind == "sliding_attention" else None for kind in kinds]


def qwen3_fields(source: PreTrainedConfig) -> dict[str, Any]:
    """Llama's, with a norm on the queries and keys of each head, and a window in some layers or in none."""
    return {**llama_fields(source), "sliding_window": windows_by_layer(source), "qk_norm": True}


def qwen2_fields(source: PreTrainedConfig) -> dict[str, Any]:
    """Llama's, with biases on queries, keys and values, none on the output, and a window in some layers or in none."""
    biases = {"attention_bias": True, "output_bias": False}
    return {**llama_fields(source), "sliding_window": windows_by_layer(source), **biases}


def smollm3_fields(source: PreTrainedConfig) -> dict[str, Any]:
    """Llama's, with rotary in most layers and none in others, and a window in some layers or in none."""
    is_rotary = [bool(flag) for flag in source.no_rope_layers[: source.num_hidden_layers]]
    return {**llama_fields(source), "sliding_window": windows_by_layer(source), "use_rotary": is_rotary}


def granite_fields(source: PreTrainedConfig) -> dict[str, Any]:
    """Llama's, with numbers that scale embeddings, scores, the residual stream and logits."""
    names = ("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier")
    return {**llama_fields(source), **{name: getattr(source, name) for name in names}}


def olmo2_fields(source: PreTrainedConfig) -> dict[str, Any]:
    """Llama's, with the norms behind attention and feed-forward, and one over all queries and one over all keys."""
    return {**llama_fields(source), "norm_placement": "post", "qk_norm": True, "qk_norm_over": "layer"}


def olmo3_fields(source: PreTrainedConfig) -> dict[str, Any]:
    """OLMo 2's, with a window in most layers, and rotary of its own in those and in the others."""
    return {**olmo2_fields(source), "sliding_window": windows_by_layer(source), **rotary_by_layer(source)}


def gemma2_fields(source: PreTrainedConfig) -> dict[str, Any]:
    """Norms on both sides, scaled embeddings, GEGLU, windows in every other layer, capped scores and logits."""
    # theirs is rounded to the dtype of the weights, which a file gives by its name
    dtype = getattr(torch, source.dtype) if isinstance(source.dtype, str) else source.dtype
    multiplier = torch.tensor(source.hidden_size**0.5).to(dtype or torch.float32)
    return {
        **llama_fields(source),
        "sliding_window": windows_by_layer(source),
        "norm_placement": "both",
        "hidden_act": source.hidden_activation,
        "embedding_multiplier": multiplier.item(),
        "attention_multiplier": source.query_pre_attn_scalar**-0.5,
        "attn_logit_softcapping": source.attn_logit_softcapping,
        "final_logit_softcapping": source.final_logit_softcapping,
    }


def gemma3_fields(source: PreTrainedConfig) -> dict[str, Any]:
    """Gemma 2's, with a norm on the queries and keys of each head, and rotary of its own in layers with a window."""
    return {**gemma2_fields(source), **rotary_by_layer(source), "qk_norm": True}


def refuse_gemma2(source: PreTrainedConfig) -> None:
    """What Llama's layer refuses, attention in both directions and activations that are not here."""
    if getattr(source, "use_bidirectional_attention", None):
        raise ValueError("source: use_bidirectional_attention has no counterpart here; it cannot be taken over")
    refuse_activation(source, "hidden_activation", tuple(ACTIVATIONS))
    refuse_llama(source)


def refuse_gemma3(source: PreTrainedConfig) -> None:
    """What Gemma 2 refuses, and capped scores, which transformers' Gemma 3 can be asked for and does not have."""
    cap = source.attn_logit_softcapping
    if cap is not None:
        raise ValueError(
            f"source: attn_logit_softcapping {cap} is not applied by transformers' Gemma 3, so what the model computes "
            "is in doubt; set it to None in the source's config if its weights were trained without"
        )
    refuse_gemma2(source)


def starcoder2_fields(source: PreTrainedConfig) -> dict[str, Any]:
    """LayerNorm, a feed-forward without a gate, biases everywhere or nowhere, one window for all layers or none."""
    return {
        **llama_fields(source),
        "rms_norm_eps": source.norm_epsilon,
        "norm": "layer",
        "feed_forward": "plain",
        "hidden_act": source.hidden_act,
        "attention_bias": source.use_bias,
        "mlp_bias": source.use_bias,
    }


def refuse_starcoder2(source: PreTrainedConfig) -> None:
    """What Llama's layer refuses but for its activation."""
    refuse_activation(source, "hidden_act", tuple(ACTIVATIONS))
    refuse_around_feed_forward(source)


def rotary_by_layer(source: PreTrainedConfig) -> dict[str, Any]:
    """Rotary by type of layer, written down layer by layer: another window does not change how a layer rotates."""
    layers = [
        {"kind": "attention", "rope_parameters": dict(source.rope_parameters[kind])} for kind in source.layer_types
    ]
    return {"rope_parameters": dict(source.rope_parameters), "layers": layers}


def refuse_llama(source: PreTrainedConfig) -> None:
    """Other activations, and rotary that changes with the sequence."""
    refuse_activation(source)
    refuse_around_feed_forward(source)


def refuse_around_feed_forward(source: PreTrainedConfig) -> None:
    """What `refuse_llama` does, but for the activation."""
    rope = source.rope_parameters
    for entry in [rope[kind] for kind in LAYER_TYPES if kind in rope] or [rope]:
        if entry["rope_type"] not in ROPE_TYPES:
            raise ValueError(
                f"source: rotary of type {entry['rope_type']!r} changes with the sequence's length: not taken over; "
                f"supported are {', '.join(ROPE_TYPES)}"
            )
    if getattr(source, "pretraining_tp", 1) not in (None, 1):
        raise ValueError("source: pretraining_tp other than 1 is not supported")


def mamba2_fields(source: PreTrainedConfig) -> dict[str, Any]:
    """Layers of Mamba-2 alone.

    `chunk_size` is left behind: the result does not depend on it. So is `pad_token_id`: it would keep the gradient of
    a token's embedding at zero, which theirs is not; padding is told by the mask.
    """
    low, high = source.time_step_limit
    entry = {
        "kind": "mamba2",
        "state_size": source.state_size,
        "expand": source.expand,
        "ssm_head_dim": source.head_dim,
        "num_groups": source.n_groups,
        "conv_kernel": source.conv_kernel,
        "conv_bias": source.use_conv_bias,
        "projection_bias": source.use_bias,
        "time_step_min": source.time_step_min,
        "time_step_max": source.time_step_max,
        "time_step_floor": source.time_step_floor,
        # steps are positive anyway
        "time_step_limit": None if low <= 0 and high == math.inf else [low, high],
    }
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "initializer_range", "tie_word_embeddings")
    return {
        **{name: getattr(source, name) for name in (*names, *SPECIAL_TOKENS)},
        "rms_norm_eps": source.layer_norm_epsilon,
        "layers": [entry],
    }


def refuse_mamba2(source: PreTrainedConfig) -> None:
    """Other activations."""
    refuse_activation(source)


def left_out(source: PreTrainedConfig) -> list[str]:
    """What the source does in training and layers here do not: dropout, as `attention_dropout 0.1`."""
    return [f"{name} {getattr(source, name)}" for name in DROPOUTS if getattr(source, name, 0.0)]


def refuse_activation(
    source: PreTrainedConfig, name: str = "hidden_act", served: tuple[str, ...] = ("silu", "swish")
) -> None:
    """Anything but the activations that are served."""
    activation = getattr(source, name, "silu")
    if activation not in served:
        raise ValueError(f"source: {name} {activation!r} is not supported, only {', '.join(map(repr, served))}")


OLMO_NAMES = {
    r"\.post_attention_layernorm\.": ".mixer_output_layernorm.",
    r"\.post_feedforward_layernorm\.": ".feedforward_output_layernorm.",
}

GEMMA_NAMES = {**OLMO_NAMES, r"\.pre_feedforward_layernorm\.": ".post_attention_layernorm."}

FAMILIES: dict[str, Family] = {
    "llama": Family("Llama", llama_fields, refuse_llama),
    "mistral": Family("Mistral", llama_fields, refuse_llama),
    "qwen2": Family("Qwen2", qwen2_fields, refuse_llama),
    "qwen3": Family("Qwen3", qwen3_fields, refuse_llama),
    "smollm3": Family("SmolLM3", smollm3_fields, refuse_llama),
    "phi3": Family(
        "Phi-3",
        llama_fields,
        refuse_phi3,
        parts={"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")},
    ),
    "granite": Family("Granite", granite_fields, refuse_llama),
    "olmo2": Family("OLMo 2", olmo2_fields, refuse_llama, OLMO_NAMES),
    "olmo3": Family("OLMo 3", olmo3_fields, refuse_llama, OLMO_NAMES),
    "gemma2": Family("Gemma 2", gemma2_fields, refuse_gemma2, GEMMA_NAMES, are_norms_offset=True),
    "gemma3_text": Family("Gemma 3", gemma3_fields, refuse_gemma3, GEMMA_NAMES, are_norms_offset=True),
    "starcoder2": Family(
        "StarCoder2", starcoder2_fields, refuse_starcoder2, {r"\.c_fc\.": ".up_proj.", r"\.c_proj\.": ".down_proj."}
    ),
    "mamba2": Family(
        "Mamba-2",
        mamba2_fields,
        refuse_mamba2,
        {
            r"^backbone\.embeddings\.": "model.embed_tokens.",
            r"^backbone\.norm_f\.": "model.norm.",
            r"^backbone\.": "model.",
        },
    ),
}
"""By `model_type`."""

REFUSED = {
    "gemma3": "reads images too; its text model alone, 'gemma3_text', is taken over",
}
"""Why not, where it has been looked at."""
