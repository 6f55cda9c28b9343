"""Rotary frequencies of every layer, from the configuration alone: no buffer, so no cast or loading can reach them."""

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from swat_lm.model.configuration import SwatConfig
from swat_lm.ops.rotary import inverse_frequencies, rotary_angles


class LayerRotary:
    """Cosines and sines for all layers of a model; layers with equal parameters share one pair."""

    def __init__(self, config: SwatConfig) -> None:
        assert config.head_dim is not None
        self.head_dim = config.head_dim
        self._frequencies: list[Tensor] = []
        self._factors: list[float] = []
        self._set_of_layer: list[int | None] = []
        seen: dict[str, int] = {}
        for index in range(config.num_hidden_layers):
            parameters = config.rotary(index)
            if parameters is None:
                self._set_of_layer.append(None)
                continue
            name = repr(sorted(parameters.items()))
            if name not in seen:
                seen[name] = len(self._frequencies)
                frequencies, factor = _frequencies(config, parameters)
                self._frequencies.append(frequencies)
                self._factors.append(factor)
            self._set_of_layer.append(seen[name])
        self._whole_heads = [frequencies.repeat(2) for frequencies in self._frequencies]

    def angles(self, positions: Tensor, dtype: torch.dtype) -> list[tuple[Tensor, Tensor] | None]:
        """One (cosine, sine) per layer, each `[*positions.shape, D / 2]`; None where a layer has no rotary.

        The dtype is that of the hidden states; angles are float32 at least.
        """
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        pairs = []
        for frequencies, factor in zip(self._frequencies, self._factors, strict=True):
            cos, sin = rotary_angles(positions, self.head_dim, dtype=precise, frequencies=frequencies)
            pairs.append((cos, sin) if factor == 1.0 else (cos * factor, sin * factor))
        return [None if index is None else pairs[index] for index in self._set_of_layer]

    def step_angles(self, position: Tensor, dtype: torch.dtype) -> list[tuple[Tensor, Tensor] | None]:
        """The angles of one token per stream at `position [B]`, laid out over whole heads for `Mixer.step`.

        Cosines, and sines with the sign that their half of the pair takes, each `[B, 1, 1, D]`: made once per step,
        they turn a rotation into three operations instead of ten.
        """
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        pairs = []
        for frequencies, factor in zip(self._whole_heads, self._factors, strict=True):
            cos, sin = rotary_angles(position[:, None, None], self.head_dim, dtype=precise, frequencies=frequencies)
            sin.narrow(-1, 0, self.head_dim // 2).neg_()
            pairs.append((cos, sin) if factor == 1.0 else (cos * factor, sin * factor))
        return [None if index is None else pairs[index] for index in self._set_of_layer]


def _frequencies(config: SwatConfig, parameters: dict) -> tuple[Tensor, float]:
    assert config.head_dim is not None
    if parameters["rope_type"] == "default":
        return inverse_frequencies(config.head_dim, parameters["rope_theta"]), 1.0
    # the scaled variants are Hugging Face's own formulas, so that converted checkpoints keep their exact frequencies
    plain = SwatConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        num_hidden_layers=1,
        rope_parameters=parameters,
    )
    with torch.device("cpu"):
        frequencies, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](plain, torch.device("cpu"))
    return frequencies.to(torch.float64), float(factor)
