"""Numerical equality: an error at most twice PyTorch's own at the same precision, plus a rounding floor."""

import torch
from torch import Tensor


def assert_as_exact_as_pytorch(
    ours: Tensor, pytorch: Tensor, exact: Tensor, name: str = "result", summed: float = 0.0
) -> None:
    """Compare `ours` and PyTorch's plain computation at the same precision with the same computation in float64.

    `summed` is the root of the sum of squares of the terms behind one number, for results with so few numbers that
    PyTorch's own error is a matter of luck: their rounding, one unit in the last place each, is allowed on top.
    """
    assert ours.shape == exact.shape, f"{name}: shape {list(ours.shape)}, expected {list(exact.shape)}"
    finite = exact.isfinite()
    assert torch.equal(ours.isfinite(), finite), f"{name}: finite where the definition is not, or the other way round"
    exact = exact.where(finite, 0.0)
    rounded = exact.to(ours.dtype)
    floor = 2 * (rounded + 0.3 - 0.3 - rounded).abs().max().item() if exact.numel() else 0.0
    error = _largest(ours.where(finite, 0.0).double() - exact)
    floor += torch.finfo(ours.dtype).eps * summed
    allowed = 2 * _largest(pytorch.where(finite, 0.0).double() - exact) + floor
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def _largest(difference: Tensor) -> float:
    return difference.abs().max().item() if difference.numel() else 0.0
