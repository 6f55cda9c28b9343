"""The short convolution against PyTorch's own and against a plain sum over the taps that count."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from swat_lm.ops import taps
from swat_lm.ops.short_convolution import short_convolution, short_convolution_step
from tests.exactness import assert_as_exact_as_pytorch


def make_inputs(batch=2, num_tokens=23, num_channels=6, kernel=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)  # noqa: E731
    return [
        draw(batch, num_tokens, num_channels),
        draw(num_channels, kernel),
        draw(num_channels),
        draw(batch, kernel - 1, num_channels),
    ]


def plainly(x, weight, bias, past, activation="silu", segments=None, real=None):
    """Walk over the tokens with the inputs that are still seen in a list."""
    batch, num_tokens, num_channels = x.shape
    reach = weight.shape[1] - 1
    outputs, tails = [], []
    for b in range(batch):
        seen, document, row = list(past[b]), 0, []
        for t in range(num_tokens):
            if real is not None and not real[b, t]:
                row.append(x.new_zeros(num_channels))
                continue
            if segments is not None and int(segments[b, t]) != document:
                seen, document = [x.new_zeros(num_channels)] * reach, int(segments[b, t])
            seen = [*seen, x[b, t]]
            window = seen[len(seen) - reach - 1 :]
            total = (torch.stack(window) * weight.t()).sum(0)
            total = total if bias is None else total + bias
            row.append(F.silu(total) if activation else total)
        outputs.append(torch.stack(row))
        tails.append(torch.stack(seen[len(seen) - reach :]) if reach else x.new_zeros(0, num_channels))
    return torch.stack(outputs), torch.stack(tails)


def results(convolve, inputs, **options):
    tensors = [x.clone().requires_grad_() for x in inputs]
    x, weight, bias, past = tensors
    output, tail = convolve(x, weight, bias, past=past, **options)
    gradients = torch.autograd.grad(output.sin().sum() + tail.cos().sum(), tensors, allow_unused=True)
    # a kernel of 1 keeps no past
    gradients = [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, tensors, strict=True)]
    return [one.detach() for one in (output, tail, *gradients)]


@pytest.mark.parametrize("kernel", [1, 2, 4])
@pytest.mark.parametrize("num_tokens", [1, 2, 23])
def test_any_row_is_the_plain_sum(monkeypatch, kernel, num_tokens):
    """Documents shorter than the kernel, holes, both, neither; blocks of one token, of some and of all."""
    inputs = make_inputs(num_tokens=num_tokens, kernel=kernel)
    generator = torch.Generator().manual_seed(1)
    size = (2, num_tokens)
    segments = (torch.rand(size, generator=generator) < 0.3).cumsum(1) * 2
    real = torch.rand(size, generator=generator) < 0.6
    for documents, marks, activation in itertools.product((None, segments), (None, real), ("silu", None)):
        expected = results(plainly, inputs, activation=activation, segments=documents, real=marks)
        for budget in (1, 60, 2**16):
            monkeypatch.setattr(taps, "BLOCK_BUDGET", budget)
            ours = results(short_convolution, inputs, activation=activation, segments=documents, real=marks)
            for one, other in zip(ours, expected, strict=True):
                torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_as_exact_as_pytorchs_convolution(dtype):
    inputs = [x.to(torch.bfloat16).to(torch.float16).double() for x in make_inputs(num_tokens=300)]

    def pytorch(x, weight, bias, past):
        joined = torch.cat((past, x), 1)
        output = F.conv1d(joined.transpose(1, 2), weight[:, None], bias, groups=weight.shape[0]).transpose(1, 2)
        return F.silu(output), joined[:, -3:]

    exact, plain = results(pytorch, inputs), results(pytorch, [x.to(dtype) for x in inputs])
    ours = results(short_convolution, [x.to(dtype) for x in inputs])
    for name, *three in zip(("output", "tail", "x", "weight", "bias", "past"), ours, plain, exact, strict=True):
        assert three[0].dtype == dtype
        # a weight's gradient is one number out of all tokens
        summed = math.sqrt(600) * 2 if name in ("weight", "bias") else 0.0
        assert_as_exact_as_pytorch(*three, name, summed)


@pytest.mark.parametrize("kernel", [1, 2, 4])
@pytest.mark.parametrize("budget", [1, 60, 2**16])
def test_blocks_in_float32(monkeypatch, kernel, budget):
    """Those of one document go through PyTorch's convolution, the others do not: the same numbers, and apart."""
    monkeypatch.setattr(taps, "BLOCK_BUDGET", budget)
    inputs = make_inputs(num_tokens=57, kernel=kernel)
    segments = torch.tensor([0] * 9 + [1] * 2 + [2] * 30 + [3] * 16).expand(2, -1)
    for documents in (None, segments):
        expected = results(plainly, inputs, segments=documents)
        ours = results(short_convolution, [x.float() for x in inputs], segments=documents)
        for one, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(one.double(), other, atol=1e-4, rtol=1e-5)
    x = inputs[0].float().requires_grad_()
    output, _ = short_convolution(x, *(y.float() for y in inputs[1:3]), segments=segments)
    (d_x,) = torch.autograd.grad(output[:, 9:41].sum(), x)
    assert torch.count_nonzero(d_x[:, :9]) == torch.count_nonzero(d_x[:, 41:]) == 0
    assert d_x[:, 9:41].all()


