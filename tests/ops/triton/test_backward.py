"""The backward kernels against autograd of the definition, under the interpreter, in both forms."""

import os

import pytest
import torch

from tests.exactness import assert_as_exact_as_pytorch
from tests.ops.test_backends import make_inputs, ragged

# B, T, S, H, K, D: odd sizes, grouped heads, T < S, a head that is no power of two
SHAPES = [(1, 37, 37, 2, 1, 8), (1, 20, 41, 2, 2, 24), (2, 1, 9, 1, 1, 16)]
FORMS = ["two kernels", "five products"]


def reference(inputs, visibility, window, score_function, grads):
    from swat_lm.ops.reference import window_attention_reference

    inputs = [t.detach().requires_grad_() for t in inputs]
    output, lse = window_attention_reference(*inputs, *visibility, window, score_function, inputs[0].shape[-1] ** -0.5)
    outputs, cotangents = [output], [grads[0].to(output.dtype)]
    if lse is not None:
        outputs.append(lse.masked_fill(lse.isinf(), 0.0))
        cotangents.append(grads[1].to(lse.dtype))
    return torch.autograd.grad(outputs, inputs, cotangents)


def check(shape, window, score_function, dtype, form, has_visibility, fast=False):
    from swat_lm.ops.calls import AttentionCall
    from swat_lm.ops.triton.backward import backward
    from swat_lm.ops.triton.forward import forward

    os.environ["SWAT_LM_BACKWARD"] = form
    inputs = [t.to(torch.float16).double() for t in make_inputs(shape)]
    visibility = ragged(shape) if has_visibility else (None, None)
    grads = [inputs[0].sin(), inputs[0][..., 0].cos()]
    arguments = (visibility, window, score_function, grads)
    exact = reference(inputs, *arguments)
    plain = reference([t.to(dtype) for t in inputs[:3]] + [t.float() for t in inputs[3:]], *arguments)
    q, k, v = (t.to(dtype) for t in inputs[:3])
    call = AttentionCall(
        q, k, v, window, score_function, shape[-1] ** -0.5, inputs[3].float(), inputs[4].float(),
        first_visible=visibility[0], last_visible=visibility[1], precision="fast" if fast else "exact",
        backend="triton",
    )  # fmt: skip
    output, lse, *_ = forward(call)
    ours = backward(call, grads[0].to(dtype), grads[1].float() if call.softmax else None, output, lse, True)
    flat = (*ours[:3], ours[3].slopes.float(), ours[3].constant.float())
    pairs = shape[0] * shape[1] * min(window or shape[2], shape[2])
    summed = (8.0, 8.0, 8.0, 4 * pairs**0.5 * shape[2], 4 * pairs**0.5)
    for name, mine, theirs, true, terms in zip(
        ("query", "key", "value", "slopes", "score_bias"), flat, plain, exact, summed, strict=True
    ):
        if dtype == torch.float16 and name in ("slopes", "score_bias"):
            # scores' gradients in float32 here, but in float16 in PyTorch's plain computation
            assert (mine - true).abs().max() <= 1e-2 * (1 + true.abs().max()), name
        else:
            assert_as_exact_as_pytorch(mine, theirs, true, name, terms)


@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
@pytest.mark.parametrize(
    ("shape", "window", "form"),
    [(SHAPES[0], 1, 0), (SHAPES[0], 32, 0), (SHAPES[1], 20, 0), (SHAPES[1], 20, 1), (SHAPES[2], None, 1)],
)
def test_regular(interpreted, shape, window, form, score_function):
    interpreted(check, shape, window, score_function, torch.float32, FORMS[form], False)


@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
@pytest.mark.parametrize(("shape", "window", "form"), [(SHAPES[0], None, 0), (SHAPES[1], 7, 1)])
def test_with_visibility(interpreted, shape, window, form, score_function):
    interpreted(check, shape, window, score_function, torch.float32, FORMS[form], True)


@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
def test_half_precision(interpreted, score_function):
    interpreted(check, SHAPES[0], 20, score_function, torch.float16, FORMS[0], False)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("head_dim", "has_visibility"), [(8, False), (16, False), (16, True)])
def test_fast_weights(interpreted, form, head_dim, has_visibility):
    """With 16 channels the scale is a power of two, and queries or keys carry it."""
    shape = (1, 37, 41, 2, 1, head_dim)
    interpreted(check, shape, 20, "sigmoid", torch.float16, form, has_visibility, True)
