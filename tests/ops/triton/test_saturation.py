"""Skipping saturated tiles: the bound of its error, what it saves, and that the kernels keep both."""

import math
import os

import pytest
import torch

from tests.ops.test_backends import make_inputs

BOUND = 4.2e-8


def share_saved(*arguments):
    pytest.importorskip("triton", reason="triton is not installed")
    from swat_lm.ops.triton import saturation

    return saturation.share_saved(*arguments)


def test_the_bound():
    """Weights beyond the reach are 0 or 1 to within 4.2e-8, for every product the bound allows."""
    assert 1 / (1 + math.exp(17.0)) < BOUND
    products = torch.linspace(-6.0, 6.0, 101, dtype=torch.float64)
    for slope in (-0.5, -(2.0**-6), 0.5, 2.0**-6):
        for bias in (-7.0, 0.0, 3.0):
            reach = math.ceil((6.0 + (bias if slope < 0 else -bias) + 17.0) / abs(slope))
            distance = torch.arange(reach, reach + 3000, dtype=torch.float64)[:, None]
            weights = torch.sigmoid(products + slope * distance + bias)
            error = weights.max() if slope < 0 else (1 - weights).max()
            assert error <= BOUND
            # the gradient to the product is as small
            assert (weights * (1 - weights)).max() <= BOUND


def test_share_saved():
    """Balanced slopes at window 1024 and 16 heads save 0.3 to 0.45 of the products (specification), before rounding."""
    slopes = [sign * 2.0**-k for sign in (-1, 1) for k in range(1, 9)]
    for bound, fine, shipped in ((4.0, 0.45, 0.35), (16.0, 0.40, 0.30)):
        assert share_saved(slopes, 1024, bound, 64, 16) == pytest.approx(fine, abs=0.09)
        assert share_saved(slopes, 1024, bound, 128, 128) == pytest.approx(shipped, abs=0.09)
    assert share_saved(slopes, 128, 4.0, 64, 64) < share_saved(slopes, 1024, 4.0, 64, 64)
    # no slope never saturates; a steep one leaves little but the diagonal, and a positive one its left edge
    assert share_saved([0.0], 1024, 4.0, 64, 64) == 0.0
    assert share_saved([-100.0], 1024, 4.0, 64, 64) == 16 / 17
    assert share_saved([100.0], 1024, 4.0, 64, 64) == 15 / 17


def run(inputs, form, window, first, skip):
    from swat_lm.ops import window_attention

    os.environ["SWAT_LM_BACKWARD"] = form
    tensors = [t.float().requires_grad_() for t in inputs]
    output = window_attention(
        *tensors[:3], window=window, slopes=tensors[3], score_bias=tensors[4], first_visible=first,
        skip_saturated=skip, backend="triton",
    )  # fmt: skip
    return output, torch.autograd.grad(output.sin().sum(), tensors)


def check(form, has_documents, window):
    from swat_lm.ops.reference import distances

    shape = (1, 60, 64, 2, 1, 8)
    inputs = make_inputs(shape)
    # neither tiny nor huge: some tiles are saturated, some are not
    inputs[3] = torch.tensor([-1.5, 1.5])
    inputs[4] = torch.tensor([0.5, -0.5])
    first = torch.arange(60, dtype=torch.int32).div(44, rounding_mode="floor").mul(44)[None] if has_documents else None
    output, gradients = run(inputs, form, window, first, True)
    plain, plain_gradients = run(inputs, form, window, first, False)

    query, key, value = inputs[:3]
    distance, visible = distances(1, 60, 64, first, None, window, query.device)
    norm = lambda t: t.norm(dim=-1).amax(dim=1)  # noqa: E731
    product_bound = norm(query) * norm(key).repeat_interleave(2, dim=1) * 8**-0.5
    signed_bias = torch.where(inputs[3] < 0, inputs[4], -inputs[4])
    reach = (product_bound[0] + signed_bias + 17) / inputs[3].abs()
    treated = visible[:, None] & (distance[:, None] >= reach[:, None, None])
    assert treated.any()
    sums = torch.einsum("bhts,bshd->bthd", treated.double(), value.abs().repeat_interleave(2, dim=2))
    # what float32 itself rounds: sums of up to 100 values
    rounding = 2e-6 * value.abs().sum(dim=1).max()
    assert ((output - plain).abs() <= BOUND * sums + rounding).all()
    for name, ours, theirs in zip(("query", "key", "value", "slopes", "bias"), gradients, plain_gradients, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max() + 1e-4 * (name == "slopes"), name


@pytest.mark.parametrize(
    ("form", "documents", "window"),
    [("two kernels", False, 40), ("five products", True, 45), ("two kernels", True, None)],
)
def test_kernels_keep_the_bound(interpreted, form, documents, window):
    interpreted(check, form, documents, window)


def check_that_tiles_are_skipped():
    """Poisoned keys and values in saturated places: what is not read cannot spoil the result."""
    from swat_lm.ops import window_attention

    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 96, 1, 8, generator=generator) for _ in range(3))
    options = {"window": 96, "slopes": torch.tensor([-4.0]), "skip_saturated": True, "backend": "triton"}
    clean = window_attention(query, key, value, **options)
    spoilt = value.clone()
    spoilt[:, :16] = float("nan")
    output = window_attention(query, key, spoilt, **options)
    assert torch.equal(output[:, 80:], clean[:, 80:])
    # of a positive head the values are read there, the keys are not
    options["slopes"] = -options["slopes"]
    clean = window_attention(query, key, value, **options)
    other_key = torch.cat((key[:, :16], -key[:, 16:32], key[:, 32:]), dim=1)
    assert torch.equal(window_attention(query, other_key, value, **options)[:, 80:], clean[:, 80:])
    assert window_attention(query, key, spoilt, **options)[:, 80:].isnan().any()
    options["skip_saturated"] = False
    assert window_attention(query, key, spoilt, **options)[:, 80:].isnan().any()


def test_saturated_tiles_are_not_read(interpreted):
    interpreted(check_that_tiles_are_skipped)


def check_what_does_not_saturate():
    """A slope of 0 with a large bias, and numbers that are none: only what the bound covers may be skipped."""
    inputs = make_inputs((1, 36, 36, 2, 1, 8))
    inputs[3], inputs[4] = torch.tensor([0.0, -4.0]), torch.tensor([200.0, 0.0])
    spoilt = [t.clone() for t in inputs]
    spoilt[1][0, 2], spoilt[1][0, 3] = float("nan"), float("inf")
    spoilt[0][0, 30:] = 0.0
    for tensors in (inputs, spoilt):
        output, gradients = run(tensors, "two kernels", 30, None, True)
        plain, plain_gradients = run(tensors, "two kernels", 30, None, False)
        for ours, theirs in ((output, plain), *zip(gradients, plain_gradients, strict=True)):
            torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-5, equal_nan=True)


def test_nothing_else_is_skipped(interpreted):
    interpreted(check_what_does_not_saturate)
