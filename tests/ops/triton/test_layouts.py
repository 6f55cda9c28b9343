"""Calls whose tensors lie in memory in another way than a fresh one, and numbers that exceed 32 bits."""

import os

import pytest
import torch

from tests.exactness import assert_as_exact_as_pytorch
from tests.ops.test_backends import NAMES, make_inputs, outputs_and_gradients, ragged

SHAPE = (1, 37, 37, 4, 2, 8)


def compare(shape, score_function, window, arrange, first=None, last=None):
    """Outputs and gradients where `arrange` lays out every input, and the output's gradient comes transposed."""
    from swat_lm.ops import window_attention

    def run(dtype, backend):
        tensors = [t.to(dtype).requires_grad_() for t in make_inputs(shape)]
        output = window_attention(
            *(arrange(t) for t in tensors[:3]), slopes=arrange(tensors[3]), score_bias=arrange(tensors[4]),
            window=window, score_function=score_function, first_visible=first, last_visible=last, backend=backend,
        )  # fmt: skip
        weights = torch.linspace(-1, 1, output.numel(), dtype=dtype).view(output.transpose(1, 2).shape)
        loss = (output.transpose(1, 2) * weights).sum()
        return dict(zip(("output", *NAMES), (output, *torch.autograd.grad(loss, tensors)), strict=True))

    exact, plain, ours = run(torch.float64, "reference"), run(torch.float32, "reference"), run(torch.float32, "triton")
    for name, expected in exact.items():
        summed = {"slopes": 1000.0, "score_bias": 100.0}.get(name, 8.0)
        assert_as_exact_as_pytorch(ours[name].detach(), plain[name].detach(), expected.detach(), name, summed)


def every_second(tensor):
    """The same numbers with others between them along the last dimension."""
    return torch.stack((tensor, torch.full_like(tensor, 3.0)), dim=-1)[..., 0]


def heads_first(tensor):
    return tensor if tensor.dim() < 4 else tensor.transpose(1, 2).contiguous().transpose(1, 2)


def check_layouts(score_function):
    for arrange in (lambda t: t, every_second, heads_first):
        compare(SHAPE, score_function, 12, arrange)


@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
def test_any_layout_of_inputs_and_of_the_incoming_gradient(interpreted, score_function):
    interpreted(check_layouts, score_function)


def check_few_keys(score_function):
    # first tokens that are kept: many more queries than keys
    shape = (2, 40, 3, 4, 2, 8)
    compare(shape, score_function, None, lambda t: t, *ragged(shape))


@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
def test_more_queries_than_keys(interpreted, score_function):
    interpreted(check_few_keys, score_function)


def check_expanded():
    from swat_lm.ops import window_attention

    query, key, value, *_ = (t.float() for t in make_inputs(SHAPE))
    options = {"window": 12, "backend": "triton"}
    one_slope = torch.tensor([-0.3]).expand(4)
    shared = key[:, :, :1].expand(-1, -1, 2, -1), value[:, :, :1].expand(-1, -1, 2, -1)
    expected = window_attention(query, *(t.contiguous() for t in shared), slopes=one_slope.contiguous(), **options)
    assert torch.equal(
        window_attention(query, *shared, slopes=one_slope, score_bias=torch.zeros(1).expand(4), **options), expected
    )


def test_expanded_tensors(interpreted):
    interpreted(check_expanded)


def check_far_heads():
    """The third head begins 2**31 elements into its tensor; memory that nobody touches costs nothing."""
    from swat_lm.ops import window_attention

    apart = 2**30
    near = torch.randn(2, 20, 3, 16, generator=torch.Generator().manual_seed(0)).half()
    far = torch.empty(2 * apart + 2 * 20 * 16, dtype=torch.float16).as_strided((2, 20, 3, 16), (320, 16, apart, 1))
    far.copy_(near)
    os.environ["SWAT_LM_BACKWARD"] = "two kernels"
    results = []
    for tensor in (near, far):
        leaves = [tensor.detach().requires_grad_() for _ in range(3)]
        output = window_attention(
            *leaves, window=9, skip_saturated=True, slopes=torch.tensor([-8.0, 8.0, 0.1]), backend="triton"
        )
        gradients = torch.autograd.grad(output, leaves, tensor)
        results.append((output, *gradients))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


def test_heads_beyond_32_bits(interpreted):
    interpreted(check_far_heads)


def check_huge_window():
    first, last = ragged((2, 20, 25, 2, 1, 8))
    inputs = make_inputs((2, 20, 25, 2, 1, 8))
    results = [
        outputs_and_gradients(inputs, torch.float32, "triton", "sigmoid", window, first, last) for window in (2**40, 25)
    ]
    for name, expected in results[1].items():
        assert torch.equal(results[0][name], expected)


def test_windows_beyond_32_bits(interpreted):
    interpreted(check_huge_window)
