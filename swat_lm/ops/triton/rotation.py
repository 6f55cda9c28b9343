"""Rotary inside the kernels: rows rotated as they are loaded, gradients rotated back before they are stored.

Keys are read by many tiles of rows, so one kernel of their own rotates them once; queries are read once and are rotated
where they are used. Pairs are `(x[i], x[i + D/2])`, as in `swat_lm.ops.rotary`.
"""

# Triton rewrites the bodies of kernels, which a checker of Python misreads
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from swat_lm.ops.triton.configurations import FUSED
from swat_lm.ops.triton.device import SIZES, on_device, store_tile

BLOCK_ROWS = 64


def rotate(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, back: bool = False) -> Tensor:
    """Return x `[B, T, H, D]` rotated by its rows' angles, or rotated back, in `dtype`; formed in float32.

    `cos` and `sin` are contiguous, `[B, T, D/2]` or `[1, T, D/2]`.
    """
    batch, num_rows, num_heads, head_dim = x.shape
    result = torch.empty(x.shape, dtype=dtype, device=x.device)
    if result.numel() == 0:
        return result
    with on_device(x):
        _rotate[(triton.cdiv(num_rows, BLOCK_ROWS), num_heads, batch)](
            x, result, cos, sin, *x.stride()[:3], *result.stride()[:3], angle_stride(cos), num_rows,
            HEAD_DIM=head_dim, BLOCK_DIM=triton.next_power_of_2(head_dim), BLOCK_ROWS=BLOCK_ROWS, BACK=back,
            **FUSED,
        )  # fmt: skip
    return result


def angle_stride(cos: Tensor | None) -> int:
    """Return how far apart the angles of two sequences are: nowhere, where they share them."""
    return 0 if cos is None or cos.shape[0] == 1 else cos.stride(0)


@triton.jit(do_not_specialize=SIZES)
def _rotate(
    x_ptr, result_ptr, cos_ptr, sin_ptr, stride_xb, stride_xt, stride_xh, stride_rb, stride_rt, stride_rh, stride_ab,
    num_rows, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    first_row = tl.program_id(0) * BLOCK_ROWS
    head = tl.program_id(1).to(tl.int64)
    sequence = tl.program_id(2).to(tl.int64)
    x = load_rotated(
        x_ptr + sequence * stride_xb + head * stride_xh, first_row, stride_xt, num_rows,
        cos_ptr + sequence * stride_ab, sin_ptr + sequence * stride_ab, HEAD_DIM, BLOCK_DIM, BLOCK_ROWS, BACK,
    )  # fmt: skip
    result_ptr += sequence * stride_rb + head * stride_rh
    store_tile(result_ptr, first_row, stride_rt, num_rows, x, HEAD_DIM, BLOCK_DIM, BLOCK_ROWS)


@triton.jit
def load_rotated(
    base, first_row, stride_row, num_rows, cos_ptr, sin_ptr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Load `[BLOCK_ROWS, BLOCK_DIM]` and rotate it, float32."""
    row = tl.arange(0, BLOCK_ROWS)
    base += first_row.to(tl.int64) * stride_row
    if HEAD_DIM == BLOCK_DIM:
        HALF: tl.constexpr = HEAD_DIM // 2
        pointers = base + row[:, None] * stride_row + tl.arange(0, HALF)[None, :]
        inside = (first_row + row < num_rows)[:, None]
        first = tl.load(pointers, mask=inside, other=0.0)
        second = tl.load(pointers + HALF, mask=inside, other=0.0)
        return turn_halves(first, second, first_row, num_rows, cos_ptr, sin_ptr, HEAD_DIM, BLOCK_ROWS, BACK)
    # a padded head has no middle to join at: each channel is loaded beside its partner
    channel = tl.arange(0, BLOCK_DIM)
    inside = (first_row + row < num_rows)[:, None] & (channel < HEAD_DIM)[None, :]
    own = tl.load(base + row[:, None] * stride_row + channel[None, :], mask=inside, other=0.0)
    partner = tl.load(base + row[:, None] * stride_row + partner_of(channel, HEAD_DIM)[None, :], mask=inside, other=0.0)
    return turn(own, partner, first_row, num_rows, cos_ptr, sin_ptr, HEAD_DIM, BLOCK_DIM, BLOCK_ROWS, BACK)


@triton.jit
def rotate_back(
    x, first_row, num_rows, cos_ptr, sin_ptr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Rotate a tile of gradients in registers back; a padded head has no middle to split at, see `rotate`."""
    tl.static_assert(HEAD_DIM == BLOCK_DIM)
    first, second = tl.split(tl.permute(tl.reshape(x, (BLOCK_ROWS, 2, HEAD_DIM // 2)), (0, 2, 1)))
    return turn_halves(first, second, first_row, num_rows, cos_ptr, sin_ptr, HEAD_DIM, BLOCK_ROWS, True)


@triton.jit
def turn_halves(
    first, second, first_row, num_rows, cos_ptr, sin_ptr, HEAD_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BACK: tl.constexpr,
):  # fmt: skip
    """Return the rotated halves `[BLOCK_ROWS, HEAD_DIM / 2]` of a tile, joined, float32."""
    HALF: tl.constexpr = HEAD_DIM // 2
    row = first_row + tl.arange(0, BLOCK_ROWS)
    places = row.to(tl.int64)[:, None] * HALF + tl.arange(0, HALF)[None, :]
    inside = (row < num_rows)[:, None]
    cos = tl.load(cos_ptr + places, mask=inside, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + places, mask=inside, other=0.0).to(tl.float32)
    if BACK:
        sin = -sin
    first = first.to(tl.float32)
    second = second.to(tl.float32)
    turned = tl.join(first * cos - second * sin, second * cos + first * sin)
    return tl.reshape(tl.permute(turned, (0, 2, 1)), (BLOCK_ROWS, HEAD_DIM))


@triton.jit
def turn(
    own, partner, first_row, num_rows, cos_ptr, sin_ptr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Return `own * cos -+ partner * sin`, float32."""
    row = first_row + tl.arange(0, BLOCK_ROWS)
    channel = tl.arange(0, BLOCK_DIM)
    HALF: tl.constexpr = HEAD_DIM // 2
    is_first = channel < HALF
    places = row.to(tl.int64)[:, None] * HALF + tl.where(is_first, channel, channel - HALF)[None, :]
    inside = (row < num_rows)[:, None] & (channel < HEAD_DIM)[None, :]
    cos = tl.load(cos_ptr + places, mask=inside, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + places, mask=inside, other=0.0).to(tl.float32)
    sign = tl.where(is_first == BACK, 1.0, -1.0)
    return own.to(tl.float32) * cos + partner.to(tl.float32) * (sin * sign[None, :])


@triton.jit
def partner_of(channel, HEAD_DIM: tl.constexpr):
    """Return the other channel of a pair."""
    return tl.where(channel < HEAD_DIM // 2, channel + HEAD_DIM // 2, channel - HEAD_DIM // 2)
