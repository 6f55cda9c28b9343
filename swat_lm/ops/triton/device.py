"""Functions that several kernels call: weights from scores, tiles from memory, loop bounds.

Kernels compute scores in a unit that saves one multiplication per weight: `score_unit` times the score of the contract.
"""

# Triton rewrites the bodies of kernels, which a checker of Python misreads
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportRedeclaration=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from swat_lm.ops.triton.availability import is_interpreted

# numbers that kernels read must be constants of the compiler
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
# 2^99: of two such numbers a product is still finite
HALF_OF_MUCH: tl.constexpr = tl.constexpr(2.0**99)
# arguments that change from call to call: Triton must not compile again for the values 1 and multiples of 16
SIZES = ("num_queries", "num_keys", "num_rows", "offset", "window")


def on_device(tensor: Tensor) -> torch.cuda.device:
    """Return the context in which kernels are launched on the tensor's GPU, which need not be the current one."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)


def with_dense_channels(tensor: Tensor) -> Tensor:
    """Return the tensor, copied only where the channels of a head are not next to each other.

    Heads and sequences may lie anywhere, as in a joined projection.
    """
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


if is_interpreted():

    def scalar(value):
        """Return a bound of a loop as a Python integer: numpy 2.4 refuses the interpreter's own conversion."""
        return int(value.handle.data.item()) if isinstance(value, tl.tensor) else int(value)

else:

    @triton.jit
    def scalar(value):
        """Return a bound of a loop as it is; under the interpreter, as a Python integer."""
        return value


@triton.jit
def score_unit(SOFTMAX: tl.constexpr, FAST: tl.constexpr):
    """Return what scale, slope and bias are multiplied by: exp2 for softmax and sigmoid, tanh(score / 2) for fast."""
    if SOFTMAX:
        return LOG2_E
    else:
        return 0.5 if FAST else -LOG2_E


@triton.jit
def hidden_score(SOFTMAX: tl.constexpr, FAST: tl.constexpr):
    """Return the score, in its unit, whose weight is exactly 0: the contract's minus infinity."""
    return float("-inf") if SOFTMAX or FAST else float("inf")


@triton.jit
def hide(score, low, high, index, LENGTH: tl.constexpr, SOFTMAX: tl.constexpr, FAST: tl.constexpr):
    """Give weight 0 to the scores of a tile whose index, `0 .. LENGTH - 1` along one axis, is not in `low .. high`.

    `low` and `high` are integers along the other axis. Sigmoid needs no comparison: half a range's length less the
    distance to its centre is 1/2 or more inside of it and -1/2 or less outside; times 2^100 it bounds the score from
    above. All numbers are exact. Comparing costs twice as much: a GPU has few predicates, and the compiler packs those
    of a tile into bits and unpacks them again.
    """
    low = tl.maximum(low, 0)
    high = tl.minimum(high, LENGTH - 1)
    if SOFTMAX:
        # minus infinity itself: a row must know that it has seen nothing yet
        return tl.where((index >= low) & (index <= high), score, float("-inf"))
    else:
        half = (high - low + 1).to(tl.float32) * HALF_OF_MUCH
        centre = (high + low).to(tl.float32) * HALF_OF_MUCH
        inside = half - tl.abs(tl.fma(index.to(tl.float32), 2 * HALF_OF_MUCH, -centre))
        if FAST:
            return tl.minimum(score, inside, propagate_nan=tl.PropagateNan.ALL)
        else:
            # the unit of an exact score is negative
            return tl.maximum(score, -inside, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sigmoid(score, FAST: tl.constexpr, HARDWARE: tl.constexpr):
    """Return the weights of scores in their unit, float32; never NaN, exactly 0 for `hidden_score`.

    FAST is `tanh(x / 2) / 2 + 1/2` by the hardware's tanh (absolute error at most 2.5e-4 by PTX's bound, 6e-6 as
    measured by others), otherwise `1 / (1 + exp2(-x))` (3e-7, and relative 4e-7 + 1.2e-7 |x|, as x is rounded, too).
    HARDWARE is off under the interpreter, which has no inline assembly.
    """
    if FAST:
        return 0.5 * tanh(score, HARDWARE) + 0.5
    elif HARDWARE:
        # the plain quotient of Triton handles denormal divisors, which 1 + exp2 never is, at three times the cost
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + exp2(score, HARDWARE)], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / (1.0 + tl.exp2(score))


@triton.jit
def sigmoid_derivative(score, FAST: tl.constexpr, HARDWARE: tl.constexpr):
    """Return `derivative_unit` times `p (1 - p)`, p the weights of `sigmoid`; exactly 0 where a weight is 0 or 1."""
    if FAST:
        t = tanh(score, HARDWARE)
        return 1.0 - t * t
    else:
        weight = sigmoid(score, False, HARDWARE)
        return weight - weight * weight


@triton.jit
def derivative_unit(SOFTMAX: tl.constexpr, FAST: tl.constexpr):
    """Return 4 where the derivative is `1 - tanh(x / 2) ** 2`, which saves an instruction, otherwise 1."""
    return 4.0 if FAST and not SOFTMAX else 1.0


@triton.jit
def tanh(score, HARDWARE: tl.constexpr):
    """Return the hyperbolic tangent, by the GPU's approximate instruction."""
    if HARDWARE:
        return tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [score], dtype=tl.float32, is_pure=True, pack=1
        )  # fmt: skip
    else:
        # the tensor first: a constant of the compiler takes one for its own kind
        return 2.0 / (1.0 + tl.exp2(score * (-2.0 * LOG2_E))) - 1.0


@triton.jit
def exp2(score, HARDWARE: tl.constexpr):
    """Return 2 ** score, flushing denormal results to 0 on the GPU."""
    if HARDWARE:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [score], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(score)


@triton.jit
def load_tile(
    base,
    first_row,
    stride_row,
    num_rows,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
):
    """Load `[BLOCK_ROWS, BLOCK_DIM]` from a row on; zeros past the head's channels and, if checked, outside of rows."""
    row = tl.arange(0, BLOCK_ROWS)
    channel = tl.arange(0, BLOCK_DIM)
    # a row's own offset may exceed 32 bits, one inside a tile does not
    pointers = base + first_row.to(tl.int64) * stride_row + row[:, None] * stride_row + channel[None, :]
    inside = (first_row + row >= 0) & (first_row + row < num_rows)
    if HEAD_DIM != BLOCK_DIM:
        in_head = (channel < HEAD_DIM)[None, :]
        return tl.load(pointers, mask=inside[:, None] & in_head if CHECK_ROWS else in_head, other=0.0)
    else:
        return tl.load(pointers, mask=inside[:, None], other=0.0) if CHECK_ROWS else tl.load(pointers)


@triton.jit
def store_tile(
    base,
    first_row,
    stride_row,
    num_rows,
    tile,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Store the rows of a tile that exist, rounded to the dtype in memory."""
    row = tl.arange(0, BLOCK_ROWS)
    channel = tl.arange(0, BLOCK_DIM)
    pointers = base + first_row.to(tl.int64) * stride_row + row[:, None] * stride_row + channel[None, :]
    inside = (first_row + row < num_rows)[:, None] & (channel < HEAD_DIM)[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside)