def test_padding_before_documents_keeps_them_apart_in_float32():
    """Padding has the number of before: a row of it first, or of the document that a past is of."""
    x, weight, bias, past = (each.float() for each in make_inputs(num_tokens=9, kernel=4))
    real = torch.tensor([[False, False, *[True] * 7], [*[True] * 4, False, False, *[True] * 3]])
    segments = torch.tensor([[0, 0, 1, 1, 1, 1, 2, 2, 2], [0, 0, 0, 0, 0, 0, 1, 1, 1]])
    for before in (None, past):
        x = x.detach().requires_grad_()
        output, _ = short_convolution(x, weight, bias, past=before, segments=segments, real=real)
        alone, _ = short_convolution(x[:, 6:], weight, bias)
        torch.testing.assert_close(output[:, 6:], alone)
        (d_x,) = torch.autograd.grad(output[:, 6:].sum(), x)
        assert not d_x[:, :6].any()
    begun, _ = short_convolution(x[:1], weight, bias, past=past[:1], segments=segments[:1], real=real[:1])
    torch.testing.assert_close(begun[:, 2:6], short_convolution(x[:1, 2:6], weight, bias)[0])


def test_no_rows_have_gradients():
    x, weight, bias, _ = (each.float()[:0] if each.dim() == 3 else each.float() for each in make_inputs())
    output, _ = short_convolution(x.requires_grad_(), weight, bias)
    output.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


def test_parts_of_a_stream_are_one_pass_and_so_are_steps():
    x, weight, bias, past = make_inputs(batch=3)
    segments = torch.tensor([0] * 9 + [1] * 2 + [2] * 12).expand(3, -1)
    whole, tail = short_convolution(x, weight, bias, past=past, segments=segments)
    for cuts in ([0, 1, 2, 10, 23], [0, 11, 23]):
        carried, before, parts = past, 0, []
        for start, stop in itertools.pairwise(cuts):
            part, carried = short_convolution(
                x[:, start:stop], weight, bias, past=carried, segments=segments[:, start:stop] - before
            )
            before = int(segments[0, stop - 1])
            parts.append(part)
        torch.testing.assert_close(torch.cat(parts, 1), whole)
        assert torch.equal(carried, tail)
    whole, tail = short_convolution(x, weight, None, past=past, activation=None)
    pool, slot = torch.full((5, 3, 6), 7.0, dtype=torch.float64), torch.tensor([4, 0, 1])
    pool[slot] = past
    steps = [short_convolution_step(x[:, t : t + 1], weight, None, pool, slot, activation=None) for t in range(23)]
    torch.testing.assert_close(torch.cat(steps, 1), whole)
    assert torch.equal(pool[slot], tail)
    assert torch.equal(pool[2:4], torch.full_like(pool[2:4], 7.0))


def test_documents_are_apart_and_skipped_tokens_leave_no_trace():
    x, weight, bias, past = make_inputs(batch=1, num_tokens=12)
    x[:, 5] = math.nan
    x, past = x.requires_grad_(), past.requires_grad_()
    segments = torch.tensor([[1, 1, 1, 1, 1, 9, 1, 2, 2, 2, 2, 2]])
    real = segments != 9
    output, tail = short_convolution(x, weight, bias, past=past, segments=segments, real=real)
    assert torch.count_nonzero(output[:, 5]) == 0
    d_x, d_past = torch.autograd.grad(output[:, 7:].sum() + tail.sum() + output[:, 5].sum(), (x, past))
    assert torch.count_nonzero(d_x[:, :7]) == 0
    assert torch.count_nonzero(d_past) == 0
    assert torch.count_nonzero(d_x[:, 7:]) == d_x[:, 7:].numel()


