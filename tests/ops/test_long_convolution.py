"""Long convolutions against a plain loop: causal and both ways, kernels of any length, precisions, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swat_lm.ops.long_convolution import DIRECT, fast_length, long_convolution
from tests.exactness import assert_as_exact_as_pytorch


def plain(x, kernel, later=None):
    """Token by token, as the equation says it."""
    rows = []
    for t in range(x.shape[1]):
        total = torch.zeros_like(x[:, 0])
        for j in range(x.shape[1]):
            if 0 <= t - j < kernel.shape[1]:
                total = total + kernel[:, t - j] * x[:, j]
            if later is not None and 0 <= j - t - 1 < later.shape[1]:
                total = total + later[:, j - t - 1] * x[:, j]
        rows.append(total)
    return torch.stack(rows, dim=1)


def draw(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(
    num_tokens=st.one_of(st.integers(1, 12), st.integers(DIRECT - 1, DIRECT + 6)),
    taps=st.integers(0, DIRECT + 20),
    later=st.one_of(st.none(), st.integers(0, DIRECT + 20)),
    seed=st.integers(0, 5),
)
def test_it_is_the_plain_sum_with_its_gradients(num_tokens, taps, later, seed):
    """Never circular, whatever the kernel's length beside the row's."""
    inputs = [draw(2, num_tokens, 2, seed=seed), draw(2, taps, seed=seed + 1)]
    inputs += [] if later is None else [draw(2, later, seed=seed + 2)]
    inputs = [x.requires_grad_() for x in inputs]
    ours = long_convolution(*inputs[:2], later=inputs[2] if later is not None else None)
    expected = plain(*inputs)
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-12)
    if ours.requires_grad and expected.requires_grad:
        found = torch.autograd.grad(ours.sin().sum(), inputs, allow_unused=True, materialize_grads=True)
        wanted = torch.autograd.grad(expected.sin().sum(), inputs, allow_unused=True, materialize_grads=True)
        torch.testing.assert_close(found, wanted, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_precisions(dtype):
    x, kernel = draw(1, 150, 2).to(dtype), draw(2, 200, seed=1).float()
    ours = long_convolution(x, kernel)
    assert ours.dtype == dtype
    exact = plain(x.double(), kernel.double())
    assert_as_exact_as_pytorch(ours, plain(x.float(), kernel).to(dtype), exact, summed=150**0.5)


def test_short_rows_send_nothing_to_what_came_before_and_long_ones_rounding_only():
    """An FFT's rounding reaches every place: it is held to the precision's, and is exactly nothing tap by tap."""
    for num_tokens, most in ((DIRECT, 0.0), (DIRECT + 200, 1e-12)):
        x = draw(1, num_tokens, 2).requires_grad_()
        (gradient,) = torch.autograd.grad(long_convolution(x, draw(2, num_tokens, seed=1))[:, 20].sum(), x)
        assert gradient[:, 21:].abs().max() <= most
        assert gradient[:, :21].abs().min() > 1e-5


def test_lengths_of_transforms():
    assert [fast_length(n) for n in (1, 2, 3, 7, 17, 97, 129, 1000, 4095)] == [2, 2, 4, 8, 18, 100, 144, 1000, 4096]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": torch.zeros(3, 4)}, r"^inputs: expected \[batch, tokens, channels\], got \[3, 4\]"),
        ({"inputs": torch.zeros(1, 3, 4, dtype=torch.int64)}, "^inputs: expected a tensor of float32"),
        ({"kernel": torch.zeros(3, 4)}, r"^kernel: expected \[4 channels, taps\], got \[3, 4\]"),
        ({"later": torch.zeros(4)}, r"^later: expected \[4 channels, taps\], got \[4\]"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        long_convolution(**{"inputs": torch.zeros(2, 3, 4), "kernel": torch.zeros(4, 4), **change})
