"""`window_attention(backend="triton")` under the interpreter: autograd, rotary, torch.library and torch.compile."""

import pytest
import torch

from tests.exactness import assert_as_exact_as_pytorch
from tests.ops.test_backends import NAMES, make_inputs, outputs_and_gradients, ragged

SHAPE = (1, 37, 37, 2, 1, 8)


def check_gradients(shape, score_function, window):
    inputs = make_inputs(shape)
    first, _ = ragged(shape)
    arguments = (score_function, window, first, None)
    exact = outputs_and_gradients(inputs, torch.float64, "reference", *arguments)
    plain = outputs_and_gradients(inputs, torch.float32, "reference", *arguments)
    ours = outputs_and_gradients(inputs, torch.float32, "triton", *arguments)
    for name, expected in exact.items():
        summed = {"slopes": 1000.0, "score_bias": 100.0}.get(name, 8.0)
        assert_as_exact_as_pytorch(ours[name].detach(), plain[name].detach(), expected.detach(), name, summed)


@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
def test_outputs_and_every_gradient(interpreted, score_function):
    interpreted(check_gradients, (2, 20, 25, 2, 1, 8), score_function, 12)


def check_rotary(head_dim, shared, form):
    import os

    from swat_lm.ops import window_attention
    from swat_lm.ops.rotary import rotary_angles

    os.environ["SWAT_LM_BACKWARD"] = form
    shape = (2, 20, 20, 2, 1, head_dim)
    inputs = make_inputs(shape)
    positions = torch.arange(100, 120) if shared else torch.stack((torch.arange(20), torch.arange(90, 110)))

    def run(dtype, backend):
        tensors = [t.to(dtype).requires_grad_() for t in inputs]
        output = window_attention(
            *tensors[:3], window=9, slopes=tensors[3], score_bias=tensors[4], backend=backend,
            rotary=rotary_angles(positions, head_dim, dtype=dtype),
        )  # fmt: skip
        return dict(zip(("output", *NAMES), (output, *torch.autograd.grad(output.sin().sum(), tensors)), strict=True))

    exact, plain, ours = run(torch.float64, "reference"), run(torch.float32, "reference"), run(torch.float32, "triton")
    for name, expected in exact.items():
        summed = {"slopes": 1000.0, "score_bias": 100.0}.get(name, 8.0)
        assert_as_exact_as_pytorch(ours[name].detach(), plain[name].detach(), expected.detach(), name, summed)


@pytest.mark.parametrize(
    ("head_dim", "shared", "form"),
    [(16, True, "two kernels"), (24, False, "two kernels"), (16, False, "five products")],
)
def test_rotary_inside_the_kernels(interpreted, head_dim, shared, form):
    interpreted(check_rotary, head_dim, shared, form)


def check_library():
    from swat_lm.ops import window_attention
    from swat_lm.ops.calls import AttentionCall

    query, key, value, slopes, bias = (t.float().requires_grad_() for t in make_inputs((1, 5, 5, 2, 1, 8)))
    angles = torch.ones(1, 5, 4), torch.zeros(1, 5, 4)
    plain = AttentionCall(query, key, value, 4, "softmax", 0.3, backend="triton")
    rotated = plain._replace(score_function="sigmoid", slopes=slopes, score_bias=bias, cos=angles[0], sin=angles[1])
    for call in (plain, rotated):
        torch.library.opcheck(torch.ops.swat_lm.window_attention, tuple(call))

    def loss(query, key, value, slopes):
        output, lse = window_attention(
            query, key, value, window=3, score_function="softmax", slopes=slopes, return_lse=True, backend="triton"
        )
        return output.square().sum() + lse.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = (query, key, value, slopes)
    expected = torch.autograd.grad(loss(*inputs), inputs)
    for ours, theirs in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_one_op_for_torch_library_and_torch_compile(interpreted):
    interpreted(check_library)


def check_edges():
    from swat_lm.ops import window_attention

    # nothing to see, nothing there
    query, key, value, slopes, _ = (t.float().requires_grad_() for t in make_inputs((1, 20, 20, 2, 1, 8)))
    first = torch.zeros(1, 20, dtype=torch.int32)
    first[:, 12:] = 20
    output = window_attention(query, key, value, window=8, slopes=slopes, first_visible=first, backend="triton")
    assert torch.equal(output[:, 12:], torch.zeros_like(output[:, 12:]))
    for gradient in torch.autograd.grad(output[:, 12:].sum(), (query, key, value, slopes)):
        assert torch.count_nonzero(gradient) == 0
    nothing = torch.zeros(1, 0, 2, 8)
    assert window_attention(nothing, key, value, window=8, backend="triton").shape == (1, 0, 2, 8)
    # weights of exactly 0 and 1 at steep slopes of both signs
    for score_function in ("sigmoid", "softmax"):
        result = outputs_and_gradients(
            [*(t.double() for t in (query, key, value)), torch.tensor([-50.0, 50.0]), torch.tensor([300.0, -300.0])],
            torch.float32, "triton", score_function, 20,
        )  # fmt: skip
        for name, tensor in result.items():
            assert tensor.isfinite().all(), name
    # any strides: heads before tokens, channels apart
    other = query.transpose(1, 2).contiguous().transpose(1, 2), key.transpose(1, 3).contiguous().transpose(1, 3)
    torch.testing.assert_close(
        window_attention(*other, value, window=8, slopes=slopes, first_visible=first, backend="triton"), output
    )


def test_edges(interpreted):
    interpreted(check_edges)


def check_overflow():
    from swat_lm.ops import window_attention

    # sigmoid weights do not sum to 1: 40 weights of 1 times 2000 exceed float16, and must show as inf, not as NaN
    query = torch.zeros(1, 40, 1, 16, dtype=torch.float16)
    value = torch.full_like(query, 2000.0)
    output = window_attention(query, query, value, window=40, score_bias=20.0, backend="triton")
    assert torch.equal(output[0, :32, 0, 0].isinf(), torch.zeros(32, dtype=torch.bool))
    assert output[0, 33:].isinf().all()


def test_sums_beyond_float16_become_infinite(interpreted):
    interpreted(check_overflow)
