"""That the stand-in for a GPU is one: its arithmetic, what it refuses, and that nothing of it stays behind."""

import re
from typing import Any

import pytest
import torch


def check_bfloat16() -> None:
    from tests.ops.triton.instructions import from_bfloat16, to_bfloat16, to_tf32
    from tests.ops.triton.small_kernels import convert, copy, multiply

    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    assert torch.equal(_wide(torch.from_numpy(from_bfloat16(every.view(torch.uint16).numpy()))), _wide(every))
    copied = torch.empty_like(every)
    copy[(1,)](every, copied, SIZE=2**16)
    assert torch.equal(copied.view(torch.uint16), every.view(torch.uint16))
    # every exponent, ties to both sides, and what rounds up to infinity
    bits = torch.randint(-(2**31), 2**31, (2**14,), generator=torch.Generator().manual_seed(0)).int()
    bits[::4] = (bits[::4] & ~0xFFFF) | 0x8000
    single = torch.cat((bits.view(torch.float32), torch.tensor([3.4e38, -3.4e38, torch.inf, -torch.inf, torch.nan])))
    ours = torch.from_numpy(to_bfloat16(single.numpy())).view(torch.bfloat16)
    assert torch.equal(_wide(ours), _wide(single.to(torch.bfloat16)))
    rounded, back = torch.empty(2**14, dtype=torch.bfloat16), torch.empty(2**14)
    convert[(1,)](single[: 2**14], rounded, SIZE=2**14)
    convert[(1,)](rounded, back, SIZE=2**14)
    assert torch.equal(_wide(back), _wide(single[: 2**14].to(torch.bfloat16)))

    left, right = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    product = torch.empty(32, 32)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        multiply[(1,)](left.to(dtype), right.to(dtype), product, SIZE=32, INPUT_PRECISION="tf32")
        torch.testing.assert_close(product, left.float() @ right.float(), atol=1e-5, rtol=1e-5)
    third = torch.full((32, 32), 1 / 3)
    for precision, factor in (("ieee", third), ("tf32", torch.from_numpy(to_tf32(third.numpy())))):
        multiply[(1,)](third, third, product, SIZE=32, INPUT_PRECISION=precision)
        torch.testing.assert_close(product, factor @ factor, atol=0, rtol=1e-6)
    assert (product - third @ third).abs().max() > 1e-4


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.float().nan_to_num(7, posinf=torch.inf, neginf=-torch.inf)


def test_bfloat16(stand_in):
    stand_in(check_bfloat16)


def check_instructions() -> None:
    import numpy as np

    from tests.ops.triton.instructions import EXP2_ERROR, RECIPROCAL_ERROR, TANH_ERROR, instructions

    unit = instructions(TANH_ERROR)
    x = np.linspace(-2.6, 2.6, 100_000, dtype=np.float32)
    for name, exact, bound in (
        ("tanh.approx.f32", np.tanh, TANH_ERROR),
        ("ex2.approx.ftz.f32", np.exp2, EXP2_ERROR),
        ("rcp.approx.ftz.f32", np.reciprocal, RECIPROCAL_ERROR),
    ):
        true = exact(x.astype(np.float64))
        off = (unit[name](x) - true) / true
        # in both directions, up to the bound and never beyond
        assert -bound <= off.min() <= -0.7 * bound < 0.7 * bound <= off.max() <= bound
        assert abs(off.mean()) <= 0.05 * bound
    inf, nan = np.inf, np.nan
    for name, pairs in {
        "tanh.approx.f32": {-inf: -1, inf: 1, 100: 1, 0: 0, nan: nan},
        # denormal numbers are 0, what comes in and what goes out
        "ex2.approx.ftz.f32": {-inf: 0, -127: 0, -126: 2.0**-126, 0: 1, 2.0**-130: 1, 200: inf, inf: inf, nan: nan},
        "rcp.approx.ftz.f32": {-inf: 0, 1: 1, 2.0**127: 0, 0: inf, 2.0**-130: inf, inf: 0, nan: nan},
    }.items():
        with np.errstate(all="ignore"):
            results = unit[name](np.array(list(pairs), dtype=np.float32))
        np.testing.assert_allclose(results, list(pairs.values()), rtol=EXP2_ERROR)


def test_instructions(stand_in):
    stand_in(check_instructions)


def refused(match: str, kernel: Any, *arguments: Any, **options: Any) -> None:
    from triton.runtime.errors import InterpreterError

    said = "nothing"
    try:
        kernel(*arguments, **options)
    except InterpreterError as error:
        said = str(error)
    assert re.search(match, said), said


