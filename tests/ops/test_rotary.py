"""Rotary from absolute positions: relative by construction, exact far into a stream."""

import pytest
import torch

from swat_lm.ops.rotary import apply_rotary, inverse_frequencies, rotary_angles


def test_frequencies_and_the_pairing():
    torch.testing.assert_close(inverse_frequencies(4, 100.0), torch.tensor([1.0, 0.1], dtype=torch.float64))
    x = torch.tensor([1.0, 0.0, 0.0, 2.0]).view(1, 1, 1, 4)
    cos, sin = rotary_angles(torch.tensor([[3]]), 4, base=100.0)
    c, s = torch.cos(torch.tensor([3.0, 0.3])), torch.sin(torch.tensor([3.0, 0.3]))
    # pair 0 is (x0, x2) = (1, 0), pair 1 is (x1, x3) = (0, 2)
    expected = torch.stack([c[0], -2 * s[1], s[0], 2 * c[1]])
    torch.testing.assert_close(apply_rotary(x, cos, sin).flatten(), expected)


@pytest.mark.parametrize("offset", [10**5, 10**7, 10**9])
def test_products_depend_on_distance_only_however_far_the_stream_is(offset):
    torch.manual_seed(0)
    query, key = torch.randn(1, 16, 2, 64), torch.randn(1, 16, 2, 64)

    def products(start):
        cos, sin = rotary_angles(start + torch.arange(16)[None], 64)
        return torch.einsum("bthd,bshd->bhts", apply_rotary(query, cos, sin), apply_rotary(key, cos, sin))

    # the rounding of float32 products, nothing that grows with the position
    torch.testing.assert_close(products(offset), products(0), atol=3e-5, rtol=0)


def test_float32_angles_would_fail_that_test():
    frequencies = inverse_frequencies(64, 1e4)
    naive = torch.tensor(1e7) * frequencies.float()
    exact = 1e7 * frequencies
    assert (naive.cos() - exact.cos()).abs().max() > 0.01


def test_half_precision_inputs_are_rotated_in_float32():
    x = torch.randn(1, 8, 2, 16).to(torch.bfloat16)
    cos, sin = rotary_angles(torch.arange(8)[None], 16)
    rotated = apply_rotary(x, cos, sin)
    assert rotated.dtype == torch.bfloat16
    torch.testing.assert_close(rotated, apply_rotary(x.float(), cos, sin).to(torch.bfloat16))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: inverse_frequencies(7, 1e4), "even head size, got 7"),
        (lambda: inverse_frequencies(8, 0.0), "positive rotary base"),
        (lambda: rotary_angles(torch.zeros(1, 3), 8), "expected integers"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
