"""What a GPU would run, on what stands in for one: HARDWARE, shipped tiles, bfloat16, inline assembly; stand_in.py.

SWAT_LM_EXHAUSTIVE=1 makes every call of test_gpu.py and many more at random, and compiles every kernel that
ran, for some hours.
"""

import itertools
import os

import pytest
import torch

from tests.ops.triton import calls, cases, steps, test_decode, test_entry, test_layouts, test_saturation
from tests.ops.triton.calls import Call
from tests.ops.triton.cases import Case
from tests.ops.triton.steps import Step

EXHAUSTIVE = bool(os.environ.get("SWAT_LM_EXHAUSTIVE"))
exhaustive = pytest.mark.skipif(not EXHAUSTIVE, reason="SWAT_LM_EXHAUSTIVE is not set")
RANDOM = 4000 if EXHAUSTIVE else 16
# slots, W, H, K, D
RINGS = [(4, 150, 4, 2, 64), (4, 150, 2, 2, 32), (3, 70, 6, 1, 80), (3, 140, 32, 1, 128), (3, 1, 2, 2, 256)]


def options_of(case: Case) -> dict:
    return {"capability": case.capability} | ({"wide_window": 1} if case.wide else {})


@pytest.mark.parametrize("case", cases.of_every_tile(), ids=str)
def test_every_tile(stand_in, case):
    stand_in(calls.check, case.call, **options_of(case))


def test_the_tables_are_covered():
    from swat_lm.ops.triton import configurations
    from swat_lm.ops.triton.configurations import Problem, configuration

    made = set()
    for call, capability, wide in cases.of_every_tile():
        problem = Problem(
            configurations.WIDE_WINDOW if wide else call.window, call.shape[5], 1, call.dtype,
            call.score_function == "softmax", capability, True, rotary=call.rotary is not None,
        )  # fmt: skip
        five = call.form == "five products"
        kernels = ["forward", "backward key, five products"] if five else ["forward", "backward query", "backward key"]
        # the backward's tiles do not ask whether queries are rotated
        made |= {(k, configuration(k, problem._replace(rotary=problem.rotary and k == "forward"))[:2]) for k in kernels}
    tables = (
        configurations._HOPPER, configurations._AMPERE, configurations._SOFTMAX_HOPPER,
        configurations._SOFTMAX_AMPERE, configurations._ROTARY_HOPPER,
    )  # fmt: skip
    shipped = {(k, tile[:2]) for t in tables for k, sizes in t.items() for tiles in sizes.values() for tile in tiles}
    assert shipped <= made


# what tells a GPU's call from an interpreted one, in few calls
SELECTION = [
    # grouped heads, both sequences, windows off the tile
    Case(Call((2, 150, 150, 4, 2, 64), 100)),
    Case(Call((2, 150, 150, 2, 1, 64), 100, torch.float16, "softmax", return_lse=True), (8, 6)),
    # fewer queries than keys, one query, a head that no tile has
    Case(Call((1, 100, 317, 2, 1, 128), None, torch.float16, score_bias=0.0, form="five products"), (12, 0)),
    Case(Call((2, 1, 90, 2, 2, 32), 64), (8, 0)),
    Case(Call((1, 200, 200, 2, 2, 80), 101, score_bias=-3.0, visible="both"), (8, 0)),
    Case(Call((1, 200, 200, 3, 3, 96), 1, torch.float16, visible="first"), (12, 0)),
    # slopes of both signs, steep enough for whole tiles to be skipped or summed
    Case(Call((1, 300, 300, 2, 1, 64), 250, slopes=(-2.0, 2.0), skip_saturated=True, score_bias=0.0)),
    Case(Call((1, 300, 300, 2, 2, 64), 250, slopes=(-2.0, 2.0), skip_saturated=True, visible="documents"), (8, 0)),
    # a bias that moves where weights saturate by two tiles
    *(
        Case(
            Call((1, 260, 260, 2, 2, 32), 250, torch.float32, "sigmoid", (-0.25, 0.25), bias, 0.05, skip_saturated=True)
        )
        for bias in (8.0, -8.0)
    ),
    Case(Call((1, 200, 200, 2, 1, 96), 120, rotary="own", visible="padding", layout="joined")),
    Case(Call((2, 200, 200, 2, 1, 64), 120, torch.float16, rotary="shared", form="five products"), (8, 6)),
    Case(Call((1, 150, 150, 2, 2, 128), 120, layout="channels apart", slopes=None)),
]


@pytest.mark.parametrize("case", SELECTION, ids=str)
def test_against_the_definition(stand_in, case):
    stand_in(calls.check, case.call, **options_of(case))


@pytest.mark.parametrize(
    ("check", "arguments"),
    [
        (test_saturation.check_what_does_not_saturate, ()),
        (test_saturation.check_that_tiles_are_skipped, ()),
        (test_saturation.check, ("five products", True, 45)),
        (test_entry.check_edges, ()),
        (test_entry.check_overflow, ()),
        (test_layouts.check_huge_window, ()),
        (test_layouts.check_expanded, ()),
        (test_decode.run_stream, ()),
    ],
)
def test_what_the_interpreter_checks(stand_in, check, arguments):
    stand_in(check, *arguments)


