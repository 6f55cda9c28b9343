"""What attention learns per query head: a sink's score, slopes, a bias of all scores.

Legend: H query heads.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from swat_lm.layers.attention_settings import AttentionSettings
from swat_lm.layers.pre_norm import start

SETTINGS = {"sink": "learned_sink", "slopes": "learned_slopes", "score_bias": "learned_score_bias"}
"""By the parameter's name, the setting that asks for it."""


def register_per_head(attention: nn.Module, settings: AttentionSettings) -> None:
    """Give attention the parameters `[H]` that its settings ask for; the others are None."""
    for name, setting in SETTINGS.items():
        is_learned = getattr(settings, setting)
        parameter = nn.Parameter(torch.zeros(settings.num_attention_heads)) if is_learned else None
        attention.register_parameter(name, parameter)


def start_per_head(attention: Any) -> None:
    """Slopes and score biases start as the settings say, sinks at a score of zero."""
    settings: AttentionSettings = attention.settings
    first = {"sink": 0.0, "slopes": settings.first_slopes(), "score_bias": settings.bias()}
    for name, value in first.items():
        parameter = getattr(attention, name)
        if parameter is not None and not parameter.is_meta:
            start(parameter, partial(copy_into, parameter, value))


def copy_into(parameter: Tensor, value: Tensor | float) -> None:
    """Overwrite a parameter with numbers of its shape, or with one number."""
    parameter.copy_(torch.as_tensor(value))


def own_part(parameter: Tensor) -> Tensor:
    """All of it; where tensor parallelism has cut it, this process's part."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter  # type: ignore[operator]
