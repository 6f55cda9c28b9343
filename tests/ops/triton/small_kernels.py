"""Kernels of a few lines: one weight at a time, and what a stand-in for a GPU must get right or refuse."""

# Triton rewrites the bodies of kernels, which a checker of Python misreads
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl

from swat_lm.ops.triton.device import hidden_score, score_unit, sigmoid


@triton.jit
def weigh(scores, weights, FAST: tl.constexpr, HARDWARE: tl.constexpr, SIZE: tl.constexpr):
    """Weights of scores, and last that of what is hidden."""
    place = tl.arange(0, SIZE)
    score = tl.load(scores + place) * score_unit(False, FAST)
    score = tl.where(place == SIZE - 1, hidden_score(False, FAST), score)
    tl.store(weights + place, sigmoid(score, FAST, HARDWARE))


def check_weights(device: str = "cpu") -> None:
    """The bounds of docs/kernels.md, in float32."""
    scores = torch.linspace(-80, 80, 2**14, device=device)
    exact = torch.sigmoid(scores.double())
    for fast, bound in ((True, 2.5e-4), (False, 3e-7)):
        weights = torch.empty_like(scores)
        weigh[(1,)](scores, weights, FAST=fast, HARDWARE=True, SIZE=scores.numel())
        assert weights[-1] == 0
        error = (weights.double() - exact)[:-1].abs()
        assert error.max() <= bound
        if not fast:
            # the score itself is rounded
            assert (error <= (4e-7 + 1.2e-7 * scores[:-1].abs()) * exact[:-1]).all()


@triton.jit
def copy(source, target, SIZE: tl.constexpr):
    """Bits, whatever they stand for."""
    place = tl.arange(0, SIZE)
    tl.store(target + place, tl.load(source + place))


@triton.jit
def convert(source, target, SIZE: tl.constexpr):
    """From one dtype to the other."""
    place = tl.arange(0, SIZE)
    tl.store(target + place, tl.load(source + place).to(target.dtype.element_ty))


@triton.jit
def multiply(left, right, product, SIZE: tl.constexpr, INPUT_PRECISION: tl.constexpr):
    """One product of square matrices."""
    place = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    result = tl.dot(tl.load(left + place), tl.load(right + place), input_precision=INPUT_PRECISION)
    tl.store(product + place, result)


@triton.jit
def compute(x, y, WHAT: tl.constexpr):
    """Arithmetic of one's choice, on numbers as they lie in memory."""
    place = tl.arange(0, 16)
    number = tl.load(x + place)
    if WHAT == "add":
        number = number + number
    elif WHAT == "multiply":
        number = number * 2.0
    elif WHAT == "compare":
        number = tl.where(number == number, number, number)
    elif WHAT == "negate":
        number = -number
    elif WHAT == "magnitude":
        number = tl.abs(number)
    elif WHAT == "sum":
        number = tl.zeros([16], number.dtype) + tl.sum(number, axis=0)
    elif WHAT == "atomic":
        tl.atomic_add(y + place, number)
    elif WHAT == "assembly":
        number = tl.inline_asm_elementwise(
            "sin.approx.f32 $0, $1;", "=f,f", [number], dtype=tl.float32, is_pure=True, pack=1
        )
    tl.store(y + place, number)


@triton.jit
def reach_out(x, y, FIRST: tl.constexpr, MASKED: tl.constexpr):
    """Read 16 numbers from one on, masked to those that exist or not."""
    place = FIRST + tl.arange(0, 16)
    if MASKED:
        number = tl.load(x + place, mask=(place >= 0) & (place < 16), other=0.0)
    else:
        number = tl.load(x + place)
    tl.store(y + tl.arange(0, 16), number)


@triton.jit
def meet(x, WHAT: tl.constexpr, ORDER: tl.constexpr):
    """What programs do to each other."""
    program = tl.program_id(0)
    if WHAT == "store":
        tl.store(x, program)
    elif WHAT == "read":
        tl.store(x + program, tl.load(x + 1 - program))
    elif WHAT == "acquire":
        tl.store(x + program, program)
        tl.atomic_add(x + 2, 1, sem=ORDER)
        tl.store(x + 3 + program, tl.load(x + 1 - program))
    elif WHAT == "overflow":
        tl.store(x + program, (program + 70_000) * 70_000)
    elif WHAT == "order":
        tl.store(x + 1 + program, tl.atomic_add(x, 1))


@triton.jit
def largest(x, y, SIZE: tl.constexpr):
    """The larger of pairs, of which either may be no number."""
    place = tl.arange(0, SIZE)
    tl.store(x + place, tl.maximum(tl.load(x + place), tl.load(y + place)))
