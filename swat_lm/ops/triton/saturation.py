"""Skipping saturated tiles: far from the diagonal a sloped head's sigmoid is 0 or 1 to within 4.2e-8, whatever q.k is.

With |scale * q.k| <= c and slope s, the score at distance d is at most c + b - |s| d for a negative slope, so beyond
d = (c + b + 17) / |s| every weight is below sigmoid(-17) < 4.2e-8: the tile is skipped. For a positive slope the score
is at least s d + b - c, and beyond (c - b + 17) / s every weight is 1 to within as much: the tile adds the sum of its
values. Neither has a gradient to query or key beyond 4.2e-8 times the incoming one.
"""

# Triton rewrites the bodies of kernels, which a checker of Python misreads
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from swat_lm.ops.triton.configurations import FUSED
from swat_lm.ops.triton.device import SIZES, load_tile, on_device, scalar
from swat_lm.ops.triton.geometry import far_tiles_of_keys, visible_keys

# sigmoid(-17) = 4.14e-8
SATURATION = 17.0
# by which a bound on the products is raised, since norms and products are rounded
SLACK = 1.001
_SATURATION: tl.constexpr = tl.constexpr(SATURATION)
_SLACK: tl.constexpr = tl.constexpr(SLACK)
_BLOCK_ROWS = 64


def largest_norms(x: Tensor) -> Tensor:
    """Return the largest norm of a row of each head, float32 `[B, heads]`; x is `[B, T, heads, D]`, read once."""
    batch, num_rows, num_heads, head_dim = x.shape
    blocks = -(-num_rows // _BLOCK_ROWS)
    norms = x.new_empty((batch, num_heads, blocks), dtype=torch.float32)
    with on_device(x):
        _norms_of_blocks[(blocks, num_heads, batch)](
            x, norms, *x.stride()[:3], num_rows, HEAD_DIM=head_dim, BLOCK_DIM=triton.next_power_of_2(head_dim),
            BLOCK_ROWS=_BLOCK_ROWS, **FUSED,
        )  # fmt: skip
    return norms.amax(dim=-1)


def share_saved(
    slopes: Sequence[float], window: int, product_bound: float, rows: int, keys: int, bias: float = 0.0
) -> float:
    """Return the share of the forward's matrix products that skipping saves, far into a sequence, all heads alike.

    Args:
        slopes: of the heads.
        window: W.
        product_bound: c, the largest `|scale * q.k|` the norms allow.
        rows, keys: of a tile.
        bias: b, the score bias.
    """
    left, right, tiles = far_tiles_of_keys(window, rows, keys)
    first = rows - tiles * keys
    saved = 0.0
    for slope in slopes:
        count = min(max((1 - _reach_on_host(slope, bias, product_bound) - first) // keys, 0), right)
        # a masked tile of a positive slope is no sum of values
        saved += count if slope < 0 else max(count - left, 0)
    return saved / (len(slopes) * tiles)


def _reach_on_host(slope: float, bias: float, product_bound: float) -> int:
    if slope == 0:
        return 2**30
    distance = (SLACK * product_bound + (bias if slope < 0 else -bias) + SATURATION) / abs(slope)
    return min(max(math.ceil(distance), 0), 2**30)


@triton.jit(do_not_specialize=SIZES)
def _norms_of_blocks(
    x_ptr, norms_ptr, stride_b, stride_t, stride_h, num_rows, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    sequence = tl.program_id(2).to(tl.int64)
    x_ptr += sequence * stride_b + head * stride_h
    x = load_tile(x_ptr, block * BLOCK_ROWS, stride_t, num_rows, HEAD_DIM, BLOCK_DIM, BLOCK_ROWS, True).to(tl.float32)
    tl.store(norms_ptr + ((sequence * tl.num_programs(1) + head) * tl.num_programs(0) + block), largest_norm(x))


@triton.jit
def largest_norm(x):
    """Return the largest norm of a row of a float32 tile; infinite where one is not a number, which hides nothing."""
    squares = tl.sum(x * x, axis=1)
    return tl.sqrt(tl.max(tl.where(squares == squares, squares, float("inf")), axis=0))


@triton.jit
def reach(slope, bias, scale, query_norm, key_norm):
    """Return the distance from which on a head is saturated, int32; slope and bias as in the contract.

    Nothing is saturated, at any distance, where the slope is 0 or a norm is not a finite number.
    """
    product_bound = tl.abs(scale) * query_norm * key_norm * _SLACK
    signed_bias = tl.where(slope < 0, bias, -bias)
    distance = (product_bound + signed_bias + _SATURATION) / tl.maximum(tl.abs(slope), 1e-30)
    # a maximum would take NaN for 0, and everything for saturated
    nowhere = (slope == 0) | (distance != distance)
    distance = tl.minimum(tl.maximum(distance, 0.0), 1073741824.0)
    return tl.ceil(tl.where(nowhere, 1073741824.0, distance)).to(tl.int32)


@triton.jit
def saturated_tiles(
    q, key_norm, slope, bias, scale, first_row, start, right, lower_ptr, last_ptr, num_queries, num_keys, offset,
    window, RAGGED: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Return how many tiles of keys from `start` on are saturated for all rows of the tile q, at most `right`."""
    query_norm = largest_norm(q.to(tl.float32))
    # the first row is nearest to every key
    _, nearest = visible_keys(lower_ptr, last_ptr, first_row, num_queries, num_keys, offset, window, RAGGED)
    keys = nearest - reach(slope, bias, scale, query_norm, key_norm) - start + 1
    return tl.minimum(tl.maximum(keys, 0) // BLOCK_KEYS, right)


@triton.jit
def add_values(
    total, base, stride_row, num_rows, start, begin, end, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    LENGTH: tl.constexpr,
):  # fmt: skip
    """Add to every row of a sum the rows of whole tiles: what weights of 1 add, of values or of output gradients."""
    everywhere = tl.zeros([BLOCK_DIM], dtype=tl.float32)
    for tile in tl.range(scalar(begin), scalar(end)):
        v = load_tile(base, start + tile * LENGTH, stride_row, num_rows, HEAD_DIM, BLOCK_DIM, LENGTH, False)
        everywhere += tl.sum(v.to(tl.float32), axis=0)
    return total + everywhere[None, :]
