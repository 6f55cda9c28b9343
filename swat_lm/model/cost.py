"""What a configuration costs, as formulas: parameters, FLOPs, bytes of state, reach. Tested against counted values.

FLOPs are useful ones: a multiply-add is 2; not counted are pairs that the window or causality hide, recomputation in
the backward pass, norms, rotary and activations.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from swat_lm.mixers import MIXERS
from swat_lm.model.configuration import SwatConfig


@dataclass(frozen=True)
class Parameters:
    """Counts of parameters."""

    total: int
    embedding: int
    """Input embedding, `[vocab_size, hidden_size]`."""
    output_embedding: int
    """Output embedding; 0 when it is tied to the input embedding."""
    non_embedding: int
    """Everything else."""

    @property
    def without_input_embedding(self) -> int:
        """What takes part in every token's matrix products and norms; a tied embedding counts as the output's."""
        return self.total - (self.embedding if self.output_embedding else 0)


def count_parameters(config: SwatConfig) -> Parameters:
    """Parameters of SwatForCausalLM with this configuration."""
    width, head_dim = config.hidden_size, _head_dim(config)
    layers = 0
    for index in range(config.num_hidden_layers):
        settings = config.attention_settings(index)
        layers += _layer_matrices(config, index) + 2 * width
        layers += (_biases(config) if config.attention_bias else 0) + head_dim * (2 * settings.qk_norm)
        layers += head_dim * settings.output_norm + settings.num_heads * settings.learned_sink
        layers += (2 * config.intermediate_size + width) if config.mlp_bias else 0
    embedding = config.vocab_size * width
    output = 0 if config.tie_word_embeddings else embedding
    return Parameters(embedding + output + layers + width, embedding, output, layers + width)


def visible_pairs(num_queries: int, window: int | None, num_past: int = 0) -> int:
    """Query-key pairs that T causal queries see after `num_past` tokens: the sum of `min(past + t + 1, window)`."""
    if window is None:
        window = num_past + num_queries
    # queries that see less than a full window: positions num_past .. window - 2
    growing = max(0, min(num_queries, window - 1 - num_past))
    return growing * num_past + growing * (growing + 1) // 2 + (num_queries - growing) * window


def attention_flops(num_heads: int, head_dim: int, num_queries: int, window: int | None, num_past: int = 0) -> int:
    """FLOPs of the two products of attention, over the visible pairs of `num_heads` heads (of a batch: B * H)."""
    return 4 * num_heads * head_dim * visible_pairs(num_queries, window, num_past)


def forward_flops(config: SwatConfig, num_tokens: int, num_past: int = 0) -> int:
    """FLOPs of one forward pass over one sequence of T tokens, logits included, after `num_past` tokens of state."""
    matrices = sum(_layer_matrices(config, index) for index in range(config.num_hidden_layers))
    matrices += config.vocab_size * config.hidden_size
    attention = sum(
        attention_flops(config.num_attention_heads, _head_dim(config), num_tokens, config.window(index), num_past)
        for index in range(config.num_hidden_layers)
    )
    return 2 * matrices * num_tokens + attention


def training_flops_per_token(config: SwatConfig, sequence_length: int) -> float:
    """FLOPs per token of a forward and a backward pass (twice the forward) over rows of `sequence_length`.

    Raises:
        ValueError: a length below 1.
    """
    if sequence_length < 1:
        raise ValueError(f"sequence_length: expected at least 1, got {sequence_length}")
    return 3 * forward_flops(config, sequence_length) / sequence_length


def decoding_flops_per_token(config: SwatConfig, context: int) -> int:
    """FLOPs of decoding one token after `context` tokens."""
    return forward_flops(config, 1, context)


def state_bytes(config: SwatConfig, batch: int = 1, context: int | None = None, dtype_bytes: int = 2) -> int:
    """Bytes of what the mixers keep for `batch` streams (without the 8 bytes per stream that hold its position).

    Args:
        context: tokens seen; needed where a layer has full attention, whose state grows with them.
        dtype_bytes: of one element of the state.

    Raises:
        ValueError: a full-attention layer and no context.
    """
    elements = 0
    for index in range(config.num_hidden_layers):
        with torch.device("meta"):
            mixer = MIXERS[_mixer_name(config, index)].from_config(config, index)
        elements += sum(tensor.num_elements(context) for tensor in mixer.state_spec())
    return batch * elements * dtype_bytes


def decoding_bytes_per_token(
    config: SwatConfig, context: int, batch: int = 1, weight_bytes: int = 2, dtype_bytes: int = 2
) -> int:
    """Bytes that decoding one token for each of `batch` streams has to read: all weights once, and the visible state.

    Of the input embedding only the tokens' rows are read; a tied one is read as the output embedding.
    """
    weights = count_parameters(config).without_input_embedding
    if not config.tie_word_embeddings:
        weights += batch * config.hidden_size
    visible = sum(visible_pairs(1, config.window(index), context) for index in range(config.num_hidden_layers))
    assert config.num_key_value_heads is not None
    state = 2 * visible * config.num_key_value_heads * _head_dim(config)
    return weights * weight_bytes + batch * state * dtype_bytes


def reach(config: SwatConfig) -> int | None:
    """Tokens, itself included, that the output at one place depends on: 1 + the sum of window - 1; None = all."""
    windows = [config.window(index) for index in range(config.num_hidden_layers)]
    if None in windows:
        return None
    return 1 + sum(window - 1 for window in windows if window is not None)


def _layer_matrices(config: SwatConfig, layer_index: int) -> int:
    """Elements of the weight matrices that every token of a layer is multiplied with."""
    settings = config.attention_settings(layer_index)
    attention = settings.hidden_size * settings.head_dim * 2 * (settings.num_heads + settings.num_kv_heads)
    return attention + 3 * config.hidden_size * config.intermediate_size


def _biases(config: SwatConfig) -> int:
    assert config.num_key_value_heads is not None
    return (config.num_attention_heads + 2 * config.num_key_value_heads) * _head_dim(config) + config.hidden_size


def _head_dim(config: SwatConfig) -> int:
    assert config.head_dim is not None
    return config.head_dim


def _mixer_name(config: SwatConfig, layer_index: int) -> str:
    assert isinstance(config.mixers, list)
    return config.mixers[layer_index]


# `torch.utils.flop_counter` counts our operator by the same rule: useful pairs, the visibility of a plain batch


@register_flop_formula(torch.ops.swat_lm.window_attention)
def _window_attention_flops(*args: Any, **kwargs: Any) -> int:
    return _attended_flops(torch.ops.swat_lm.window_attention, args)


@register_flop_formula(torch.ops.swat_lm.window_attention_backward)
def _window_attention_backward_flops(*args: Any, **kwargs: Any) -> int:
    return 2 * _attended_flops(torch.ops.swat_lm.window_attention_backward, args)


def _attended_flops(operation: Any, args: tuple[Any, ...]) -> int:
    # tensors come as their shapes; the places of the arguments are the op's own affair
    named = {argument.name: value for argument, value in zip(operation.default._schema.arguments, args, strict=False)}
    batch, num_queries, num_heads, head_dim = named["query"]
    num_past = named["key"][1] - num_queries
    return attention_flops(batch * num_heads, head_dim, num_queries, named["window"], num_past)


@register_flop_formula(torch.ops.swat_lm.window_attention_step)
def _window_attention_step_flops(
    query: tuple[int, ...],
    key: tuple[int, ...],
    value: tuple[int, ...],
    key_ring: tuple[int, ...],
    *args: Any,
    **kwargs: Any,
) -> int:
    # counted as a full ring: the positions are values, which a formula of shapes does not see
    batch, _, num_heads, head_dim = query
    return 4 * batch * num_heads * head_dim * key_ring[1]
