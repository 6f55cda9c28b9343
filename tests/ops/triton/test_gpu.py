"""The kernels on an NVIDIA GPU against the definition: `make test-gpu`. Nothing here runs without one."""

import itertools

import pytest
import torch

from swat_lm.ops import window_attention
from swat_lm.ops.calls import AttentionCall
from tests.ops.test_backends import make_inputs
from tests.ops.triton import cases
from tests.ops.triton.calls import Call, check, check_fast_weights, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that PyTorch can use"),
]


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
@pytest.mark.parametrize("form", cases.FORMS)
@pytest.mark.parametrize("shape", cases.SHAPES, ids=str)
def test_against_the_definition(shape, form, score_function, dtype):
    for call in cases.against_the_definition(shape, form, score_function, dtype):
        check(call, "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("head_dim", "precision"), list(itertools.product(cases.HEADS, ["exact", "fast"])))
def test_wide_windows_and_every_head_size(head_dim, precision, dtype):
    for call in cases.wide_windows(head_dim, precision, dtype):
        check(call, "cuda")


@pytest.mark.parametrize("head_dim", [64, 96])
@pytest.mark.parametrize("form", cases.FORMS)
def test_rotary_and_skipping(form, head_dim):
    for call in cases.rotary_and_skipping(head_dim, form):
        check(call, "cuda")


@pytest.mark.parametrize("seed", range(200))
def test_at_random(seed):
    check(cases.at_random(seed).call, "cuda")


def test_fast_weights():
    check_fast_weights("cuda")


def test_two_kernels_are_deterministic():
    call = Call((2, 2000, 2000, 4, 2, 64), 1024)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [run(call, torch.bfloat16, "triton", "cuda") for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    for name, tensor in runs[0].items():
        assert torch.equal(tensor, runs[1][name]), name


@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
def test_opcheck_and_compile(score_function):
    query, key, value, slopes, bias = (t.float().cuda().requires_grad_() for t in make_inputs((2, 40, 40, 4, 2, 16)))
    call = AttentionCall(query, key, value, 4, score_function, 0.3, slopes, bias, backend="triton")
    torch.library.opcheck(torch.ops.swat_lm.window_attention, tuple(call))

    def loss(query, key, value):
        return window_attention(query, key, value, window=9, score_function=score_function).square().sum()

    compiled = torch.compile(loss, fullgraph=True)
    expected = torch.autograd.grad(loss(query, key, value), (query, key, value))
    for ours, theirs in zip(
        torch.autograd.grad(compiled(query, key, value), (query, key, value)), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_memory_is_linear():
    """No matrix of T * S, forward or backward."""
    peaks = []
    for num_tokens in (8192, 16384):
        tensors = [
            torch.randn(1, num_tokens, 2, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in "qkv"
        ]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        window_attention(*tensors, window=256).sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= 2.2 * peaks[0]


def test_softmax_makes_no_float32_copies():
    """Beside what sigmoid needs, its backward holds the output, in its own dtype, and three numbers a row."""
    peaks = {}
    for score_function in ("sigmoid", "softmax"):
        tensors = [torch.randn(1, 8192, 4, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in "qkv"]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        window_attention(*tensors, window=256, score_function=score_function).sum().backward()
        peaks[score_function] = torch.cuda.max_memory_allocated() - before
    assert peaks["softmax"] - peaks["sigmoid"] < 2 * tensors[0].numel() * tensors[0].element_size()
