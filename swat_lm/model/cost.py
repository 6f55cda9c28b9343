"""What a configuration costs, as formulas: parameters, FLOPs, bytes of state, reach. Tested against counted values.

FLOPs are useful ones: a multiply-add is 2; not counted are pairs that the window or causality hide, recomputation in
the backward pass, norms, rotary and activations.
"""

from dataclasses import dataclass
from typing import NamedTuple

from swat_lm.layers.base import Layer, StateTensor
from swat_lm.model.building import layers_without_weights, shared_parameters
from swat_lm.model.configuration import SwatConfig
from swat_lm.ops.flops import visible_pairs

__all__ = [
    "LayerCost", "Parameters", "count_parameters", "decoding_bytes_per_token", "decoding_flops_per_token",
    "forward_flops", "grows", "plan_costs", "reach", "state_bytes", "training_flops_per_token", "visible_pairs",
]  # fmt: skip


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
    layers = sum(map(layer_parameters, layers_without_weights(config))) + shared_parameters(config)
    embedding = config.vocab_size * config.hidden_size
    output = 0 if config.tie_word_embeddings else embedding
    rest = layers + config.hidden_size * (2 if config.norm == "layer" else 1)
    return Parameters(embedding + output + rest, embedding, output, rest)


def layer_parameters(layer: Layer) -> int:
    """Parameters of one layer."""
    return sum(parameter.numel() for parameter in layer.parameters())


class LayerCost(NamedTuple):
    """What one layer of a plan is and costs."""

    index: int
    words: str
    """Its kind, and its window where it has one."""
    parameters: int
    state_bytes: int
    """Per stream, after the context, in bf16 where the layer does not ask for more."""
    reach: int | None
    """Tokens, itself included, that an output depends on; None: all before it."""
    flops_per_token: float
    """Of a forward pass over the context."""


def plan_costs(config: SwatConfig, context: int) -> list[LayerCost]:
    """Every layer of a plan, for rows or streams of `context` tokens."""
    found, num_tokens = [], context
    for index, (layer, entry) in enumerate(zip(layers_without_weights(config), config.plan(), strict=True)):
        words = entry.kind.name + (f" ({entry.kind.remark})" if entry.kind.remark else "")
        if words == "attention":
            window = entry.settings.sliding_window
            words = "full attention" if window is None else f"window {window:,}"
            words += f" and the first {entry.settings.sinks:,}" if entry.settings.sinks else ""
        flops = layer.flops(num_tokens) / context
        num_tokens = layer.num_handed_on(num_tokens)
        held = layer_state_bytes(layer, context)
        found.append(LayerCost(index, words, layer_parameters(layer), held, layer.reach(), flops))
    return found


def grows(config: SwatConfig) -> bool:
    """Whether a layer keeps everything it has seen."""
    return any(tensor.kind == "growing" for layer in layers_without_weights(config) for tensor in layer.state_spec())


def forward_flops(config: SwatConfig, num_tokens: int, num_past: int = 0) -> int:
    """FLOPs of one forward pass over one sequence of T tokens, logits included, after `num_past` tokens of state."""
    layers = 0
    for layer in layers_without_weights(config):
        layers += layer.flops(num_tokens, num_past)
        num_tokens = layer.num_handed_on(num_tokens)
    return layers + 2 * config.vocab_size * config.hidden_size * num_tokens


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
    """Bytes of what the layers keep for `batch` streams (without the 8 bytes per stream that hold its position).

    Args:
        context: tokens seen; needed where a layer has full attention, whose state grows with them.
        dtype_bytes: of one element of the state, where the layer does not ask for wider ones.

    Raises:
        ValueError: a full-attention layer and no context.
    """
    return batch * sum(layer_state_bytes(layer, context, dtype_bytes) for layer in layers_without_weights(config))


def layer_state_bytes(layer: Layer, context: int | None = None, dtype_bytes: int = 2) -> int:
    """Bytes of what one layer keeps for one stream."""
    return sum(tensor.num_elements(context) * element_bytes(tensor, dtype_bytes) for tensor in layer.state_spec())


def element_bytes(tensor: StateTensor, dtype_bytes: int) -> int:
    """Bytes of an element beside a model of `dtype_bytes`."""
    if tensor.dtype is None or not tensor.dtype.is_floating_point:
        return dtype_bytes if tensor.dtype is None else tensor.dtype.itemsize
    return max(dtype_bytes, tensor.dtype.itemsize)


def decoding_bytes_per_token(
    config: SwatConfig, context: int, batch: int = 1, weight_bytes: int = 2, dtype_bytes: int = 2
) -> int:
    """Bytes that decoding one token for each of `batch` streams has to read: all weights once, and the visible state.

    Of the input embedding only the tokens' rows are read; a tied one is read as the output embedding.
    """
    weights = count_parameters(config).without_input_embedding
    if not config.tie_word_embeddings:
        weights += batch * config.hidden_size
    state = 0
    for layer in layers_without_weights(config):
        for tensor in layer.state_spec():
            seen = context + 1 if tensor.items is None else min(context + 1, tensor.items)
            read = tensor if tensor.kind == "summary" else tensor._replace(kind="window", items=seen)
            state += read.num_elements() * element_bytes(tensor, dtype_bytes)
    return weights * weight_bytes + batch * state


def reach(config: SwatConfig) -> int | None:
    """Tokens, itself included, that the output at one place depends on: 1 + the sum of reach - 1; None = all.

    The first tokens that layers keep (`first_kept`) are not counted. Where layers see aligned segments, the place that
    sees farthest counts: behind one such layer the next of the same segments begins at the first token of one.
    """
    total, aligned = 1, None
    for layer in layers_without_weights(config):
        tokens, segment = layer.reach(), layer.aligned_to()
        if tokens is None:
            return None
        total += tokens - (segment if segment is not None and segment == aligned else 1)
        aligned = segment
    return total


def first_kept(config: SwatConfig) -> int:
    """First tokens of each document that all later outputs depend on, however far away."""
    return max(layer.first_kept() for layer in layers_without_weights(config))