def check_launches(case: Case, kernels: dict[str, tuple[int, int]]) -> None:
    """The rules as shipped: which kernels run, on which tiles."""
    from tests.ops.triton.stand_in import standing_in

    with standing_in(case.capability) as launches:
        calls.check(case.call)
    for launch in launches:
        assert (launch.arguments["HARDWARE"], launch.arguments["FAST"]) == (True, case.call.fast)
    tiles = [(launch.kernel, launch.arguments["BLOCK_ROWS"], launch.arguments["BLOCK_KEYS"]) for launch in launches]
    assert tiles == [(kernel, *tile) for kernel, tile in kernels.items()]


@pytest.mark.parametrize(
    ("case", "kernels"),
    [
        # sigmoid over wide windows on Hopper takes five products
        (
            Case(Call((1, 1200, 1200, 1, 1, 64), 1024, score_bias=0.0)),
            {"_forward": (128, 128), "backward_key": (64, 128)},
        ),
        (
            Case(Call((1, 1150, 1150, 1, 1, 128), 1030, torch.float16), (8, 0)),
            {"_forward": (64, 32), "backward_query": (128, 32), "backward_key": (16, 128)},
        ),
    ],
    ids=str,
)
def test_windows_of_1024(interpreted, case, kernels):
    interpreted(check_launches, case, kernels)


@pytest.mark.parametrize("seed", range(RANDOM))
def test_at_random(stand_in, seed):
    case = cases.at_random(seed)
    stand_in(calls.check, case.call, **options_of(case))


def check_measured_tanh() -> None:
    """As wrong as PTX allows, and as others measured it."""
    from tests.ops.triton.instructions import MEASURED_TANH_ERROR
    from tests.ops.triton.stand_in import standing_in

    for options in ({}, {"tanh_error": MEASURED_TANH_ERROR}):
        with standing_in((9, 0), **options):
            calls.check_fast_weights()


def test_fast_weights(interpreted):
    interpreted(check_measured_tanh)


@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
@pytest.mark.parametrize("rings", RINGS)
def test_decoding(stand_in, rings, score_function):
    for dtype, splits in ((torch.bfloat16, 2), (torch.float16, None), (torch.float32, 3)):
        stand_in(steps.check, Step(rings, dtype, score_function, splits, rotary=dtype != torch.float16))


@pytest.mark.parametrize("seed", range(RANDOM))
def test_decoding_at_random(stand_in, seed):
    stand_in(steps.check, cases.step_at_random(seed))


def check_entry() -> None:
    """The public entry, whose rule shares a window out by the GPU's multiprocessors."""
    from swat_lm.ops import window_attention_step
    from tests.ops.triton.stand_in import standing_in

    tensors, slopes, bias = steps.tensors_of(Step((3, 600, 4, 2, 64), torch.bfloat16))
    results = {}
    for backend, dtype in (("triton", torch.bfloat16), ("reference", torch.float64)):
        call = [t.to(dtype) if t.is_floating_point() else t for t in tensors]
        call[3:5] = (ring.nan_to_num(0.0) for ring in call[3:5])
        with standing_in((8, 6)) as launches:
            results[backend] = window_attention_step(*call, slopes=slopes, score_bias=bias, backend=backend)
        if backend == "triton":
            (launch,) = launches
            assert launch.arguments["HARDWARE"] is launch.arguments["SPLIT"] is True
    torch.testing.assert_close(results["triton"].double(), results["reference"], atol=1e-2, rtol=1e-2)


def test_a_step_by_the_entry(interpreted):
    interpreted(check_entry)


@exhaustive
@pytest.mark.parametrize("capability", cases.CAPABILITIES, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
@pytest.mark.parametrize("form", cases.FORMS)
@pytest.mark.parametrize("shape", cases.SHAPES, ids=str)
def test_calls_of_a_gpu(stand_in, shape, form, score_function, dtype, capability):
    for call in cases.against_the_definition(shape, form, score_function, dtype):
        stand_in(calls.check, call, capability=capability)


@exhaustive
@pytest.mark.parametrize("capability", [(9, 0), (8, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("head_dim", "precision"), list(itertools.product(cases.HEADS, ["exact", "fast"])))
def test_wide_windows_of_a_gpu(stand_in, head_dim, precision, dtype, capability):
    for call in cases.wide_windows(head_dim, precision, dtype):
        stand_in(calls.check, call, capability=capability)


@exhaustive
@pytest.mark.parametrize("capability", cases.CAPABILITIES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 96])
@pytest.mark.parametrize("form", cases.FORMS)
def test_rotary_and_skipping_of_a_gpu(stand_in, form, head_dim, capability):
    for call in cases.rotary_and_skipping(head_dim, form):
        stand_in(calls.check, call, capability=capability)
