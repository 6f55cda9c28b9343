"""Backward kernels: gradients of queries by tiles of rows, gradients of keys and values by tiles of keys.

Weights are recomputed. The heads of a group are summed inside the block that owns the keys, so nothing is added twice
and no order of addition is left open. Called by backward.py; the equations are in docs/mathematics.md.
"""

# Triton rewrites the bodies of kernels, which a checker of Python misreads
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import triton
import triton.language as tl

from swat_lm.ops.triton.device import (
    LOG2_E,
    SIZES,
    derivative_unit,
    exp2,
    hide,
    load_tile,
    scalar,
    score_unit,
    sigmoid,
    sigmoid_derivative,
    store_tile,
)
from swat_lm.ops.triton.forward import tile_scores
from swat_lm.ops.triton.geometry import rows_of_keys, rows_of_tile, tiles_of_rows, visible_keys
from swat_lm.ops.triton.rotation import rotate_back
from swat_lm.ops.triton.saturation import add_values, reach, saturated_tiles


@triton.jit(do_not_specialize=SIZES)
def backward_query(
    query_ptr, key_ptr, value_ptr, grad_output_ptr, grad_query_ptr, lse_ptr, shift_ptr, slopes_ptr, bias_ptr,
    lower_ptr, last_ptr, cos_ptr, sin_ptr, key_norms_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh, stride_ob, stride_ot, stride_oh, stride_gb, stride_gt, stride_gh,
    stride_ab, num_queries, num_keys, offset, window, scale, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, SOFTMAX: tl.constexpr, FAST: tl.constexpr, FOLDED: tl.constexpr, RAGGED: tl.constexpr,
    ROTARY: tl.constexpr, SKIP: tl.constexpr, HARDWARE: tl.constexpr, ONE_LOOP: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one tile of queries of one head."""
    member = tl.program_id(0) % GROUP
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
    row = first_row + tl.arange(0, BLOCK_ROWS)
    lower, last = visible_keys(
        lower_ptr, last_ptr, tl.minimum(row, num_queries - 1), num_queries, num_keys, offset, window, RAGGED
    )  # fmt: skip
    unit = score_unit(SOFTMAX, FAST)
    slope = tl.load(slopes_ptr + head)
    bias = tl.load(bias_ptr + head)

    query_ptr += sequence * stride_qb + head.to(tl.int64) * stride_qh
    q = load_tile(query_ptr, first_row, stride_qt, num_queries, HEAD_DIM, BLOCK_DIM, BLOCK_ROWS, True)
    grad_output_ptr += sequence * stride_ob + head.to(tl.int64) * stride_oh
    d_out = load_tile(grad_output_ptr, first_row, stride_ot, num_queries, HEAD_DIM, BLOCK_DIM, BLOCK_ROWS, True)
    key_ptr += sequence * stride_kb + kv_head.to(tl.int64) * stride_kh
    value_ptr += sequence * stride_vb + kv_head.to(tl.int64) * stride_vh
    num_heads = tl.num_programs(1) * GROUP
    normaliser, shift = row_statistics(
        lse_ptr, shift_ptr, sequence * num_queries * num_heads + head, row, num_heads, num_queries, SOFTMAX
    )  # fmt: skip
    d_query = tl.zeros([BLOCK_ROWS, BLOCK_DIM], dtype=tl.float32)
    if SKIP:
        # a saturated weight has no gradient, be it 0 or 1
        saturated = saturated_tiles(
            q, tl.load(key_norms_ptr + sequence * tl.num_programs(1) + kv_head), slope, bias, scale,
            tl.minimum(first_row, num_queries - 1), start, right, lower_ptr, last_ptr, num_queries, num_keys, offset,
            window, RAGGED, BLOCK_KEYS,
        )  # fmt: skip
    else:
        saturated = 0
    middle = tl.maximum(left, saturated)
    masked_end = count if ONE_LOOP else left
    slope = slope * unit
    bias = bias * unit
    if FOLDED:
        q = (q.to(tl.float32) * (scale * unit)).to(q.dtype)
    d_query = _over_keys(
        d_query, q, d_out, normaliser, shift, key_ptr, value_ptr, stride_ks, stride_vs, lower, last, start, saturated,
        masked_end, num_keys, scale * unit, slope, bias, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS, SOFTMAX, FAST, FOLDED, True,
        HARDWARE, INPUT_PRECISION,
    )  # fmt: skip
    if not ONE_LOOP:
        d_query = _over_keys(
            d_query, q, d_out, normaliser, shift, key_ptr, value_ptr, stride_ks, stride_vs, lower, last, start, middle,
            right, num_keys, scale * unit, slope, bias, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS, SOFTMAX, FAST, FOLDED, False,
            HARDWARE, INPUT_PRECISION,
        )  # fmt: skip
        d_query = _over_keys(
            d_query, q, d_out, normaliser, shift, key_ptr, value_ptr, stride_ks, stride_vs, lower, last, start, right,
            count, num_keys, scale * unit, slope, bias, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS, SOFTMAX, FAST, FOLDED, True,
            HARDWARE, INPUT_PRECISION,
        )  # fmt: skip
    d_query = d_query * (scale / derivative_unit(SOFTMAX, FAST))
    if ROTARY:
        d_query = rotate_back(
            d_query, first_row, num_queries, cos_ptr + sequence * stride_ab, sin_ptr + sequence * stride_ab, HEAD_DIM,
            BLOCK_DIM, BLOCK_ROWS,
        )  # fmt: skip
    grad_query_ptr += sequence * stride_gb + head * stride_gh
    store_tile(grad_query_ptr, first_row, stride_gt, num_queries, d_query, HEAD_DIM, BLOCK_DIM, BLOCK_ROWS)


@triton.jit
def _over_keys(
    d_query, q, d_out, normaliser, shift, key_ptr, value_ptr, stride_ks, stride_vs, lower, last, start, begin, end,
    num_keys, scale, slope, bias, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    SOFTMAX: tl.constexpr, FAST: tl.constexpr, FOLDED: tl.constexpr, MASKED: tl.constexpr, HARDWARE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    for tile in tl.range(scalar(begin), scalar(end)):
        first_key = start + tile * BLOCK_KEYS
        k = load_tile(key_ptr, first_key, stride_ks, num_keys, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS, MASKED)
        v = load_tile(value_ptr, first_key, stride_vs, num_keys, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS, MASKED)
        score = tile_scores(
            q, k, first_key, lower, last, num_keys, scale, slope, bias, BLOCK_KEYS, SOFTMAX, FAST, FOLDED, MASKED,
            INPUT_PRECISION,
        )  # fmt: skip
        d_weight = tl.dot(d_out, tl.trans(v), input_precision=INPUT_PRECISION)
        if SOFTMAX:
            weight = exp2(score - normaliser[:, None], HARDWARE)
            d_score = weight * (d_weight - shift[:, None])
        else:
            d_score = sigmoid_derivative(score, FAST, HARDWARE) * d_weight
        d_query = tl.dot(d_score.to(k.dtype), k, d_query, input_precision=INPUT_PRECISION)
    return d_query


@triton.jit
def row_statistics(lse_ptr, shift_ptr, begin, row, num_heads, num_queries, SOFTMAX: tl.constexpr):
    """Return softmax's normaliser in the unit of scores and its shift; a row that sees nothing gets weights of 0."""
    if SOFTMAX:
        exists = row < num_queries
        normaliser = tl.load(lse_ptr + begin + row * num_heads, mask=exists, other=float("inf")) * LOG2_E
        return normaliser, tl.load(shift_ptr + begin + row * num_heads, mask=exists, other=0.0)
    else:
        return 0.0, 0.0


@triton.jit(do_not_specialize=SIZES)
def backward_key(
    query_ptr, key_ptr, value_ptr, grad_output_ptr, grad_key_ptr, grad_value_ptr, grad_query_ptr, per_head_ptr,
    lse_ptr, shift_ptr, slopes_ptr, bias_ptr, last_ptr, table_ptr, cos_ptr, sin_ptr,
    query_norms_ptr, key_norms_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_ob, stride_ot, stride_oh, stride_hb, stride_hs, stride_hh, stride_gb, stride_gt, stride_gh,
    stride_ab, num_queries, num_keys, offset, window, scale, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, SOFTMAX: tl.constexpr, FAST: tl.constexpr, FOLDED: tl.constexpr, RAGGED: tl.constexpr,
    ROTARY: tl.constexpr, SKIP: tl.constexpr, HARDWARE: tl.constexpr, ONE_LOOP: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    PER_HEAD: tl.constexpr, QUERY: tl.constexpr, REGULAR_LAST: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one tile of keys and values, and add to those of slopes and queries where asked to."""
    block = tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    first_key = block * BLOCK_KEYS
    num_heads = tl.num_programs(1) * GROUP
    if RAGGED:
        last_ptr += sequence * num_queries
        table_ptr += sequence * 2 * num_keys
    start, left, right, count = rows_of_tile(
        table_ptr, first_key, num_queries, num_keys, offset, window, RAGGED, BLOCK_ROWS, BLOCK_KEYS
    )  # fmt: skip
    from_row, to_row = rows_of_keys(table_ptr, first_key + tl.arange(0, BLOCK_KEYS), num_keys, offset, window, RAGGED)
    unit = score_unit(SOFTMAX, FAST)
    key_ptr += sequence * stride_kb + kv_head.to(tl.int64) * stride_kh
    value_ptr += sequence * stride_vb + kv_head.to(tl.int64) * stride_vh
    k = load_tile(key_ptr, first_key, stride_ks, num_keys, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS, True)
    v = load_tile(value_ptr, first_key, stride_vs, num_keys, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS, True)
    # a power of two: exact
    k_folded = (k.to(tl.float32) * (scale * unit)).to(k.dtype) if FOLDED else k
    d_key = tl.zeros([BLOCK_KEYS, BLOCK_DIM], dtype=tl.float32)
    d_value = tl.zeros([BLOCK_KEYS, BLOCK_DIM], dtype=tl.float32)
    for member in tl.range(0, GROUP):
        head = kv_head * GROUP + member
        slope = tl.load(slopes_ptr + head)
        bias = tl.load(bias_ptr + head)
        q_ptr = query_ptr + sequence * stride_qb + head.to(tl.int64) * stride_qh
        o_ptr = grad_output_ptr + sequence * stride_ob + head.to(tl.int64) * stride_oh
        g_ptr = grad_query_ptr + sequence * stride_gb + head * stride_gh
        statistics = sequence * num_queries * num_heads + head
        near = count
        if SKIP and REGULAR_LAST:
            # tiles of rows so far behind the last key that every weight is 0 or 1
            distance = reach(
                slope, bias, scale, tl.load(query_norms_ptr + sequence * num_heads + head),
                tl.load(key_norms_ptr + sequence * tl.num_programs(1) + kv_head),
            )  # fmt: skip
            far_row = tl.minimum(first_key + BLOCK_KEYS, num_keys) - 1 + distance - offset
            near = tl.maximum(far_row - start + BLOCK_ROWS - 1, 0) // BLOCK_ROWS
            near = tl.minimum(tl.maximum(near, left), count)
        inner_end = tl.minimum(right, near)
        outer_end = tl.maximum(right, near)
        if SKIP and REGULAR_LAST:
            # a positive head's weights are 1 there: see the forward
            if ONE_LOOP:
                near = tl.where(slope > 0, count, near)
            else:
                outer_end = tl.where(slope > 0, count, outer_end)
                d_value = add_values(
                    d_value, o_ptr, stride_ot, num_queries, start, inner_end, tl.where(slope > 0, right, inner_end),
                    HEAD_DIM, BLOCK_DIM, BLOCK_ROWS,
                )  # fmt: skip
        slope = slope * unit
        bias = bias * unit
        d_slope = tl.zeros([BLOCK_KEYS], dtype=tl.float32)
        d_bias = tl.zeros([BLOCK_KEYS], dtype=tl.float32)
        # a name of its own: `left` is the next head's too
        masked_end = near if ONE_LOOP else left
        d_key, d_value, d_slope, d_bias = _over_rows(
            d_key, d_value, d_slope, d_bias, k, k_folded, v, q_ptr, o_ptr, g_ptr, stride_qt, stride_ot, stride_gt,
            lse_ptr, shift_ptr, statistics, num_heads, last_ptr, from_row, to_row, start, 0, masked_end, first_key,
            num_queries, offset, scale, unit, slope, bias, HEAD_DIM, BLOCK_DIM, BLOCK_ROWS, BLOCK_KEYS, SOFTMAX,
            FAST, FOLDED, REGULAR_LAST, True, HARDWARE, INPUT_PRECISION, PER_HEAD, QUERY,
        )  # fmt: skip
        if not ONE_LOOP:
            d_key, d_value, d_slope, d_bias = _over_rows(
                d_key, d_value, d_slope, d_bias, k, k_folded, v, q_ptr, o_ptr, g_ptr, stride_qt, stride_ot, stride_gt,
                lse_ptr, shift_ptr, statistics, num_heads, last_ptr, from_row, to_row, start, left, inner_end,
                first_key, num_queries, offset, scale, unit, slope, bias, HEAD_DIM, BLOCK_DIM, BLOCK_ROWS, BLOCK_KEYS,
                SOFTMAX, FAST, FOLDED, REGULAR_LAST, False, HARDWARE, INPUT_PRECISION, PER_HEAD, QUERY,
            )  # fmt: skip
            d_key, d_value, d_slope, d_bias = _over_rows(
                d_key, d_value, d_slope, d_bias, k, k_folded, v, q_ptr, o_ptr, g_ptr, stride_qt, stride_ot, stride_gt,
                lse_ptr, shift_ptr, statistics, num_heads, last_ptr, from_row, to_row, start, right, outer_end,
                first_key, num_queries, offset, scale, unit, slope, bias, HEAD_DIM, BLOCK_DIM, BLOCK_ROWS, BLOCK_KEYS,
                SOFTMAX, FAST, FOLDED, REGULAR_LAST, True, HARDWARE, INPUT_PRECISION, PER_HEAD, QUERY,
            )  # fmt: skip
        if PER_HEAD:
            pointers = per_head_ptr + ((sequence * num_heads + head) * tl.num_programs(0) + block) * 2
            tl.store(pointers, tl.sum(d_slope, axis=0))
            tl.store(pointers + 1, tl.sum(d_bias, axis=0))
    d_key = d_key * scale
    if ROTARY:
        d_key = rotate_back(
            d_key, first_key, num_keys, cos_ptr + sequence * stride_ab, sin_ptr + sequence * stride_ab, HEAD_DIM,
            BLOCK_DIM, BLOCK_KEYS,
        )  # fmt: skip
    place = sequence * stride_hb + kv_head * stride_hh
    store_tile(grad_key_ptr + place, first_key, stride_hs, num_keys, d_key, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS)
    store_tile(grad_value_ptr + place, first_key, stride_hs, num_keys, d_value, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS)


@triton.jit
def _over_rows(
    d_key, d_value, d_slope, d_bias, k, k_folded, v, query_ptr, grad_output_ptr, grad_query_ptr, stride_qt, stride_ot,
    stride_gt, lse_ptr, shift_ptr, statistics, num_heads, last_ptr, from_row, to_row, start, begin, end, first_key,
    num_queries, offset, scale, unit, slope, bias, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, SOFTMAX: tl.constexpr, FAST: tl.constexpr,
    FOLDED: tl.constexpr, REGULAR_LAST: tl.constexpr, MASKED: tl.constexpr, HARDWARE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, PER_HEAD: tl.constexpr, QUERY: tl.constexpr,
):  # fmt: skip
    index = tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_KEYS).to(tl.float32)
    for tile in tl.range(scalar(begin), scalar(end)):
        first_row = start + tile * BLOCK_ROWS
        row = first_row + index
        q = load_tile(query_ptr, first_row, stride_qt, num_queries, HEAD_DIM, BLOCK_DIM, BLOCK_ROWS, MASKED)
        d_out = load_tile(grad_output_ptr, first_row, stride_ot, num_queries, HEAD_DIM, BLOCK_DIM, BLOCK_ROWS, MASKED)
        normaliser, shift = row_statistics(
            lse_ptr, shift_ptr, statistics, row, num_heads, num_queries, SOFTMAX
        )  # fmt: skip
        if REGULAR_LAST:
            # rows one after another: only their first distance changes from tile to tile
            first_distance = (first_row + offset - first_key).to(tl.float32)
            distance = index.to(tl.float32) + first_distance
            row_part = tl.fma(index.to(tl.float32), slope, slope * first_distance + bias)
        else:
            last = tl.load(last_ptr + row, mask=row < num_queries, other=0)
            distance = (last - first_key).to(tl.float32)
            row_part = slope * distance + bias
        # keys by rows: the weights are then the left factor of both products, straight from registers
        offsets = tl.fma(column[:, None], -slope, row_part[None, :])
        if FOLDED:
            score = tl.dot(k_folded, tl.trans(q), offsets, input_precision=INPUT_PRECISION)
        else:
            score = tl.dot(k, tl.trans(q), input_precision=INPUT_PRECISION) * (scale * unit) + offsets
        if MASKED:
            low, high = from_row - first_row, to_row - first_row
            score = hide(score, low[:, None], high[:, None], index[None, :], BLOCK_ROWS, SOFTMAX, FAST)
        if SOFTMAX:
            weight = exp2(score - normaliser[None, :], HARDWARE)
        else:
            weight = sigmoid(score, FAST, HARDWARE)
        d_value = tl.dot(weight.to(d_out.dtype), d_out, d_value, input_precision=INPUT_PRECISION)
        d_weight = tl.dot(v, tl.trans(d_out), input_precision=INPUT_PRECISION)
        if SOFTMAX:
            d_score = weight * (d_weight - shift[None, :])
        else:
            part = weight * d_weight
            d_score = part - weight * part
        if PER_HEAD:
            own = tl.sum(d_score, axis=1)
            d_bias += own
            d_slope += tl.sum(d_score * distance[None, :], axis=1) - own * column
        d_score = d_score.to(q.dtype)
        d_key = tl.dot(d_score, q, d_key, input_precision=INPUT_PRECISION)
        if QUERY:
            d_query = tl.dot(tl.trans(d_score), k, input_precision=INPUT_PRECISION) * scale
            channel = tl.arange(0, BLOCK_DIM)
            places = first_row.to(tl.int64) * stride_gt + index[:, None] * stride_gt + channel[None, :]
            inside = (row < num_queries)[:, None] & (channel < HEAD_DIM)[None, :]
            tl.atomic_add(grad_query_ptr + places, d_query, mask=inside, sem="relaxed")
    return d_key, d_value, d_slope, d_bias
