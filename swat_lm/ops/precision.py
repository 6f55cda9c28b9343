"""The precision of recurrences, short convolutions and gated norms, whatever their inputs are held in."""

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def sum_dtype(x: Tensor) -> torch.dtype:
    """Return the precision of sums over `x` and of the state they leave: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_dtype(name: str, x: Tensor) -> None:
    """Refuse what is no floating-point tensor of 16, 32 or 64 bits.

    Raises:
        ValueError: the message names the argument and what came.
    """
    if x.dtype not in DTYPES:
        raise ValueError(f"{name}: expected a tensor of float32, float64, bfloat16 or float16, got {x.dtype}")
