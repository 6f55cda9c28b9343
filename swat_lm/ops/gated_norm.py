"""The gated root mean square norm of Mamba-2 (arXiv 2405.21060, section 7), over groups of channels."""

import torch.nn.functional as F
from torch import Tensor

from swat_lm.ops.precision import check_dtype, sum_dtype


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    *,
    eps: float,
    group_size: int | None = None,
    norm_before_gate: bool = False,
) -> Tensor:
    """Normalise `[..., C]` by groups of channels, gated by `silu(gate)`; all in float32 (float64 for float64 x).

        norm(x * silu(gate)) * weight            as Mamba-2 does
        norm(x) * weight * silu(gate)            with `norm_before_gate`
        norm(x) = x / sqrt(mean(x^2) + eps)      the mean over the channels of a group

    Args:
        x, gate: `[..., C]`, alike in shape; the dtype of x is the result's.
        weight: `[C]`.
        eps: added to the mean of squares.
        group_size: channels that are normalised together, a divisor of C; all C when None.
        norm_before_gate: gate what was normalised instead of normalising what was gated.

    Raises:
        ValueError: shapes that do not fit; the message names the argument.
    """
    num_channels = x.shape[-1]
    group_size = num_channels if group_size is None else group_size
    for name, tensor in (("x", x), ("gate", gate), ("weight", weight)):
        check_dtype(name, tensor)
    if gate.shape != x.shape:
        raise ValueError(f"gate: expected the shape of x, {list(x.shape)}, got {list(gate.shape)}")
    if tuple(weight.shape) != (num_channels,):
        raise ValueError(f"weight: expected one number per channel, [{num_channels}], got {list(weight.shape)}")
    if group_size < 1 or num_channels % group_size:
        raise ValueError(f"group_size: expected a divisor of the {num_channels} channels, got {group_size}")
    dtype = sum_dtype(x)
    gates, result = F.silu(gate.to(dtype)), x.to(dtype)
    if not norm_before_gate:
        result = result * gates
    result = F.rms_norm(result.unflatten(-1, (-1, group_size)), (group_size,), None, eps).flatten(-2)
    result = result * weight.to(dtype)
    if norm_before_gate:
        result = result * gates
    return result.to(x.dtype)
