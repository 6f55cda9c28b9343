"""Forward kernel: one tile of rows of one head goes over its window in three loops.

The left edge is masked, the middle is not, the diagonal is masked: a masked score costs 1.7 times the instructions of
an unmasked one. A narrow window has hardly a middle and takes one loop, masked. Sigmoid needs no row maximum, no sum
and no rescaling.
"""

# Triton rewrites the bodies of kernels, which a checker of Python misreads
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl

from swat_lm.ops.calls import Attended, AttentionCall
from swat_lm.ops.head_bias import HeadBias
from swat_lm.ops.triton.configurations import Problem, configuration, is_one_loop, launch_options
from swat_lm.ops.triton.device import (
    LN_2,
    SIZES,
    exp2,
    hide,
    load_tile,
    on_device,
    scalar,
    score_unit,
    sigmoid,
    store_tile,
    with_dense_channels,
)
from swat_lm.ops.triton.geometry import Rows, tiles_of_rows, visible_keys
from swat_lm.ops.triton.precision import is_fast, is_folded
from swat_lm.ops.triton.rotation import angle_stride, load_rotated, rotate
from swat_lm.ops.triton.saturation import add_values, largest_norms, saturated_tiles


def forward(call: AttentionCall) -> Attended:
    """Return the output and what the backward needs of it. `skip_saturated` is explained in `saturation.py`."""
    query, key, value, cos, sin, scale, softmax = (
        call.query, call.key, call.value, call.cos, call.sin, call.scale, call.softmax
    )  # fmt: skip
    batch, num_queries, num_heads, head_dim = query.shape
    num_keys, num_kv_heads = key.shape[1], key.shape[2]
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty((batch, num_queries, num_heads) if softmax else (0,), dtype=torch.float32)
    rotated = torch.empty_like(output) if cos is not None else query.new_empty(0)
    if output.numel() == 0:
        return Attended(output, lse, rotated, query.new_empty(0 if cos is None else key.shape))
    query, key, value = (with_dense_channels(t) for t in (query, key, value))
    bias, rows = HeadBias(*(t.contiguous() for t in call.head_bias()[:2])), Rows.of(call)
    fast = is_fast(call)
    if cos is not None and sin is not None:
        key = rotate(key, cos, sin, key.dtype)
    problem = Problem.of(query, key, rows.window, call.score_function)._replace(rotary=cos is not None)
    tile = configuration("forward", problem)
    group = num_heads // num_kv_heads
    key_norms = largest_norms(key) if call.skip_saturated and key.numel() else None
    one_loop = is_one_loop("forward", problem, tile)
    with on_device(query):
        _forward[(triton.cdiv(num_queries, tile.rows) * group, num_kv_heads, batch)](
            query, key, value, output, lse, bias.slopes, bias.constant, rows.lower, rows.last, cos, sin, rotated,
            key_norms, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *output.stride()[:3],
            angle_stride(cos), num_queries, num_keys, rows.offset, rows.window, scale,
            GROUP=group, HEAD_DIM=head_dim, BLOCK_DIM=problem.block_dim, BLOCK_ROWS=tile.rows, BLOCK_KEYS=tile.keys,
            SOFTMAX=softmax, FAST=fast, FOLDED=is_folded(scale, fast, one_loop),
            RAGGED=rows.last is not None, ROTARY=cos is not None, SKIP=key_norms is not None, HARDWARE=problem.hardware,
            ONE_LOOP=one_loop, INPUT_PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            **launch_options(tile),
        )  # fmt: skip
    return Attended(output, lse, rotated, key if cos is not None else query.new_empty(0))


