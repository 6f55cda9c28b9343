"""The shipped tiles compiled for Hopper and Ampere without a GPU: no register is spilled, products run on tensor cores.

SWAT_LM_EXHAUSTIVE=1 compiles every combination instead of a selection.
"""

import importlib
import itertools
import os

import pytest
import torch

from benchmarks.gpu.floors import PRODUCTS
from benchmarks.gpu.machine_code import KERNELS, compile_attention, compile_kernel
from swat_lm.ops.triton.configurations import Problem, Tile, configuration, is_one_loop
from tests.ops.triton import cases
from tests.ops.triton.calls import Call
from tests.ops.triton.cases import Case

EXHAUSTED = bool(os.environ.get("SWAT_LM_EXHAUSTIVE"))
# KiB of shared memory that one block may have
SHARED = {80: 163, 86: 99, 90: 227, 120: 99}

HALVES = {"": torch.bfloat16, "half": torch.float16}
SIGMOID = [
    " ".join(extras)
    for count in range(5)
    for extras in itertools.combinations(("exact", "ragged", "rotary", "skip"), count)
]
SOFTMAX = ["softmax", "softmax ragged", "softmax rotary", "softmax ragged rotary"]
# what costs registers in one way each, and all of it
HEAVY = ["rotary", "exact ragged rotary skip", "softmax ragged rotary"]
# kernel, capability's number, head size, window, and what is asked for beside plain sigmoid attention
SELECTION = [
    *itertools.product(KERNELS, [90], [64, 128], [128, 512, 1024], ["", *HEAVY]),
    *itertools.product(KERNELS[2:], [90], [64, 128], [1024], ["exact ragged rotary skip per_head"]),
    *itertools.product(KERNELS[:3], [90], [96], [1024], ["half ragged rotary"]),
    *itertools.product(KERNELS[:3], [80], [64, 128], [512, 1024], ["", "exact ragged rotary skip"]),
    *itertools.product(KERNELS[2:3], [86], [64, 128], [1024], ["softmax ragged rotary per_head"]),
]
EXHAUSTIVE = [
    (kernel, capability, head_dim, window, f"{extras}{per_head}{half}".strip())
    for kernel, capability, head_dim, window, extras, per_head, half in itertools.product(
        KERNELS,
        [90, 80, 86],
        [64, 128, 80, 96, 32],
        [128, 256, 512, 1024],
        SIGMOID + SOFTMAX,
        ["", " per_head"],
        ["", " half"],
    )
    # only the keys' kernel sums the gradients of slopes; float16 differs from bfloat16 in the names of instructions
    if (not per_head or "key" in kernel) and (not half or extras in ("", "ragged rotary"))
]


def tile_of(name, capability, head_dim, window, variant):
    """The problem, its tile, and what is asked for beside."""
    words = frozenset(variant.split())
    dtype = HALVES["half" if "half" in words else ""]
    extras = words - {"half"}
    problem = Problem(window, head_dim, 1, dtype, "softmax" in extras, divmod(capability, 10), True)
    problem = problem._replace(rotary="rotary" in extras)
    return problem, configuration(name, problem), extras


def compiled(*case):
    problem, tile, extras = tile_of(*case)
    return tile, compile_attention(case[0], problem, tile, extras)


def kernels_of(cases):
    """One case of each kernel: a window is no constant of the compiler, so windows of one tile share their code."""
    found = {}
    for name, capability, head_dim, window, variant in cases:
        problem, tile, _ = tile_of(name, capability, head_dim, window, variant)
        kernel = (name, capability, head_dim, variant, tile, is_one_loop(name, problem, tile))
        found.setdefault(kernel, (name, capability, head_dim, window, variant))
    return list(found.values())


@pytest.mark.parametrize(
    ("name", "capability", "head_dim", "window", "variant"),
    kernels_of(EXHAUSTIVE if EXHAUSTED else SELECTION),
)
def test_no_spills(name, capability, head_dim, window, variant):
    pytest.importorskip("triton", reason="triton is not installed")
    tile, found = compiled(name, capability, head_dim, window, variant)
    assert found.spills == 0, f"{tile}: {found.spills} registers spilled of {found.registers}"
    assert found.tensor_core_products > 0
    if "softmax" not in variant:
        # one tanh for a weight, or an exponential and a reciprocal
        weights = len(found.loops) * tile.rows * tile.keys // (32 * tile.warps)
        # and a root and a reciprocal to find what is saturated
        extra = 4 if "skip" in variant else 0
        assert 0 <= found.instructions["MUFU"] - weights * (1 if "exact" not in variant else 2) <= extra
    # products run behind each other and behind the rest; where the compiler cannot have that, it waits for each
    for loop in found.loops:
        assert loop["WARPGROUP"] <= 2 * PRODUCTS[name]
    assert found.shared_bytes <= SHARED[capability] * 1024


