"""Gradients beyond float16: what exceeds it is infinite or not a number, and what is finite is right."""

import itertools
import os
import re
import warnings

import pytest
import torch

from benchmarks.gpu.machine_code import compile_attention
from tests.ops.test_backends import make_inputs

# B, T, S, H, K, D; the interpreter's tiles are 16 x 16
SHAPE = (1, 24, 24, 2, 1, 8)
WINDOW = 11
LARGEST = torch.finfo(torch.float16).max
# what is this large rounds to infinity
INFINITE = 65520.0
# relative roundings, and what is lost below float16's smallest numbers
EPSILON, TINY = 2.0**-11, 2.0**-25
# powers of two that queries, keys, values and the output's gradient are multiplied by
POWERS = [
    (0, 0, 0, 0),
    # beyond float16: scores' gradients and the keys'; scores' alone; the values'; the keys'; the queries'; all
    (0, -7, 5, 12),
    (-7, -7, 5, 12),
    (0, 0, -8, 15),
    (4, 0, 0, 12),
    (0, 4, 3, 9),
    (0, 0, 8, 15),
]


def exact_gradients(inputs, grad_output, score_function):
    """By the equations in float64: of scores `[B, H, T, S]`, queries, keys and values, and how far each may be off."""
    query, key, value, slopes, bias = inputs
    group = query.shape[2] // key.shape[2]
    q, g = query.transpose(1, 2), grad_output.transpose(1, 2)
    k, v = (t.repeat_interleave(group, dim=2).transpose(1, 2) for t in (key, value))
    scale = q.shape[-1] ** -0.5
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
    visible = (distance >= 0) & (distance < WINDOW)
    scores = q @ k.mT * scale + slopes[:, None, None] * distance + bias[:, None, None]
    d_weight = g @ v.mT
    if score_function == "sigmoid":
        p = scores.sigmoid() * visible
        d_score = p * (1 - p) * d_weight
        # fp32 products of large numbers of both signs
        off = p * 2.0**-20 * (g.abs() @ v.abs().mT)
    else:
        p = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        output = p @ v
        d_score = p * (d_weight - (g * output).sum(-1, keepdim=True))
        # the output is kept in float16
        off = p * (EPSILON * (g.abs() * output.abs()).sum(-1, keepdim=True) + 2.0**-20 * (g.abs() @ v.abs().mT))
    rounding = 2 * EPSILON * d_score.abs() + off + TINY
    shared = lambda t: t.transpose(1, 2).unflatten(2, (key.shape[2], group)).sum(3)  # noqa: E731
    exact = (scale * d_score @ k).transpose(1, 2), shared(scale * d_score.mT @ q), shared(p.mT @ g)
    allowed = (
        (scale * rounding @ k.abs()).transpose(1, 2),
        shared(scale * rounding.mT @ q.abs()),
        shared((2 * EPSILON * p + TINY).mT @ g.abs()),
    )
    # and each is rounded once more as it is stored
    allowed = tuple(a + 2 * EPSILON * e.abs() + TINY for a, e in zip(allowed, exact, strict=True))
    return d_score, rounding, exact, allowed


def our_gradients(inputs, grad_output, score_function, **options):
    from swat_lm.ops import window_attention

    tensors = [t.half() for t in inputs[:3]] + [t.float() for t in inputs[3:]]
    tensors = [t.requires_grad_() for t in tensors]
    with warnings.catch_warnings():
        # numpy's words for what is tested here
        warnings.simplefilter("ignore", RuntimeWarning)
        output = window_attention(
            *tensors[:3], window=WINDOW, score_function=score_function, slopes=tensors[3], score_bias=tensors[4],
            backend="triton", **options,
        )  # fmt: skip
        return torch.autograd.grad(output, tensors, grad_output.half())


def check_range(score_function, form):
    os.environ["SWAT_LM_BACKWARD"] = form
    seen = set()
    for powers in POWERS:
        inputs = make_inputs(SHAPE)
        given = [
            (t * 2.0**power).half().double() for t, power in zip([*inputs[:3], inputs[0].sin()], powers, strict=True)
        ]
        given[1][..., 0] = 0
        inputs = [*given[:3], *(t.float().double() for t in inputs[3:])]
        d_score, rounding, exact, allowed = exact_gradients(inputs, given[3], score_function)
        ours = our_gradients(inputs, given[3], score_function)
        for name, mine, true, most in zip(("query", "key", "value"), ours, exact, allowed, strict=False):
            finite = mine.isfinite()
            assert ((mine.double() - true).abs() <= most)[finite].all(), (name, powers)
            # what has room is not lost, unless a score's gradient has none
            room = true.abs() + most < LARGEST
            overflows = d_score.abs() + rounding >= LARGEST
            if name == "value" or not overflows.any():
                assert finite[room].all(), (name, powers)
            assert not finite[true.abs() - most > INFINITE].any(), (name, powers)
            seen.add((name, "lost" if not finite.all() else "kept"))
        # a score's gradient beyond float16 shows in every channel of its query and of its key, also where k is 0
        beyond = d_score.abs() - rounding > INFINITE
        assert not ours[0].isfinite()[beyond.any(-1).transpose(1, 2)].any(), powers
        of_keys = beyond.any(-2).unflatten(1, (SHAPE[4], -1)).any(2).transpose(1, 2)
        assert not ours[1].isfinite()[of_keys].any(), powers
        # slopes and biases are summed before the rounding
        for mine in ours[3:]:
            assert mine.isfinite().all(), powers
        seen.add(("score", "lost" if beyond.any() else "kept"))
        if beyond.any() and all((true.abs() + most < LARGEST).all() for true, most in zip(exact, allowed, strict=True)):
            seen.add("score alone")
    assert seen == {*itertools.product(("query", "key", "value", "score"), ("lost", "kept")), "score alone"}