@triton.jit(do_not_specialize=SIZES)
def _forward(
    query_ptr, key_ptr, value_ptr, output_ptr, lse_ptr, slopes_ptr, bias_ptr, lower_ptr, last_ptr,
    cos_ptr, sin_ptr, rotated_ptr, key_norms_ptr, stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh, stride_ob, stride_ot, stride_oh, stride_ab,
    num_queries, num_keys, offset, window, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, SOFTMAX: tl.constexpr, FAST: tl.constexpr,
    FOLDED: tl.constexpr, RAGGED: tl.constexpr, ROTARY: tl.constexpr, SKIP: tl.constexpr, HARDWARE: tl.constexpr,
    ONE_LOOP: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    # the heads of a group lie next to each other, so that the second finds its keys in the cache
    member = tl.program_id(0) % GROUP
    # late rows first: in full attention they have the most work
    block = tl.num_programs(0) // GROUP - 1 - tl.program_id(0) // GROUP
    kv_head = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    head = kv_head * GROUP + member
    first_row = block * BLOCK_ROWS
    if RAGGED:
        lower_ptr += sequence * num_queries
        last_ptr += sequence * num_queries
    start, left, right, count = tiles_of_rows(
        lower_ptr, last_ptr, first_row, num_queries, num_keys, offset, window, RAGGED, BLOCK_ROWS, BLOCK_KEYS
    )  # fmt: skip
    row = tl.minimum(first_row + tl.arange(0, BLOCK_ROWS), num_queries - 1)
    lower, last = visible_keys(lower_ptr, last_ptr, row, num_queries, num_keys, offset, window, RAGGED)
    unit = score_unit(SOFTMAX, FAST)
    slope = tl.load(slopes_ptr + head)
    bias = tl.load(bias_ptr + head)

    # where an input's heads lie apart, their offsets exceed 32 bits; our own results are contiguous
    query_ptr += sequence * stride_qb + head.to(tl.int64) * stride_qh
    if ROTARY:
        q = load_rotated(
            query_ptr, first_row, stride_qt, num_queries, cos_ptr + sequence * stride_ab,
            sin_ptr + sequence * stride_ab, HEAD_DIM, BLOCK_DIM, BLOCK_ROWS, False,
        ).to(query_ptr.dtype.element_ty)  # fmt: skip
        rotated_ptr += sequence * stride_ob + head * stride_oh
        store_tile(rotated_ptr, first_row, stride_ot, num_queries, q, HEAD_DIM, BLOCK_DIM, BLOCK_ROWS)
    else:
        q = load_tile(query_ptr, first_row, stride_qt, num_queries, HEAD_DIM, BLOCK_DIM, BLOCK_ROWS, True)
    key_ptr += sequence * stride_kb + kv_head.to(tl.int64) * stride_kh
    value_ptr += sequence * stride_vb + kv_head.to(tl.int64) * stride_vh
    total = tl.zeros([BLOCK_ROWS, BLOCK_DIM], dtype=tl.float32)
    largest = tl.full([BLOCK_ROWS], float("-inf"), dtype=tl.float32)
    mass = tl.zeros([BLOCK_ROWS], dtype=tl.float32)
    if SKIP:
        saturated = saturated_tiles(
            q, tl.load(key_norms_ptr + sequence * tl.num_programs(1) + kv_head), slope, bias, scale,
            tl.minimum(first_row, num_queries - 1), start, right, lower_ptr, last_ptr, num_queries, num_keys, offset,
            window, RAGGED, BLOCK_KEYS,
        )  # fmt: skip
        # a positive head's weights are 1 there: it sums the values of tiles in the middle, and masked ones as ever
        begin = tl.where(slope > 0, 0, saturated)
        middle = tl.maximum(left, saturated)
        if not ONE_LOOP:
            total = add_values(
                total, value_ptr, stride_vs, num_keys, start, left, tl.where(slope > 0, middle, left), HEAD_DIM,
                BLOCK_DIM, BLOCK_KEYS,
            )  # fmt: skip
    else:
        begin = 0
        middle = left
    slope = slope * unit
    bias = bias * unit
    scale = scale * unit
    if FOLDED:
        q = (q.to(tl.float32) * scale).to(q.dtype)
    masked_end = count if ONE_LOOP else left
    total, largest, mass = _over_keys(
        total, largest, mass, q, key_ptr, value_ptr, stride_ks, stride_vs, lower, last, start, begin, masked_end,
        num_keys, scale, slope, bias, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS, SOFTMAX, FAST, FOLDED, True, HARDWARE,
        INPUT_PRECISION,
    )  # fmt: skip
    if not ONE_LOOP:
        total, largest, mass = _over_keys(
            total, largest, mass, q, key_ptr, value_ptr, stride_ks, stride_vs, lower, last, start, middle, right,
            num_keys, scale, slope, bias, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS, SOFTMAX, FAST, FOLDED, False, HARDWARE,
            INPUT_PRECISION,
        )  # fmt: skip
        total, largest, mass = _over_keys(
            total, largest, mass, q, key_ptr, value_ptr, stride_ks, stride_vs, lower, last, start, right, count,
            num_keys, scale, slope, bias, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS, SOFTMAX, FAST, FOLDED, True, HARDWARE,
            INPUT_PRECISION,
        )  # fmt: skip

    if SOFTMAX:
        seen = mass > 0.0
        total = total / tl.where(seen, mass, 1.0)[:, None]
        lse = tl.where(seen, (largest + tl.log2(tl.where(seen, mass, 1.0))) * LN_2, float("-inf"))
        own_row = first_row + tl.arange(0, BLOCK_ROWS)
        pointers = lse_ptr + ((sequence * num_queries + own_row) * tl.num_programs(1) * GROUP + head)
        tl.store(pointers, lse, mask=own_row < num_queries)
    output_ptr += sequence * stride_ob + head * stride_oh
    store_tile(output_ptr, first_row, stride_ot, num_queries, total, HEAD_DIM, BLOCK_DIM, BLOCK_ROWS)


@triton.jit
def _over_keys(
    total, largest, mass, q, key_ptr, value_ptr, stride_ks, stride_vs, lower, last, start, begin, end, num_keys,
    scale, slope, bias, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    SOFTMAX: tl.constexpr, FAST: tl.constexpr, FOLDED: tl.constexpr, MASKED: tl.constexpr, HARDWARE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    for tile in tl.range(scalar(begin), scalar(end)):
        first_key = start + tile * BLOCK_KEYS
        k = load_tile(key_ptr, first_key, stride_ks, num_keys, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS, MASKED)
        score = tile_scores(
            q, k, first_key, lower, last, num_keys, scale, slope, bias, BLOCK_KEYS, SOFTMAX, FAST, FOLDED, MASKED,
            INPUT_PRECISION,
        )  # fmt: skip
        v = load_tile(value_ptr, first_key, stride_vs, num_keys, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS, MASKED)
        if SOFTMAX:
            new_largest = tl.maximum(largest, tl.max(score, axis=1))
            # a row that has seen nothing yet has no maximum to subtract
            finite = tl.where(new_largest == float("-inf"), 0.0, new_largest)
            weight = exp2(score - finite[:, None], HARDWARE)
            shrink = exp2(largest - finite, HARDWARE)
            mass = mass * shrink + tl.sum(weight, axis=1)
            total = total * shrink[:, None]
            largest = new_largest
        else:
            weight = sigmoid(score, FAST, HARDWARE)
        total = tl.dot(weight.to(v.dtype), v, total, input_precision=INPUT_PRECISION)
    return total, largest, mass


@triton.jit
def tile_scores(
    q, k, first_key, lower, last, num_keys, scale, slope, bias, BLOCK_KEYS: tl.constexpr, SOFTMAX: tl.constexpr,
    FAST: tl.constexpr, FOLDED: tl.constexpr, MASKED: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the scores `[rows, keys]` of a tile, in their unit; FOLDED queries are multiplied by scale and unit."""
    column = tl.arange(0, BLOCK_KEYS)
    # distances are integers relative to the tile, exact at any position
    row_part = slope * (last - first_key).to(tl.float32) + bias
    offsets = tl.fma(column.to(tl.float32)[None, :], -slope, row_part[:, None])
    if FOLDED:
        # the product adds to them: no multiplication of scores is left
        score = tl.dot(q, tl.trans(k), offsets, input_precision=INPUT_PRECISION)
    else:
        score = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION) * scale + offsets
    if MASKED:
        high = tl.minimum(last, num_keys - 1) - first_key
        score = hide(score, (lower - first_key)[:, None], high[:, None], column[None, :], BLOCK_KEYS, SOFTMAX, FAST)
    return score