def test_the_backward_keeps_what_came_in_only():
    x, weight, bias, _ = (t.float().requires_grad_() for t in make_inputs(num_tokens=400, num_channels=32))
    saved = {}

    def keep(t):
        saved[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        short_convolution(x, weight, bias)[0].sum().backward()
    assert sum(saved.values()) < 1.1 * x.nbytes


def test_library_and_compiler():
    x, weight, bias, past = (t.float().requires_grad_() for t in make_inputs())
    documents = torch.arange(46).view(2, 23) // 5
    op = torch.ops.swat_lm.short_convolution
    torch.library.opcheck(op, (x, past, documents, weight, bias, True), test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(op, (x, past, None, weight, None, False))
    results = (op(x, past, None, weight, bias, True), *torch.ops.swat_lm.short_convolution_backward(
        torch.ones_like(x), x.detach().mT.contiguous().mT, past, None, weight, bias, True
    ))  # fmt: skip
    assert all(one.is_contiguous() for one in results)

    def loss(x, weight, bias, past):
        output, tail = short_convolution(x, weight, bias, past=past, segments=documents, real=documents % 3 > 0)
        return output.sum() + tail.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    tensors = (x, weight, bias, past)
    for ours, expected in zip(*(torch.autograd.grad(f(*tensors), tensors) for f in (compiled, loss)), strict=True):
        torch.testing.assert_close(ours, expected)
    expected = op(x, torch.zeros_like(past), None, weight, bias, True)
    gradient = torch.autograd.grad(expected.sin().sum(), x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = short_convolution(x, weight, bias)[0]
        assert torch.equal(output, expected)
        assert torch.equal(torch.autograd.grad(output.sin().sum(), x)[0], gradient)


BAD = [
    ({"x": torch.zeros(2, 6)}, r"^x: expected 3 dimensions"),
    ({"x": torch.zeros(2, 0, 6)}, r"^x: expected at least 1 token, got none"),
    (
        {"x": torch.zeros(2, 5, 6, dtype=torch.int64)},
        r"^x: expected a tensor of float32, float64, bfloat16 or float16, got torch.int64",
    ),
    ({"weight": torch.zeros(6, 1, 4)}, r"^weight: expected \[channels, kernel\] = \[6, at least 1\], got \[6, 1, 4\]"),
    ({"weight": torch.zeros(4, 6)}, r"^weight: expected \[channels, kernel\]"),
    ({"weight": torch.zeros(6, 0)}, r"^weight: expected \[channels, kernel\]"),
    ({"bias": torch.zeros(1)}, r"^bias: expected one number per channel, \[6\], got \[1\]"),
    ({"bias": torch.zeros(6, device="meta")}, r"^bias: expected the device of x, cpu, got meta"),
    ({"activation": "gelu"}, r"^activation: expected 'silu' or None, got 'gelu'"),
    ({"past": torch.zeros(2, 4, 6)}, r"^past: expected \[2, 3, 6\] \(batch, kernel - 1, channels\), got \[2, 4, 6\]"),
    ({"past": torch.zeros(2, 3, 6).double()}, r"^past: expected torch.float32 on cpu like x, got torch.float64"),
    ({"segments": torch.zeros(2, 5)}, r"^segments: expected int32 or int64"),
    ({"real": torch.ones(2, 6, dtype=torch.bool)}, r"^real: expected \[batch, tokens\] = \[2, 5\]"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[f"{next(iter(c))}-{i}" for i, (c, _) in enumerate(BAD)])
def test_bad_input_names_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        short_convolution(**{"x": torch.zeros(2, 5, 6), "weight": torch.zeros(6, 4), "bias": None, **change})


BAD_STEPS = [
    ({"x": torch.zeros(2, 2, 6)}, r"^x: a step takes one token per sequence, got 2"),
    ({"tail": torch.zeros(5, 4, 6)}, r"^tail: expected \[slots, 3, 6\]"),
    ({"tail": torch.zeros(1, 3, 6)}, r"^slot: 2 sequences cannot own 1 tails"),
    ({"slot": torch.zeros(2)}, r"^slot: expected int64 \[2\], got torch.float32 \[2\]"),
    ({"weight": torch.zeros(6, 4, requires_grad=True)}, r"^short_convolution_step is for inference"),
]


@pytest.mark.parametrize(("change", "message"), BAD_STEPS, ids=[str(i) for i in range(len(BAD_STEPS))])
def test_bad_steps_name_the_argument(change, message):
    arguments = {
        "x": torch.zeros(2, 1, 6), "weight": torch.zeros(6, 4), "bias": None, "tail": torch.zeros(5, 3, 6),
        "slot": torch.tensor([3, 1]), **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        short_convolution_step(**arguments)