@pytest.mark.parametrize("form", ["two kernels", "five products"])
@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
def test_what_is_finite_is_right(interpreted, score_function, form):
    interpreted(check_range, score_function, form)


def check_infinite_gradient():
    inputs = make_inputs((1, 24, 24, 4, 2, 8))
    grad_output = inputs[0].cos()
    grad_output[0, 20, 3, 5] = float("inf")
    for score_function, form, skips in (
        ("sigmoid", "two kernels", False), ("sigmoid", "two kernels", True), ("sigmoid", "five products", False),
        ("softmax", "two kernels", False), ("softmax", "five products", False),
    ):  # fmt: skip
        os.environ["SWAT_LM_BACKWARD"] = form
        query, key, value, *_ = our_gradients(inputs, grad_output, score_function, skip_saturated=skips)
        assert not query[0, 20, 3].isfinite().any()
        # which of the second key/value head see
        assert not key[0, 20 - WINDOW + 1 : 21, 1].isfinite().any()
        assert not value[0, 20 - WINDOW + 1 : 21, 1, 5].isfinite().any()
        # no other sequence, head, or tile of rows
        assert query[0, :, :3].isfinite().all()
        assert query[0, :16].isfinite().all()
        assert key[0, :, 0].isfinite().all()


def test_an_infinite_gradient_shows(interpreted):
    interpreted(check_infinite_gradient)


def train_once(weights, hidden, scaler=None):
    """Gradients of a small attention layer, in float16 under a scaler or in float64; whether dO came in whole."""
    from swat_lm.ops import window_attention

    dtype, backend = (torch.float64, "reference") if scaler is None else (torch.float16, "triton")
    query, key, value = ((hidden @ w).to(dtype).view(1, 24, 4, 8) for w in weights[:3])
    slopes = torch.tensor([-0.5, -0.25, 0.25, 0.5], dtype=hidden.dtype)
    output = window_attention(query, key, value, window=WINDOW, slopes=slopes, backend=backend)
    is_whole = []
    output.register_hook(lambda gradient: is_whole.append(bool(gradient.isfinite().all())))
    loss = (output.flatten(2).to(hidden.dtype) @ weights[3]).square().mean()
    gradients = torch.autograd.grad(loss if scaler is None else scaler.scale(loss), weights)
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient
    return is_whole[0]


def check_loss_scaling():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 24, 32, generator=generator)
    # small keys and large values: scores' gradients overflow before anything that is stored does
    sizes = (1.0, 0.01, 8.0, 0.05)
    start = [torch.randn(32, 32, generator=generator) * size / 32**0.5 for size in sizes]
    exact = [w.double().requires_grad_() for w in start]
    train_once(exact, hidden.double())
    weights = [w.clone().requires_grad_() for w in start]
    optimizer = torch.optim.SGD(weights, lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    skipped = []
    for _ in range(24):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            is_whole = train_once(weights, hidden, scaler)
        scaler.step(optimizer)
        before = scaler.get_scale()
        scaler.update()
        if scaler.get_scale() == before:
            break
        skipped.append(is_whole)
        assert all(torch.equal(w, s) for w, s in zip(weights, start, strict=True))
    # overflows inside the kernels, behind a gradient that came in whole, were noticed; and the step taken is right
    assert any(skipped)
    for weight, begin, true in zip(weights, start, exact, strict=True):
        assert (begin - weight - true.grad).norm() <= 5e-3 * true.grad.norm()
        assert true.grad.norm() > 0


def test_loss_scaling_notices(interpreted):
    interpreted(check_loss_scaling)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["backward query", "backward key", "backward key, five products"])
def test_the_hardware_rounds_to_infinity(name, capability):
    """A conversion that saturates would make an overflow a finite number."""
    pytest.importorskip("triton", reason="triton is not installed")
    from swat_lm.ops.triton.configurations import Problem, configuration

    problem = Problem(512, 64, 1, torch.float16, False, divmod(capability, 10), True)
    compiled = compile_attention(name, problem, configuration(name, problem))
    assert set(re.findall(r"\bcvt[.\w]*\.f16(?:x2)?\.f32", compiled.ptx)) == {"cvt.rn.f16x2.f32"}
