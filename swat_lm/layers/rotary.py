"""Rotary frequencies that layers share: plain numbers, no buffer, so no cast or loading can reach them."""

from collections.abc import Hashable

import torch
from torch import Tensor

from swat_lm.ops.rotary import rotary_angles


class RotaryFrequencies:
    """Frequencies of heads of D channels, and what scaled variants multiply cosine and sine with."""

    def __init__(self, frequencies: Tensor, factor: float, key: Hashable) -> None:
        """`frequencies` are float64 `[D / 2]`; layers whose keys are equal share their angles."""
        self.frequencies, self.factor, self.key = frequencies, factor, key
        self.head_dim = 2 * frequencies.shape[0]
        self._whole_heads = frequencies.repeat(2)
        self._copies: dict[torch.device, Tensor] = {}

    def angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine, each `[*positions.shape, D / 2]`, float32 at least; the dtype is the hidden states'."""
        dtype = torch.promote_types(dtype, torch.float32)
        cos, sin = rotary_angles(positions, self.head_dim, dtype=dtype, frequencies=self.frequencies)
        return (cos, sin) if self.factor == 1.0 else (cos * self.factor, sin * self.factor)

    def step_angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The angles of one token per row at `positions [B, 1]`, laid out over whole heads for a decoding step.

        Cosines, and sines with the sign that their half of the pair takes, each `[B, 1, 1, D]`: made once per step,
        they turn a rotation into three operations instead of ten.
        """
        dtype = torch.promote_types(dtype, torch.float32)
        frequencies = self._whole_heads
        if positions.device.type == "cuda":
            # copied once: a step that copies from the host cannot be recorded as a graph
            if positions.device not in self._copies:
                self._copies[positions.device] = frequencies.to(positions.device)
            frequencies = self._copies[positions.device]
        cos, sin = rotary_angles(positions[:, :, None], self.head_dim, dtype=dtype, frequencies=frequencies)
        sin.narrow(-1, 0, self.head_dim // 2).neg_()
        return (cos, sin) if self.factor == 1.0 else (cos * self.factor, sin * self.factor)
