"""Builds a model's layers from its configuration, with what they share: rotary frequencies, norms, initialisation."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from swat_lm.layers.base import Layer, Shared
from swat_lm.layers.rotary import RotaryFrequencies
from swat_lm.model.configuration import SwatConfig
from swat_lm.ops.rotary import inverse_frequencies


def build_layers(config: SwatConfig) -> tuple[nn.ModuleList, nn.ModuleDict]:
    """Every layer of the plan, with fresh weights; and by name what several of them share, which the model owns."""
    shared, layers = shared_by(config), []
    counts = Counter[type[Layer]]()
    for index, (kind, settings) in enumerate(config.plan()):
        layers.append(kind.build(settings, config.hidden_size, index, replace(shared, nth=counts[kind])))
        counts[kind] += 1
    return nn.ModuleList(layers), nn.ModuleDict(shared.modules)


def layers_without_weights(config: SwatConfig) -> list[Layer]:
    """Every layer of the plan as a shape: what it costs and keeps follows from that."""
    with torch.device("meta"):
        return list(build_layers(config)[0])  # type: ignore[arg-type]


def check_rows(config: SwatConfig, num_tokens: int) -> None:
    """Raise ValueError, naming the layer, where a part of it would do nothing in rows of so many tokens."""
    given = num_tokens
    for index, layer in enumerate(layers_without_weights(config)):
        idle = layer.idle_in(num_tokens)
        if idle is not None:
            raise ValueError(
                f"data.sequence_length: {given:,} tokens are too few for layer {index} ({layer.name}): {idle}, or "
                "longer rows"
            )
        num_tokens = layer.num_handed_on(num_tokens)


def shared_parameters(config: SwatConfig) -> int:
    """Parameters that several layers share and the model owns."""
    with torch.device("meta"):
        modules = build_layers(config)[1].values()
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def shared_by(config: SwatConfig) -> Shared:
    """What the layers of this configuration have in common; layers with equal rotary share their angles."""
    made: dict[str, RotaryFrequencies] = {}

    def rotary(head_dim: int, parameters: Mapping[str, Any]) -> RotaryFrequencies:
        key = f"{head_dim} {sorted(parameters.items())}"
        if key not in made:
            frequencies, factor = rotary_frequencies(config, head_dim, dict(parameters))
            made[key] = RotaryFrequencies(frequencies, factor, key)
        return made[key]

    return Shared(config.rms_norm_eps, config.initializer_range, config.output_projection_init_scale, rotary)


def rotary_frequencies(config: SwatConfig, head_dim: int, parameters: dict[str, Any]) -> tuple[Tensor, float]:
    """Frequencies, float64 `[D / 2]` on the CPU, and what cosine and sine are multiplied with."""
    if parameters.get("rope_type", "default") == "default":
        return inverse_frequencies(head_dim, parameters["rope_theta"]), 1.0
    # the scaled variants are Hugging Face's own formulas, so that converted checkpoints keep their exact frequencies
    plain = SwatConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=1,
        head_dim=head_dim,
        max_position_embeddings=config.max_position_embeddings,
        num_hidden_layers=1,
        rope_parameters=parameters,
    )
    with torch.device("cpu"):
        frequencies, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](plain, torch.device("cpu"))
    return frequencies.to(torch.float64), float(factor)
