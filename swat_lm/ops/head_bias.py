"""What is added to the scores of a head: `slope * distance + bias`, and where there is one a number by distance."""

from typing import NamedTuple

import torch
from torch import Tensor


class HeadBias(NamedTuple):
    """Slope and constant of every query head, each `[H]`, in the precision of the scores."""

    slopes: Tensor
    constant: Tensor
    relative: Tensor | None = None
    """`[H, W]`, by distance."""

    def at(self, distance: Tensor) -> Tensor:
        """Return the bias of every head at integer distances of any shape, `[H, *distance.shape]`."""
        shape = (-1,) + (1,) * distance.dim()
        bias = self.slopes.view(shape) * distance.to(self.slopes.dtype) + self.constant.view(shape)
        if self.relative is None:
            return bias
        # what lies outside the window is hidden by whoever asks
        return bias + self.relative[:, distance.clamp(0, self.relative.shape[1] - 1)]

    def of(self, heads: slice) -> "HeadBias":
        """Return that of some heads."""
        return HeadBias(*(None if numbers is None else numbers[heads] for numbers in self))  # type: ignore[arg-type]


def head_bias(
    slopes: Tensor | None, score_bias: Tensor | None, number: float, query: Tensor, relative: Tensor | None = None
) -> HeadBias:
    """Bring the operator's arguments to one form: float64 for float64 queries, float32 otherwise."""
    dtype = score_dtype(query)
    zeros = torch.zeros(query.shape[2], dtype=dtype, device=query.device)
    return HeadBias(
        zeros if slopes is None else slopes.to(dtype),
        zeros + number if score_bias is None else score_bias.to(dtype),
        None if relative is None else relative.to(dtype),
    )


def score_dtype(query: Tensor) -> torch.dtype:
    """Return the precision of scores and weights: that of the inputs, but never below float32."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32