def check_refusals() -> None:
    from tests.ops.triton.small_kernels import compute, meet, multiply, reach_out

    for dtype in (torch.bfloat16, torch.float16):
        x, y = torch.ones(2, 16, dtype=dtype)
        for what in ("add", "multiply", "compare", "negate", "magnitude", "sum", "atomic"):
            refused(r"arithmetic on (bf16|fp16)", compute[(1,)], x, y, WHAT=what)
        compute[(1,)](x, y, WHAT="nothing")
    refused(r"inline assembly 'sin\.approx", compute[(1,)], x.float(), y.float(), WHAT="assembly")
    small = torch.zeros(8, 8)
    refused("Input shapes should have", multiply[(1,)], small, small, small, SIZE=8, INPUT_PRECISION="ieee")

    numbers = torch.arange(16.0)
    for first in (-1, 1):
        refused(
            "loads 1 of 16 numbers outside its tensor", reach_out[(1,)], numbers, numbers + 1, FIRST=first, MASKED=False
        )
        reach_out[(1,)](numbers, numbers + 1, FIRST=first, MASKED=True)
    refused("stores 16 of 16 numbers outside its tensor", reach_out[(1,)], numbers, numbers[:0], FIRST=0, MASKED=False)

    places = torch.zeros(8, dtype=torch.int32)
    for what, match in (
        ("store", r"program \d stores where program \d did"),
        ("read", r"program \d reads what program \d stored"),
        ("acquire", r"program \d reads what program \d stored"),
        ("overflow", "multiply of int32 numbers leaves their range"),
    ):
        refused(match, meet[(2,)], places, WHAT=what, ORDER="relaxed")
    meet[(2,)](places, WHAT="acquire", ORDER="acq_rel")


def test_refusals(stand_in):
    stand_in(check_refusals)


def check_the_rest() -> None:
    from tests.ops.triton.small_kernels import check_weights, largest, meet

    check_weights()
    # programs run in another order than that of their numbers, each once
    places = torch.zeros(41, dtype=torch.int32)
    meet[(40,)](places, WHAT="order", ORDER="relaxed")
    assert places[0] == 40
    assert places[1:].tolist() != sorted(places[1:].tolist()) == list(range(40))
    # a maximum takes the number, as hardware does
    x, y = torch.tensor([torch.nan, 1.0, 2.0, torch.nan]), torch.tensor([3.0, torch.nan, 1.0, torch.nan])
    largest[(1,)](x, y, SIZE=4)
    assert torch.equal(x.nan_to_num(7.0), torch.tensor([3.0, 1.0, 2.0, 7.0]))
    # memory that nobody has written to
    assert torch.empty(3).isnan().all()
    assert torch.zeros(2).new_empty(3, dtype=torch.bfloat16).isnan().all()


def test_weights_order_and_memory(stand_in):
    stand_in(check_the_rest)


def check_that_it_is_gone() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    from swat_lm.ops import window_attention
    from swat_lm.ops.triton.availability import gpu_of
    from swat_lm.ops.triton.configurations import WIDE_WINDOW, Problem
    from tests.ops.triton.stand_in import standing_in

    def state() -> tuple:
        builder, function = interpreter.interpreter_builder, interpreter.InterpretedFunction
        return (
            type(builder), builder.options, dict(builder.codegen_fns), interpreter._implicit_cvt, function.run,
            function.__call__, interpreter.ReduceScanOpInterface.check_tensor, torch.empty, torch.empty_like,
            torch.Tensor.new_empty, "new_empty" in vars(torch.Tensor), tl.dot, tl.tensor.__add__,
        )  # fmt: skip

    query = torch.zeros(1, 4, 1, 16, dtype=torch.bfloat16)
    before = state()
    with standing_in((8, 6), wide_window=7):
        problem = Problem.of(query, query, 7, "sigmoid")
        assert (problem.capability, problem.hardware, problem.family) == ((8, 6), True, "consumer")
        window_attention(query, query, query, window=2, backend="triton")
    assert state() == before
    # also where something failed
    with pytest.raises(ZeroDivisionError), standing_in():
        raise ZeroDivisionError
    assert state() == before
    assert gpu_of(query.device) is None
    assert not Problem.of(query, query, 7, "sigmoid").hardware
    assert WIDE_WINDOW == 1024
    with pytest.raises(ValueError, match="computes bfloat16 products wrongly"):
        window_attention(query, query, query, window=2, backend="triton")
    half = query.half()
    window_attention(half, half, half, window=2, backend="triton")


def test_it_is_gone_afterwards(interpreted):
    interpreted(check_that_it_is_gone)
