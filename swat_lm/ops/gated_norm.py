"""The gated root mean square norm of Mamba-2 (arXiv 2405.21060, section 7), over groups of channels.

As Mamba-2 has it, it is one `torch.library` op with a recomputing backward: what came in is kept and nothing else, and
the rows go through in blocks that a cache holds.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from swat_lm.ops.precision import check_dtype, sum_dtype

# numbers in a block on a CPU
BLOCK_BUDGET = 2**17


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
    if not norm_before_gate:
        learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, gate, weight))
        # the op exists for gradients and torch.compile; its dispatch would cost as much as a small step
        run = torch.ops.swat_lm.gated_rms_norm if learns or torch.compiler.is_compiling() else _forward
        return run(x, gate, weight, eps, group_size)
    dtype = sum_dtype(x)
    result = F.rms_norm(x.to(dtype).unflatten(-1, (-1, group_size)), (group_size,), None, eps).flatten(-2)
    return (result * weight.to(dtype) * F.silu(gate.to(dtype))).to(x.dtype)


def _blocks(x: Tensor) -> Iterator[slice]:
    """Rows of a flattened `x [R, C]` that go together."""
    rows = len(x) if x.device.type != "cpu" else max(1, BLOCK_BUDGET // max(1, x.shape[1]))
    for start in range(0, len(x), max(1, rows)):
        yield slice(start, min(start + rows, len(x)))


def _normed(gated: Tensor, eps: float, group_size: int) -> tuple[Tensor, Tensor]:
    """Normalise `[r, C]` in place; return it as `[r, groups, size]`, and the factor of each group, `[r, groups, 1]`."""
    groups = gated.view(len(gated), -1, group_size)
    factor = torch.linalg.vector_norm(groups, dim=-1, keepdim=True).square_().div_(group_size).add_(eps).rsqrt_()
    return groups.mul_(factor), factor


def _forward(x: Tensor, gate: Tensor, weight: Tensor, eps: float, group_size: int) -> Tensor:
    dtype = sum_dtype(x)
    output = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows, gates, results = (each.reshape(-1, x.shape[-1]) for each in (x, gate, output))
    weight = weight.to(dtype)
    for own in _blocks(rows):
        normed, _ = _normed(F.silu(gates[own].to(dtype)).mul_(rows[own]), eps, group_size)
        results[own].copy_(normed.view(-1, x.shape[-1]).mul_(weight))
    return output


def _backward(
    d_output: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, gate and weight, in their dtypes.

    With g = silu(gate), n = x g factor and e = weight dy: d(x g) = factor (e - n mean(n e)).
    """
    dtype, num_channels = sum_dtype(x), x.shape[-1]
    d_x, d_gate = (torch.empty_like(each, memory_format=torch.contiguous_format) for each in (x, gate))
    d_weight = weight.new_zeros(num_channels, dtype=dtype)
    rows, gates, d_outputs, d_rows, d_gates = (
        each.reshape(-1, num_channels) for each in (x, gate, d_output, d_x, d_gate)
    )
    wide = weight.to(dtype)
    for own in _blocks(rows):
        value, before, d_normed = (each[own].to(dtype) for each in (rows, gates, d_outputs))
        gated = F.silu(before)
        normed, factor = _normed(gated * value, eps, group_size)
        product = d_normed * normed.view_as(value)
        d_weight += product.sum(0)
        common = product.mul_(wide).view_as(normed).sum(-1, keepdim=True).div_(-group_size)
        d_product = torch.addcmul((d_normed * wide).view_as(normed), normed, common).mul_(factor).view_as(value)
        torch.mul(d_product, gated, out=product)
        d_rows[own].copy_(product)
        d_gates[own].copy_(torch.ops.aten.silu_backward(d_product.mul_(value), before))
    return d_x, d_gate, d_weight.to(weight.dtype, copy=True)


_op = torch.library.custom_op("swat_lm::gated_rms_norm", _forward, mutates_args=())


@_op.register_fake
def _(x, gate, weight, eps, group_size):
    return x.new_empty(x.shape)


_backward_op = torch.library.custom_op("swat_lm::gated_rms_norm_backward", _backward, mutates_args=())


@_backward_op.register_fake
def _(d_output, x, gate, weight, eps, group_size):
    return x.new_empty(x.shape), gate.new_empty(gate.shape), weight.new_empty(weight.shape)


def _setup_context(ctx, inputs, output):
    *kept, ctx.eps, ctx.group_size = inputs
    ctx.save_for_backward(*kept)


def _differentiate(ctx, d_output):
    found = torch.ops.swat_lm.gated_rms_norm_backward(d_output, *ctx.saved_tensors, ctx.eps, ctx.group_size)
    return *found, None, None


_op.register_autograd(_differentiate, setup_context=_setup_context)
