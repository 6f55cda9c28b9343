"""The forward kernel against the definition, under the interpreter: shapes whose bands have every kind of edge."""

import pytest
import torch

from tests.exactness import assert_as_exact_as_pytorch
from tests.ops.test_backends import make_inputs, ragged

# B, T, S, H, K, D: odd sizes, grouped heads, T < S, a head that is no power of two, one query
SHAPES = [(1, 37, 37, 2, 1, 8), (1, 20, 50, 2, 2, 24), (2, 1, 9, 1, 1, 16)]


def check(shape, window, score_function, dtype, fast, has_visibility):
    from swat_lm.ops.calls import AttentionCall
    from swat_lm.ops.reference import window_attention_reference
    from swat_lm.ops.triton.forward import forward

    # inputs that both precisions hold
    query, key, value, slopes, bias = (t.to(torch.float16).double() for t in make_inputs(shape))
    first, last = ragged(shape) if has_visibility else (None, None)
    rest = (first, last, window, score_function, shape[-1] ** -0.5)
    exact, exact_lse = window_attention_reference(query, key, value, slopes, bias, *rest)
    q, k, v = (t.to(dtype) for t in (query, key, value))
    head_bias = slopes.float(), bias.float()
    plain, plain_lse = window_attention_reference(q, k, v, *head_bias, *rest)
    output, lse, *_ = forward(
        AttentionCall(
            q, k, v, window, score_function, shape[-1] ** -0.5, *head_bias, first_visible=first, last_visible=last,
            precision="fast" if fast else "exact", backend="triton",
        )
    )  # fmt: skip
    assert_as_exact_as_pytorch(output, plain, exact, "output", summed=3.0)
    if score_function == "softmax":
        assert_as_exact_as_pytorch(lse, plain_lse, exact_lse, "lse", summed=3.0)


@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
@pytest.mark.parametrize(("shape", "window"), [(SHAPES[0], 1), (SHAPES[0], 32), (SHAPES[1], 20), (SHAPES[2], None)])
def test_regular(interpreted, shape, window, score_function):
    interpreted(check, shape, window, score_function, torch.float32, False, False)


@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
@pytest.mark.parametrize(("shape", "window"), [(SHAPES[0], None), (SHAPES[1], 7)])
def test_with_visibility(interpreted, shape, window, score_function):
    interpreted(check, shape, window, score_function, torch.float32, False, True)


@pytest.mark.parametrize(("score_function", "fast"), [("sigmoid", False), ("sigmoid", True), ("softmax", False)])
def test_half_precision(interpreted, score_function, fast):
    interpreted(check, SHAPES[0], 20, score_function, torch.float16, fast, False)


@pytest.mark.parametrize("has_visibility", [False, True])
def test_a_scale_that_queries_carry(interpreted, has_visibility):
    """A power of two: a head of 16 channels."""
    interpreted(check, (1, 37, 41, 2, 1, 16), 20, "sigmoid", torch.float16, True, has_visibility)


def check_nan():
    from swat_lm.ops import window_attention

    # not a number must show in every row that sees it, also where tiles are masked
    query, key, value, *_ = (t.float() for t in make_inputs((1, 40, 40, 1, 1, 16)))
    key[0, 20] = float("nan")
    for score_function, precision in (("sigmoid", "exact"), ("softmax", "exact")):
        output = window_attention(
            query, key, value, window=8, score_function=score_function, backend="triton", precision=precision,
        )  # fmt: skip
        assert output[:, 20:28].isnan().all(), score_function


def test_not_a_number_shows_where_it_is_seen(interpreted):
    interpreted(check_nan)
