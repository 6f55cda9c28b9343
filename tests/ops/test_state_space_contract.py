"""The wrapper of the scan: bad input, autocast, torch.compile and the checks of torch.library."""

import pytest
import torch

from swat_lm.ops.segments import documents_of
from swat_lm.ops.state_space import state_space_scan, state_space_step

NAMES = ("query", "key", "value", "log_decay", "step_size")


def tensors(tokens=10):
    torch.manual_seed(0)
    return {
        "query": torch.randn(2, tokens, 2, 5),
        "key": torch.randn(2, tokens, 2, 5),
        "value": torch.randn(2, tokens, 4, 3),
        "log_decay": -torch.rand(2, tokens, 4),
        "step_size": torch.rand(2, tokens, 4),
    }


BAD = [
    ({"query": torch.zeros(2, 10, 5)}, r"^query: expected 4 dimensions \[batch, tokens, groups, state size\]"),
    ({"value": torch.zeros(2, 10, 12)}, r"^value: expected 4 dimensions \[batch, tokens, heads, head size\]"),
    ({"key": torch.zeros(2, 10, 3, 5)}, r"^key: 4 heads cannot be shared evenly by 3 groups"),
    ({"key": torch.zeros(2, 9, 2, 5)}, r"^key: expected \[2, 10, groups, state size\], got \[2, 9, 2, 5\]"),
    ({"key": torch.zeros(2, 10, 2, 0)}, r"^key: expected \[2, 10, groups, state size\]"),
    ({"query": torch.zeros(2, 10, 1, 5)}, r"^query: expected the key's shape \[2, 10, 2, 5\], got \[2, 10, 1, 5\]"),
    ({"query": torch.zeros(2, 10, 2, 5).double()}, r"^query: expected the value's dtype torch.float32, got torch.fl"),
    ({"key": torch.zeros(2, 10, 2, 5, device="meta")}, r"^key: expected the value's device cpu, got meta"),
    ({"value": torch.zeros(2, 0, 4, 3)}, r"^value: expected at least 1 token, got none"),
    ({"value": torch.zeros(2, 10, 4, 0)}, r"^value: expected at least one head of at least size 1"),
    ({"log_decay": torch.zeros(2, 10)}, r"^log_decay: expected one number per token and head, \[2, 10, 4\], got"),
    ({"log_decay": torch.zeros(2, 10, 4, dtype=torch.int64)}, r"^log_decay: expected a tensor of float32, "),
    ({"step_size": torch.zeros(2, 10, 1)}, r"^step_size: expected one number per token and head"),
    ({"initial_state": torch.zeros(2, 4, 5, 3)}, r"^initial_state: expected \[2, 4, 3, 5\] \(batch, heads, head size"),
    ({"initial_state": torch.zeros(1, 4, 3, 5)}, r"^initial_state: expected \[2, 4, 3, 5\]"),
    ({"initial_state": torch.zeros(2, 4, 3, 5).bfloat16()}, r"^initial_state: expected torch.float32, the precision"),
    ({"initial_state": torch.zeros(2, 4, 3, 5, device="meta")}, r"^initial_state: expected the value's device cpu"),
    ({"segments": torch.zeros(2, 9, dtype=torch.int64)}, r"^segments: expected \[batch, tokens\] = \[2, 10\], got"),
    ({"segments": torch.zeros(2, 10)}, r"^segments: expected int32 or int64 numbers of documents, got torch.float32"),
    ({"real": torch.ones(2, 10)}, r"^real: expected bool .* got torch.float32; pass `mask != 0`"),
    ({"real": torch.ones(10, dtype=torch.bool)}, r"^real: expected \[batch, tokens\]"),
    ({"skip": torch.zeros(3)}, r"^skip: expected one number per head, \[4\] on cpu, got \[3\] on cpu"),
    ({"skip": torch.zeros(4, dtype=torch.int64)}, r"^skip: expected a tensor of float32"),
    ({"chunk_size": 0}, r"^chunk_size: expected a whole number of tokens, at least 1, got 0"),
    ({"chunk_size": 2.0}, r"^chunk_size: expected a whole number"),
    ({"chunk_size": True}, r"^chunk_size: expected a whole number"),
    ({"backend": "triton"}, r"^backend: expected one of chunked, reference; got 'triton'"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[f"{next(iter(c))}-{i}" for i, (c, _) in enumerate(BAD)])
def test_bad_input_names_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        state_space_scan(**{**tensors(), **change})


def test_other_dtypes_are_refused():
    for dtype in (torch.int64, torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match=rf"^query: expected a tensor of float32, .* got {dtype}"):
            state_space_scan(**{name: x.to(dtype) for name, x in tensors().items()})


BAD_STEPS = [
    (
        {"state": torch.zeros(5, 4, 5, 3)},
        r"^state: expected \[slots, 4, 3, 5\] \(slots, heads, head size, state size\)",
    ),
    ({"state": torch.zeros(5, 4, 3, 5).double()}, r"^state: expected torch.float32, the precision in which values of"),
    ({"state": torch.zeros(1, 4, 3, 5)}, r"^slot: 2 sequences cannot own 1 states"),
    ({"slot": torch.zeros(2, dtype=torch.int32)}, r"^slot: expected int64 \[2\], got torch.int32 \[2\]"),
    ({"slot": torch.zeros(3, dtype=torch.int64)}, r"^slot: expected int64 \[2\], got torch.int64 \[3\]"),
    (tensors(2), r"^value: a step takes one token per sequence, got 2; use state_space_scan"),
    ({"value": torch.zeros(2, 1, 4, 3, requires_grad=True)}, r"^state_space_step is for inference"),
]


@pytest.mark.parametrize(("change", "message"), BAD_STEPS, ids=[str(i) for i in range(len(BAD_STEPS))])
def test_bad_steps_name_the_argument(change, message):
    arguments = {**tensors(1), "state": torch.zeros(5, 4, 3, 5), "slot": torch.tensor([3, 1]), **change}
    with pytest.raises(ValueError, match=message):
        state_space_step(**arguments)


def test_documents_are_numbered_as_documented():
    segments = torch.tensor([[0, 0, 7, 7, 9], [0, 0, 4, 4, 4], [2, 2, 2, 5, 2]])
    real = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    expected = torch.tensor([[0, 0, 1, 1, 2], [0, 0, 0, 1, 1], [1, 1, 1, 2, 3]])
    assert torch.equal(documents_of(segments, real), expected)
    assert torch.equal(documents_of(segments[::2].int(), None), expected[::2])


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_autocast_leaves_the_recurrence_as_it_is(backend):
    inputs = {name: x.requires_grad_() for name, x in tensors().items()}
    plain, state = state_space_scan(**inputs, backend=backend)
    expected = torch.autograd.grad(plain.sum() + state.sum(), list(inputs.values()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, cast_state = state_space_scan(**inputs, backend=backend)
        assert torch.equal(output, plain)
        assert torch.equal(cast_state, state)
        gradients = torch.autograd.grad(output.sum() + cast_state.sum(), list(inputs.values()))
    if backend == "chunked":
        for ours, one in zip(gradients, expected, strict=True):
            assert torch.equal(ours, one)


@pytest.mark.parametrize("loss", [lambda y, s: y.sum(), lambda y, s: s.sum()], ids=["output", "state"])
def test_one_result_alone_has_gradients(loss):
    results = []
    for backend in ("chunked", "reference"):
        inputs = {name: x.double().requires_grad_() for name, x in tensors().items()}
        total = loss(*state_space_scan(**inputs, backend=backend))
        results.append(torch.autograd.grad(total, list(inputs.values()), allow_unused=True))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if expected is None else expected)


def arguments_of_the_op(**extra):
    inputs = [x.requires_grad_() for x in tensors().values()]
    return (*inputs, *(extra.get(name) for name in ("state", "documents", "real", "skip")), 4)


def test_opcheck():
    state = torch.randn(2, 4, 3, 5, requires_grad=True)
    documents, real = torch.tensor([[0] * 4 + [1] * 6, [1] * 10]), torch.rand(2, 10) < 0.5
    op, shapes = torch.ops.swat_lm.state_space_scan, ("test_schema", "test_faketensor")
    skip = torch.randn(4, requires_grad=True)
    torch.library.opcheck(op, arguments_of_the_op(state=state, documents=documents, real=real, skip=skip))
    torch.library.opcheck(op, arguments_of_the_op(), test_utils=shapes)
    step = (*(x[:, :1].detach() for x in tensors().values()), torch.zeros(4, 4, 3, 5), torch.tensor([2, 0]))
    torch.library.opcheck(torch.ops.swat_lm.state_space_step, step, test_utils=shapes)


def test_results_have_the_strides_the_fake_kernels_promise():
    """Inductor asserts them; opcheck compares shapes only."""
    inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors().values()]
    results = torch.ops.swat_lm.state_space_scan(*inputs, None, None, None, None, 4)
    gradients = torch.ops.swat_lm.state_space_scan_backward(
        torch.ones_like(inputs[2]), None, *inputs, None, None, None, results[2], 4
    )
    assert all(x.is_contiguous() for x in (*results, *gradients))


def test_compiles_to_one_graph():
    inputs = {name: x.requires_grad_() for name, x in tensors().items()}
    segments, real = torch.arange(20).view(2, 10) // 4, torch.rand(2, 10) < 0.8

    def loss(inputs):
        output, state = state_space_scan(**inputs, segments=segments, real=real, chunk_size=4)
        return output.sin().sum() + state.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, ours = (torch.autograd.grad(f(inputs), list(inputs.values())) for f in (loss, compiled))
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other)
    pools = torch.zeros(2, 4, 4, 3, 5)
    one_token = [x[:, :1].detach() for x in inputs.values()]
    slot = torch.tensor([2, 0])
    step = torch.compile(state_space_step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(*one_token, pools[0], slot), state_space_step(*one_token, pools[1], slot))
    assert torch.equal(pools[0], pools[1])
