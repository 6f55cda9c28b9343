"""Builds a model's layers from its configuration, with what they share: rotary frequencies, norms, initialisation."""

from collections.abc import Mapping
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
    shared = shared_by(config)
    layers = [
        kind.build(settings, config.hidden_size, index, shared) for index, (kind, settings) in enumerate(config.plan())
    ]
    return nn.ModuleList(layers), nn.ModuleDict(shared.modules)


def layers_without_weights(config: SwatConfig) -> list[Layer]:
    """Every layer of the plan as a shape: what it costs and keeps follows from that."""
    with torch.device("meta"):
        return list(build_layers(config)[0])  # type: ignore[arg-type]


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
