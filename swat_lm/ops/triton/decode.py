"""One decoding step over rings of keys and values as one kernel: rotates, writes the ring's place, attends.

A program serves one sequence and one key/value head with all its query heads; few sequences share their window out over
several programs, of which the last to finish adds the parts up, in a fixed order. The new token does not go through the
ring: it is attended to from registers and its place is left out, so nothing waits for the write.
"""

# Triton rewrites the bodies of kernels, which a checker of Python misreads
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from swat_lm.ops.calls import StepCall
from swat_lm.ops.triton.availability import gpu_of
from swat_lm.ops.triton.configurations import FUSED
from swat_lm.ops.triton.device import (
    LN_2,
    exp2,
    hidden_score,
    on_device,
    scalar,
    score_unit,
    sigmoid,
    with_dense_channels,
)

# programs wanted on every multiprocessor, and the fewest places of a ring that are worth a program of their own
PROGRAMS_PER_MULTIPROCESSOR = 2
FEWEST_PLACES = 128
# under the interpreter, an H100's
MULTIPROCESSORS_WITHOUT_GPU = 132
# bytes of one tile of keys; with three stages, 32 KiB of keys and values are on their way at any time
TILE_BYTES = 8192


class DecodeTile(NamedTuple):
    """Query heads of a program (1, or what tensor cores take), padded head size, places, stages and warps."""

    rows: int
    block_dim: int
    places: int
    stages: int
    warps: int

    @classmethod
    def of(cls, group: int, head_dim: int, element_bytes: int) -> "DecodeTile":
        """The rule: tiles of equal bytes, more warps where one warp would hold too many sums."""
        block_dim = max(16, 1 << (head_dim - 1).bit_length())
        rows = 1 if group == 1 else max(16, 1 << (group - 1).bit_length())
        places = max(16, min(64, TILE_BYTES // (block_dim * element_bytes)))
        wide = rows > 16 or (rows == 1 and block_dim > 64)
        return cls(rows, block_dim, places, 3, 8 if wide else 4)


def num_splits(num_programs: int, window: int, num_multiprocessors: int) -> int:
    """Programs that share one window: 1 once sequences and heads alone fill the device.

    The rule sees shapes, never positions: a captured CUDA graph stays right at every step.
    """
    wanted = -(-PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors // num_programs)
    return max(1, min(wanted, -(-window // FEWEST_PLACES)))


def step(call: StepCall, splits: int | None = None) -> tuple[Tensor, Tensor]:
    """Write the new key and value, attend; `(output [B, 1, H, D], lse [B, 1, H])`, the lse empty for sigmoid.

    Weights are exact for every `precision`: a step waits for memory. Nothing depends on the values of a tensor on the
    host, so the call can be captured in a CUDA graph.

    `splits` is the number of programs per window, by the rule when None.
    """
    query, key, value = (with_dense_channels(x) for x in (call.query, call.key, call.value))
    key_ring, value_ring, softmax = call.key_ring, call.value_ring, call.softmax
    slot, position = call.slot.contiguous(), call.position.contiguous()
    slopes, score_bias = (None if x is None else x.contiguous() for x in (call.slopes, call.score_bias))
    cos, sin = (None if x is None else with_dense_channels(x) for x in (call.cos, call.sin))
    batch, _, num_heads, head_dim = query.shape
    window, num_kv_heads = key_ring.shape[1:3]
    if batch == 0:
        return torch.empty_like(query), query.new_empty(query.shape[:3] if softmax else (0,), dtype=torch.float32)
    tile = DecodeTile.of(num_heads // num_kv_heads, head_dim, key_ring.element_size())
    gpu = gpu_of(query.device)
    if splits is None:
        splits = num_splits(
            batch * num_kv_heads, window, gpu.num_multiprocessors if gpu else MULTIPROCESSORS_WITHOUT_GPU
        )
    # whole tiles for every program
    places = -(-window // (splits * tile.places)) * tile.places
    splits = -(-window // places)
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = output.new_empty(query.shape[:3] if softmax else (0,), dtype=torch.float32)
    parts = maxima = totals = arrivals = None
    if splits > 1:
        parts = output.new_empty((splits, *query.shape), dtype=torch.float32)
        maxima, totals = (
            output.new_empty((2, splits, *query.shape[:3]), dtype=torch.float32) if softmax else (None,) * 2
        )
        arrivals = output.new_zeros(batch * num_kv_heads, dtype=torch.int32)
    with on_device(query):
        _decode[batch * num_kv_heads, splits](
            query, key, value, key_ring, value_ring, slot, position, slopes, score_bias, cos, sin,
            output, lse, parts, maxima, totals, arrivals,
            query.stride(0), query.stride(2), key.stride(0), key.stride(2), value.stride(0), value.stride(2),
            *key_ring.stride(), *value_ring.stride(),
            0 if cos is None else cos.stride(0), 0 if sin is None else sin.stride(0),
            call.scale, call.bias, window, num_kv_heads, places,
            GROUP=num_heads // num_kv_heads, HEAD_DIM=head_dim, SOFTMAX=softmax,
            HAS_SLOPES=slopes is not None, HAS_SCORE_BIAS=score_bias is not None, ROTARY=cos is not None,
            SPLIT=splits > 1, HARDWARE=gpu is not None, ROWS=tile.rows, BLOCK_DIM=tile.block_dim,
            PLACES=tile.places, STAGES=tile.stages, num_warps=tile.warps, **FUSED,
        )  # fmt: skip
    return output, lse


@triton.jit
def _load_heads(
    pointer, offsets, channel, mask, cos, sin, HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr
):  # fmt: skip
    """Load heads `[rows, BLOCK_DIM]`, their pairs `(x[i], x[i + D/2])` rotated and rounded as `apply_rotary` does."""
    x = tl.load(pointer + offsets + channel, mask=mask, other=0.0)
    if ROTARY:
        HALF: tl.constexpr = HEAD_DIM // 2
        is_first = channel < HALF
        partner = tl.load(pointer + offsets + tl.where(is_first, channel + HALF, channel - HALF), mask=mask, other=0.0)
        angle = tl.where(is_first, channel, channel - HALF)
        cosine = tl.load(cos + angle, mask=channel < HEAD_DIM, other=0.0).to(tl.float32)
        sine = tl.load(sin + angle, mask=channel < HEAD_DIM, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) * cosine + partner.to(tl.float32) * tl.where(is_first, -sine, sine)).to(x.dtype)
    return x


@triton.jit
def _load_places(ring, start, columns, channel, stride_place, stride_channel, mask):
    """Load `[PLACES, BLOCK_DIM]` of a head's ring from a place on; a ring may be longer than 32 bits reach."""
    base = ring + start * tl.cast(stride_place, tl.int64)
    return tl.load(base + columns[:, None] * stride_place + channel * stride_channel, mask=mask, other=0.0)


@triton.jit
def _distance(places, new_place, window):
    distance = new_place - places
    return tl.where(distance < 0, distance + window, distance).to(tl.float32)


@triton.jit
def _attend_one_head(
    q, keys, values, key_place, key_channel, value_place, value_channel, begin, end, new_place, window, scale, slope,
    constant, channel, in_head, SOFTMAX: tl.constexpr, HARDWARE: tl.constexpr, BLOCK_DIM: tl.constexpr,
    PLACES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One query head on the vector units: every column of the tile keeps sums of its own until the end."""
    columns = tl.arange(0, PLACES)
    q, slope, constant = q.to(tl.float32), tl.sum(slope, axis=0), tl.sum(constant, axis=0)
    accumulated = tl.zeros([PLACES, BLOCK_DIM], tl.float32)
    maximum = tl.full([PLACES], float("-inf"), tl.float32)
    total = tl.zeros([PLACES], tl.float32)
    for start in tl.range(scalar(begin), scalar(end), PLACES, num_stages=STAGES):
        places = start + columns
        is_old = (places < end) & (places != new_place)
        mask = is_old[:, None] & in_head
        k = _load_places(keys, start, columns, channel, key_place, key_channel, mask)
        v = _load_places(values, start, columns, channel, value_place, value_channel, mask)
        bias = slope * _distance(places, new_place, window) + constant
        score = tl.where(
            is_old, tl.sum(q * k.to(tl.float32), axis=1) * scale + bias, hidden_score(SOFTMAX, False)
        )  # fmt: skip
        if SOFTMAX:
            higher = tl.maximum(maximum, score)
            finite = tl.where(higher == float("-inf"), 0.0, higher)
            weight = exp2(score - finite, HARDWARE)
            fade = exp2(maximum - finite, HARDWARE)
            total = total * fade + weight
            accumulated = accumulated * fade[:, None]
            maximum = higher
        else:
            weight = sigmoid(score, False, HARDWARE)
        accumulated += weight[:, None] * v.to(tl.float32)
    if SOFTMAX:
        highest = tl.max(maximum, axis=0)
        fade = exp2(maximum - tl.where(highest == float("-inf"), 0.0, highest), HARDWARE)
        accumulated = accumulated * fade[:, None]
        total = total * fade
        peak = tl.zeros([1], tl.float32) + highest
    else:
        peak = tl.zeros([1], tl.float32)
    return tl.sum(accumulated, axis=0)[None, :], peak, tl.zeros([1], tl.float32) + tl.sum(total, axis=0)


@triton.jit
def _attend_group(
    q, keys, values, key_place, key_channel, value_place, value_channel, begin, end, new_place, window, scale, slope,
    constant, channel, in_head, SOFTMAX: tl.constexpr, HARDWARE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr, PLACES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All query heads of one key/value head on the tensor cores."""
    columns = tl.arange(0, PLACES)
    accumulated = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in tl.range(scalar(begin), scalar(end), PLACES, num_stages=STAGES):
        places = start + columns
        is_old = (places < end) & (places != new_place)
        mask = is_old[:, None] & in_head
        k = _load_places(keys, start, columns, channel, key_place, key_channel, mask)
        v = _load_places(values, start, columns, channel, value_place, value_channel, mask)
        bias = slope[:, None] * _distance(places, new_place, window)[None, :] + constant[:, None]
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias
        score = tl.where(is_old[None, :], score, hidden_score(SOFTMAX, False))
        if SOFTMAX:
            higher = tl.maximum(maximum, tl.max(score, axis=1))
            finite = tl.where(higher == float("-inf"), 0.0, higher)
            weight = exp2(score - finite[:, None], HARDWARE)
            fade = exp2(maximum - finite, HARDWARE)
            total = total * fade + tl.sum(weight, axis=1)
            accumulated = accumulated * fade[:, None]
            maximum = higher
        else:
            weight = sigmoid(score, False, HARDWARE)
        accumulated = tl.dot(weight.to(v.dtype), v, accumulated, input_precision="ieee")
    return accumulated, maximum, total


@triton.jit
def _sum_parts(
    parts, maxima, totals, first, num_parts, rows, channel, is_head, stored, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, SOFTMAX: tl.constexpr, HARDWARE: tl.constexpr, ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Join what the programs of one window have left: a sum for sigmoid, a merge by the maxima for softmax."""
    accumulated = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for index in range(scalar(num_parts)):
        part = (first + index) * GROUP + rows
        # .cg: past the first-level cache, which does not see what other multiprocessors write
        piece = tl.load(
            parts + part[:, None] * HEAD_DIM + channel, mask=stored, other=0.0, cache_modifier=".cg"
        )  # fmt: skip
        if SOFTMAX:
            peak = tl.load(maxima + part, mask=is_head, other=0.0, cache_modifier=".cg")
            share = tl.load(totals + part, mask=is_head, other=1.0, cache_modifier=".cg")
            higher = tl.maximum(maximum, peak)
            fade, gain = exp2(maximum - higher, HARDWARE), exp2(peak - higher, HARDWARE)
            accumulated = accumulated * fade[:, None] + piece * gain[:, None]
            total = total * fade + share * gain
            maximum = higher
        else:
            accumulated += piece
    return accumulated, maximum, total


@triton.jit
def _decode(
    query, key, value, key_ring, value_ring, slot, position, slopes, score_bias, cos, sin,
    output, lse, parts, maxima, totals, arrivals,
    query_batch, query_head, key_batch, key_head, value_batch, value_head,
    key_slot, key_place, key_ring_head, key_channel, value_slot, value_place, value_ring_head, value_channel,
    cos_batch, sin_batch,
    scale, bias, window, num_kv_heads, places_per_program,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, SOFTMAX: tl.constexpr, HAS_SLOPES: tl.constexpr,
    HAS_SCORE_BIAS: tl.constexpr, ROTARY: tl.constexpr, SPLIT: tl.constexpr, HARDWARE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr, PLACES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    batch, kv_head = pair // num_kv_heads, pair % num_kv_heads
    now = tl.load(position + batch)
    own = tl.load(slot + batch)
    new_place = (now % window).to(tl.int32)
    filled = tl.minimum(now + 1, window).to(tl.int32)
    begin = split * places_per_program
    # a young stream needs fewer programs
    if begin >= filled:
        return
    end = tl.minimum(begin + places_per_program, filled)

    rows = tl.arange(0, ROWS)
    is_head = rows < GROUP
    heads = kv_head * GROUP + rows
    channel = tl.arange(0, BLOCK_DIM)[None, :]
    in_head = channel < HEAD_DIM
    stored = is_head[:, None] & in_head
    if ROTARY:
        cos += batch * cos_batch
        sin += batch * sin_batch
    q = _load_heads(
        query + batch * query_batch, heads[:, None] * query_head, channel, stored, cos, sin, HEAD_DIM, ROTARY
    )  # fmt: skip
    new_key = _load_heads(
        key + batch * key_batch, kv_head * key_head, channel, in_head, cos, sin, HEAD_DIM, ROTARY
    )  # fmt: skip
    new_value = tl.load(value + batch * value_batch + kv_head * value_head + channel, mask=in_head, other=0.0)
    keys = key_ring + own * key_slot + kv_head * key_ring_head
    values = value_ring + own * value_slot + kv_head * value_ring_head
    unit = score_unit(SOFTMAX, False)
    slope = tl.zeros([ROWS], tl.float32)
    constant = tl.zeros([ROWS], tl.float32) + bias
    if HAS_SLOPES:
        slope += tl.load(slopes + heads, mask=is_head, other=0.0).to(tl.float32)
    if HAS_SCORE_BIAS:
        constant += tl.load(score_bias + heads, mask=is_head, other=0.0).to(tl.float32)
    scale, slope, constant = scale * unit, slope * unit, constant * unit

    if ROWS == 1:
        accumulated, maximum, total = _attend_one_head(
            q, keys, values, key_place, key_channel, value_place, value_channel, begin, end, new_place, window,
            scale, slope, constant, channel, in_head, SOFTMAX, HARDWARE, BLOCK_DIM, PLACES, STAGES,
        )  # fmt: skip
    else:
        accumulated, maximum, total = _attend_group(
            q, keys, values, key_place, key_channel, value_place, value_channel, begin, end, new_place, window,
            scale, slope, constant, channel, in_head, SOFTMAX, HARDWARE, ROWS, BLOCK_DIM, PLACES, STAGES,
        )  # fmt: skip

    # the new token belongs to the program of its place, which also writes it
    holds_new = (begin <= new_place) & (new_place < end)
    if holds_new:
        tl.store(keys + new_place * tl.cast(key_place, tl.int64) + channel * key_channel, new_key, mask=in_head)
        tl.store(values + new_place * tl.cast(value_place, tl.int64) + channel * value_channel, new_value, mask=in_head)
    new_score = tl.sum(q.to(tl.float32) * new_key.to(tl.float32), axis=1) * scale + constant
    new_score = tl.where(holds_new, new_score, hidden_score(SOFTMAX, False))
    if SOFTMAX:
        # one of the two is finite: a program's places are never empty
        higher = tl.maximum(maximum, new_score)
        fade, new_weight = exp2(maximum - higher, HARDWARE), exp2(new_score - higher, HARDWARE)
        accumulated = accumulated * fade[:, None]
        total = total * fade + new_weight
        maximum = higher
    else:
        new_weight = sigmoid(new_score, False, HARDWARE)
    accumulated += new_weight[:, None] * new_value.to(tl.float32)

    if SPLIT:
        num_parts = tl.cdiv(filled, places_per_program)
        first = pair * tl.num_programs(1)
        part = (first + split) * GROUP + rows
        tl.store(parts + part[:, None] * HEAD_DIM + channel, accumulated, mask=stored)
        if SOFTMAX:
            tl.store(maxima + part, maximum, mask=is_head)
            tl.store(totals + part, total, mask=is_head)
        # every thread has written before the arrival is counted
        tl.debug_barrier()
        if tl.atomic_add(arrivals + pair, 1, sem="acq_rel") != num_parts - 1:
            return
        accumulated, maximum, total = _sum_parts(
            parts, maxima, totals, first, num_parts, rows, channel, is_head, stored, GROUP, HEAD_DIM, SOFTMAX,
            HARDWARE, ROWS, BLOCK_DIM,
        )  # fmt: skip
    if SOFTMAX:
        accumulated = accumulated / total[:, None]
        tl.store(lse + pair * GROUP + rows, (maximum + tl.log2(total)) * LN_2, mask=is_head)
    tl.store(
        output + (pair * GROUP + rows)[:, None] * HEAD_DIM + channel, accumulated.to(output.dtype.element_ty),
        mask=stored,
    )  # fmt: skip
