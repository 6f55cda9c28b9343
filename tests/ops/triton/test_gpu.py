"""The kernels on an NVIDIA GPU against the definition: `make test-gpu`. Nothing here runs without one."""

import itertools

import pytest
import torch

from swat_lm.ops import window_attention
from swat_lm.ops.rotary import rotary_angles
from tests.exactness import assert_as_exact_as_pytorch
from tests.ops.test_backends import NAMES, make_inputs, ragged

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that PyTorch can use"),
]
# B, T, S, H, K, D
SHAPES = [(2, 300, 300, 4, 2, 64), (1, 130, 517, 4, 1, 128), (2, 1, 90, 2, 2, 32), (1, 257, 257, 3, 3, 80)]
WIDE = (1, 2500, 2500, 2, 1, 64)


def run(inputs, dtype, backend, score_function, visibility, **options):
    tensors = [t.to("cuda", dtype if i < 3 else max(dtype, torch.float32, key=lambda d: torch.finfo(d).bits))
               for i, t in enumerate(inputs)]  # fmt: skip
    tensors = [t.requires_grad_() for t in tensors]
    first, last = (None if v is None else v.cuda() for v in visibility)
    softmax = score_function == "softmax"
    result = window_attention(
        *tensors[:3], slopes=tensors[3], score_bias=tensors[4], score_function=score_function, first_visible=first,
        last_visible=last, return_lse=softmax, backend=backend, **options,
    )  # fmt: skip
    output, lse = result if softmax else (result, None)
    loss = output.double().sin().sum()
    if lse is not None:
        loss = loss + lse.masked_fill(lse.isinf(), 0.0).double().cos().sum()
    return dict(zip(("output", *NAMES), (output, *torch.autograd.grad(loss, tensors)), strict=True))


def compare(shape, dtype, score_function, visibility=(None, None), **options):
    # every precision holds these
    inputs = [t.to(torch.bfloat16).to(torch.float16).double() for t in make_inputs(shape)]
    inputs[3] = inputs[3] / 8
    plain_options = {k: v for k, v in options.items() if k not in ("precision", "skip_saturated")}
    exact = run(inputs, torch.float64, "reference", score_function, visibility, **plain_options)
    plain = run(inputs, dtype, "reference", score_function, visibility, **plain_options)
    ours = run(inputs, dtype, "triton", score_function, visibility, **options)
    reach = min(options["window"] or shape[2], shape[2])
    pairs = (shape[0] * shape[1] * reach * shape[5]) ** 0.5
    for name, expected in exact.items():
        summed = {"slopes": 4 * pairs * reach, "score_bias": 4 * pairs}.get(name, 4 * reach**0.5)
        if dtype != torch.float32 and name in ("slopes", "score_bias"):
            # the scores' gradients are rounded to the inputs' precision on the way in both; one number per head
            scale = torch.finfo(dtype).eps * pairs * (reach if name == "slopes" else 1)
            assert (ours[name].double() - expected).abs().max() <= 4 * scale, name
            continue
        assert_as_exact_as_pytorch(
            ours[name].detach(), plain[name].detach().to(ours[name].dtype), expected.detach(), name, summed
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
@pytest.mark.parametrize("form", ["two kernels", "five products"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_definition(monkeypatch, shape, form, score_function, dtype):
    monkeypatch.setenv("SWAT_LM_BACKWARD", form)
    for window in (1, 64, 100, None):
        compare(shape, dtype, score_function, window=window)
    first, last = ragged(shape)
    for visibility in ((first, None), (None, last), (first, last)):
        compare(shape, dtype, score_function, visibility, window=70)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("head_dim", "precision"), itertools.product([32, 64, 96, 128, 256], ["exact", "fast"]))
def test_wide_windows_and_every_head_size(head_dim, precision, dtype):
    compare((*WIDE[:5], head_dim), dtype, "sigmoid", window=1024, precision=precision)
    compare((*WIDE[:5], head_dim), dtype, "sigmoid", window=200, precision=precision)


@pytest.mark.parametrize("head_dim", [64, 96])
@pytest.mark.parametrize("form", ["two kernels", "five products"])
def test_rotary_and_skipping(monkeypatch, form, head_dim):
    monkeypatch.setenv("SWAT_LM_BACKWARD", form)
    angles = rotary_angles(torch.arange(300, device="cuda"), head_dim)
    compare((2, 300, 300, 4, 2, head_dim), torch.bfloat16, "sigmoid", window=100, rotary=angles)
    compare((1, 600, 600, 4, 2, head_dim), torch.float32, "sigmoid", window=500, skip_saturated=True)


def test_fast_weights():
    """The bound of the hardware's tanh, over every score that matters, and never NaN for large ones."""
    scores = torch.linspace(-30, 30, 4096)
    query = torch.ones(1, 1, 4096, 16, device="cuda", dtype=torch.bfloat16)
    key, value = query[:, :, :1] * 0, query[:, :, :1]
    for precision, bound in (("fast", 2.5e-4), ("exact", 1e-6)):
        bias = torch.cat((scores[:-2], torch.tensor([1e4, -1e4]))).cuda()
        output = window_attention(
            query, key, value, window=1, score_bias=bias, precision=precision, backend="triton"
        ).double()  # fmt: skip
        exact = torch.sigmoid(bias.double())[None, None, :, None]
        # the output is rounded to bfloat16
        assert ((output - exact).abs() <= bound + 2.0**-8 * exact).all()


def test_two_kernels_are_deterministic():
    inputs = make_inputs((2, 2000, 2000, 4, 2, 64))
    torch.use_deterministic_algorithms(True)
    try:
        runs = [run(inputs, torch.bfloat16, "triton", "sigmoid", (None, None), window=1024) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    for name, tensor in runs[0].items():
        assert torch.equal(tensor, runs[1][name]), name


@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
def test_opcheck_and_compile(score_function):
    query, key, value, slopes, bias = (t.float().cuda().requires_grad_() for t in make_inputs((2, 40, 40, 4, 2, 16)))
    tail = (None, None, None, None, 0.0, 4, score_function, 0.3, "auto", "triton", False)
    torch.library.opcheck(torch.ops.swat_lm.window_attention, (query, key, value, slopes, bias, *tail))

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
