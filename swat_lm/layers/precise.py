"""Modules whose weights keep float32 in a narrower model: casts, loading and sharded training leave them alone.

Autocast does not reach them either. What they are given may be narrow.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Precise(nn.Module):
    """A module whose own parameters and buffers have at least the bits of float32, whatever the model is cast to.

    They must be made in `precise_dtype()`: Hugging Face's loading builds a model in the dtype that it is to have, and
    reads weights in the dtypes that it finds. `swat_lm.train.engine` gathers them as they are.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def precisely(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            if found.is_floating_point() and found.dtype.itemsize < 4:
                return tensor.to(found.device, torch.float32)
            return found

        return super()._apply(precisely, recurse)


class PreciseLinear(Precise, nn.Linear):
    """A projection that is computed in the dtype of its weight, under autocast too."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias, dtype=precise_dtype())

    def forward(self, input: Tensor) -> Tensor:
        """Map `[..., in]` of any dtype to `[..., out]`, of at least the bits of float32."""
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.to(self.weight.dtype), self.weight, self.bias)


def precise_dtype() -> torch.dtype:
    """PyTorch's default dtype, or float32 where that is narrower."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)
