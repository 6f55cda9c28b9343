"""The shipped tiles compiled for Hopper and Ampere without a GPU: no register is spilled, products run on tensor cores.

SWAT_LM_EXHAUSTIVE=1 compiles every combination instead of a selection.
"""

import importlib
import itertools
import os
from types import SimpleNamespace

import pytest
import torch

from tests.ops.triton import cases
from tests.ops.triton.calls import Call
from tests.ops.triton.cases import Case
from tests.ops.triton.compiling import compile_kernel

EXHAUSTED = bool(os.environ.get("SWAT_LM_EXHAUSTIVE"))
# KiB of shared memory that one block may have
SHARED = {80: 163, 86: 99, 90: 227, 120: 99}
DTYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16"}
KERNELS = ("forward", "backward query", "backward key", "backward key, five products")
# the capability's number, head size, window, and what differs from a plain sigmoid call
SELECTION = [
    *itertools.product(KERNELS[:3], [90], [64, 128], [512, 1024], [""]),
    *itertools.product(KERNELS[3:], [90], [64, 128], [1024], [""]),
    *itertools.product(KERNELS[:3:2], [90], [128], [1024], ["softmax"]),
    *itertools.product(KERNELS[:3:2], [90], [64], [512], ["skip"]),
    *itertools.product(KERNELS[:2], [90], [128], [512], ["exact ragged rotary"]),
    *itertools.product(KERNELS[2:3], [90], [128], [1024], ["exact ragged per_head rotary"]),
    *itertools.product(KERNELS[:1], [90], [80], [512], ["half"]),
    *itertools.product(KERNELS[:3], [80], [64, 128], [512], [""]),
]
EXHAUSTIVE = list(
    itertools.product(
        KERNELS, [80, 86, 90], [32, 64, 80, 96, 128], [512, 1024],
        ["", "half", "exact", "ragged", "rotary", "per_head", "skip", "softmax", "softmax ragged",
         "exact ragged per_head rotary"],
    )
)  # fmt: skip


def arguments_of(kernel, name, problem, tile, variant):
    pointer = DTYPES[problem.dtype]
    softmax = "softmax" in variant
    values = {
        "lse_ptr": "*fp32" if softmax else None, "shift_ptr": "*fp32" if softmax else None,
        "slopes_ptr": "*fp32", "bias_ptr": "*fp32", "per_head_ptr": "*fp32",
        "cos_ptr": "*fp32" if "rotary" in variant else None, "sin_ptr": "*fp32" if "rotary" in variant else None,
        "rotated_ptr": pointer, "offset": "i32", "window": "i32", "scale": "fp32",
        "num_queries": "i32", "num_keys": "i32", "GROUP": problem.group, "HEAD_DIM": problem.head_dim,
        "BLOCK_DIM": problem.block_dim, "BLOCK_ROWS": tile.rows, "BLOCK_KEYS": tile.keys, "SOFTMAX": softmax,
        "FAST": "exact" not in variant and not softmax, "RAGGED": "ragged" in variant, "ROTARY": "rotary" in variant,
        "SKIP": "skip" in variant, "REGULAR_LAST": True,
        "HARDWARE": True, "INPUT_PRECISION": "tf32", "PER_HEAD": "per_head" in variant, "QUERY": "five" in name,
    }  # fmt: skip
    if "forward" in name:
        values["lse_ptr"] = "*fp32"
    if "five" in name:
        values["grad_query_ptr"] = "*fp32"
    for table in ("lower_ptr", "last_ptr", "table_ptr"):
        values[table] = "*i32" if "ragged" in variant else None
    for argument in kernel.arg_names:
        if argument.startswith("stride_"):
            values[argument] = "i32:16"
    return {argument: values.get(argument, pointer) for argument in kernel.arg_names}


@pytest.mark.parametrize(
    ("name", "capability", "head_dim", "window", "variant"),
    EXHAUSTIVE if EXHAUSTED else SELECTION,
)
def test_no_spills(name, capability, head_dim, window, variant):
    pytest.importorskip("triton", reason="triton is not installed")
    from swat_lm.ops.triton import backward_kernels, forward
    from swat_lm.ops.triton.configurations import Problem, configuration

    kernel = {"forward": forward._forward, "backward query": backward_kernels.backward_query}.get(
        name, backward_kernels.backward_key
    )
    dtype = torch.float16 if "half" in variant else torch.bfloat16
    problem = Problem(window, head_dim, 1, dtype, "softmax" in variant, divmod(capability, 10), True)
    problem = problem._replace(rotary="rotary" in variant)
    tile = configuration(name, problem)
    arguments = arguments_of(kernel, name, problem, tile, variant)
    compiled = compile_kernel(kernel, arguments, capability, tile.warps, tile.stages, tile.registers)
    assert compiled.spills == 0, f"{tile}: {compiled.spills} registers spilled of {compiled.registers}"
    assert compiled.tensor_core_products > 0
    if not problem.softmax:
        # one tanh for a weight, or an exponential and a reciprocal; three loops
        weights = 3 * tile.rows * tile.keys // (32 * tile.warps)
        # and a root and a reciprocal to find what is saturated
        extra = 4 if "skip" in variant else 0
        assert 0 <= compiled.instructions["MUFU"] - weights * (1 if "exact" not in variant else 2) <= extra
    assert compiled.shared_bytes <= SHARED[capability] * 1024


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


def test_another_length_is_no_reason_to_compile_again():
    """Triton makes a kernel of its own for an argument of 1 and for multiples of 16, unless it is told not to."""
    pytest.importorskip("triton", reason="triton is not installed")
    from swat_lm.ops.triton import backward_kernels, forward, rotation, saturation
    from swat_lm.ops.triton.device import SIZES

    kernels = (
        forward._forward, backward_kernels.backward_query, backward_kernels.backward_key, rotation._rotate,
        saturation._norms_of_blocks,
    )  # fmt: skip
    found = {p.name: p.do_not_specialize for kernel in kernels for p in kernel.params if p.name in SIZES}
    assert found == dict.fromkeys(SIZES, True)


def test_every_problem_has_a_tile():
    from swat_lm.ops.triton.configurations import Problem, configuration

    for name, dtype, capability, head_dim, window, softmax in itertools.product(
        KERNELS, (torch.float32, torch.float16), ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)),
        (2, 16, 64, 80, 128, 256), (1, 4096), (False, True),
    ):  # fmt: skip
        tile = configuration(name, Problem(window, head_dim, 1, dtype, softmax, capability, True))
        assert min(tile.rows, tile.keys) >= 16


def test_the_harness_sees_spills():
    """A tile that cannot fit: the counter must not be blind."""
    pytest.importorskip("triton", reason="triton is not installed")
    from swat_lm.ops.triton import forward
    from swat_lm.ops.triton.configurations import Problem

    problem = Problem(512, 128, 1, torch.bfloat16, False, (9, 0), True)
    tile = SimpleNamespace(rows=128, keys=64)
    arguments = arguments_of(forward._forward, "forward", problem, tile, "")
    assert compile_kernel(forward._forward, arguments, 90, 4, 3).spills > 100