def launches_of(case):
    """The kernels of one call or step, with what Triton's compiler is told of their arguments."""
    from tests.ops.triton import calls, steps
    from tests.ops.triton.stand_in import standing_in

    with standing_in(case.capability, 1 if case.wide else 1024) as launches:
        if isinstance(case.call, Call):
            with calls.backward_form(case.call.form):
                calls.run(case.call, case.call.dtype, "triton", "cpu")
        else:
            steps.check(case.call)
    return launches


EXHAUSTIVE_LAUNCHES = [
    *(cases.at_random(seed) for seed in range(400)),
    *(Case(cases.step_at_random(seed), cases.CAPABILITIES[seed % 4]) for seed in range(200)),
]
# a head of 256, float32, sizes of 1
LAUNCHED = [
    Case(Call((1, 1, 40, 1, 1, 32), 1, torch.float32, "softmax", return_lse=True)),
    Case(Call((1, 40, 40, 2, 1, 256), 20, rotary="own", skip_saturated=True, visible="padding"), (8, 6), True),
]


@pytest.mark.parametrize("case", EXHAUSTIVE_LAUNCHES if EXHAUSTED else LAUNCHED, ids=str)
def test_what_is_launched_compiles_and_fits(interpreted, case):
    for launch in interpreted(launches_of, case):
        kernel = getattr(importlib.import_module(launch.module), launch.kernel)
        options = [launch.options.get(name) for name in ("num_warps", "num_stages", "maxnreg")]
        major, minor = case.capability
        compiled = compile_kernel(
            kernel, launch.arguments, 10 * major + minor, options[0] or 4, options[1] or 3, options[2]
        )
        assert compiled.shared_bytes <= SHARED[10 * major + minor] * 1024, launch


def test_what_a_score_costs():
    """Instructions of one warp for 32 scores: the product adds to the bias, and masks need no comparison."""
    pytest.importorskip("triton", reason="triton is not installed")
    for name, window, unmasked, masked in (
        ("forward", 512, 7.0, 12.0), ("forward", 1024, 5.8, 9.8), ("backward query", 1024, 9.2, 13.2),
        ("backward key", 1024, 11.5, 15.8), ("backward key, five products", 1024, 15.5, 19.5),
    ):  # fmt: skip
        tile, found = compiled(name, 90, 64, window, "")
        scores = tile.rows * tile.keys / (32 * tile.warps)
        left, middle, right = (sum(loop.values()) / scores for loop in found.loops)
        assert middle <= unmasked, name
        assert max(left, right) <= masked, name


def test_another_length_is_no_reason_to_compile_again():
    """Triton makes a kernel of its own for an argument of 1 and for multiples of 16, unless it is told not to."""
    pytest.importorskip("triton", reason="triton is not installed")
    from swat_lm.ops.triton import backward_kernels, forward, rotation, saturation, softmax_rows
    from swat_lm.ops.triton.device import SIZES

    kernels = (
        forward._forward, backward_kernels.backward_query, backward_kernels.backward_key, rotation._rotate,
        saturation._norms_of_blocks, softmax_rows._rows,
    )  # fmt: skip
    found = {p.name: p.do_not_specialize for kernel in kernels for p in kernel.params if p.name in SIZES}
    assert found == dict.fromkeys(SIZES, True)


def test_every_problem_has_a_tile():
    for name, dtype, capability, head_dim, window, softmax in itertools.product(
        KERNELS, (torch.float32, torch.float16), ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)),
        (2, 16, 64, 80, 128, 256), (1, 4096), (False, True),
    ):  # fmt: skip
        tile = configuration(name, Problem(window, head_dim, 1, dtype, softmax, capability, True))
        assert min(tile.rows, tile.keys) >= 16


def test_the_harness_sees_spills():
    """A tile that cannot fit: the counter must not be blind."""
    pytest.importorskip("triton", reason="triton is not installed")
    problem = Problem(512, 128, 1, torch.bfloat16, False, (9, 0), True)
    assert compile_attention("forward", problem, Tile(128, 64, 4, 3)).spills > 100
