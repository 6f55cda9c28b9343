"""The chunked scan against the definition: outputs and every gradient, over shapes, documents, holes and states."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from swat_lm.ops.state_space import spans, state_space_scan, state_space_step
from tests.exactness import assert_as_exact_as_pytorch

# B, T, H, P, G, N and the chunk: odd sizes, groups, one token, less than a chunk, several spans, a rest
SHAPES = [
    ((2, 37, 4, 3, 2, 5), 8),
    ((1, 1, 2, 3, 1, 4), 16),
    ((2, 150, 3, 4, 3, 2), 8),
    ((1, 64, 4, 4, 1, 4), 8),
    ((3, 5, 4, 2, 2, 3), 64),
    ((1, 17, 1, 1, 1, 1), 1),
]
NAMES = ("query", "key", "value", "log_decay", "step_size", "initial_state")


def make_inputs(shape, seed=0, strongest=3.0):
    batch, num_tokens, num_heads, head_dim, groups, state_size = shape
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)  # noqa: E731
    step_size = F.softplus(draw(batch, num_tokens, num_heads))
    rates = torch.rand(num_heads, generator=generator, dtype=torch.float64) * strongest
    return [
        draw(batch, num_tokens, groups, state_size),
        draw(batch, num_tokens, groups, state_size),
        draw(batch, num_tokens, num_heads, head_dim),
        -step_size * rates,
        step_size,
        draw(batch, num_heads, head_dim, state_size),
    ]


def make_rows(shape, seed=0):
    """Documents of a few tokens, some from the first token on, and holes, some of them whole ends."""
    generator = torch.Generator().manual_seed(seed + 1)
    size = shape[:2]
    segments = (torch.rand(size, generator=generator) < 0.2).cumsum(1) * 3
    real = torch.rand(size, generator=generator) < 0.6
    return segments, real


def outputs_and_gradients(inputs, dtype, backend, chunk_size=64, segments=None, real=None):
    wide = torch.promote_types(dtype, torch.float32)
    tensors = [x.to(dtype if i < 3 else wide).requires_grad_() for i, x in enumerate(inputs)]
    skip = torch.linspace(-1, 1, inputs[2].shape[2], dtype=wide, requires_grad=True)
    output, final_state = state_space_scan(
        *tensors[:5], initial_state=tensors[5], segments=segments, real=real, skip=skip, chunk_size=chunk_size,
        backend=backend,
    )  # fmt: skip
    loss = output.double().sin().sum() + final_state.double().cos().sum()
    gradients = torch.autograd.grad(loss, [*tensors, skip])
    names = (*NAMES, "skip")
    results = {"output": output, "final_state": final_state, **dict(zip(names, gradients, strict=True))}
    return {name: tensor.detach() for name, tensor in results.items()}


def compare(inputs, dtype, chunk_size, segments=None, real=None):
    exact = outputs_and_gradients(inputs, torch.float64, "reference", 64, segments, real)
    ours = outputs_and_gradients(inputs, dtype, "chunked", chunk_size, segments, real)
    plain = None if dtype == torch.float64 else outputs_and_gradients(inputs, dtype, "reference", 64, segments, real)
    for name, expected in exact.items():
        if plain is None:
            torch.testing.assert_close(ours[name], expected, atol=1e-10, rtol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert ours[name].dtype == plain[name].dtype
            # a number is a sum of terms of about its own size over the tokens and the sizes of a head
            summed = math.sqrt(inputs[2].shape[1] * inputs[2].shape[3] * inputs[0].shape[3]) * expected.std().item()
            assert_as_exact_as_pytorch(ours[name], plain[name], expected, name, summed if expected.numel() > 1 else 1.0)


@pytest.mark.parametrize(("shape", "chunk_size"), SHAPES, ids=str)
def test_chunked_equals_reference(shape, chunk_size):
    inputs, (segments, real) = make_inputs(shape), make_rows(shape)
    for documents, marks in itertools.product((None, segments), (None, real)):
        compare(inputs, torch.float64, chunk_size, documents, marks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_chunked_in_other_precisions(dtype):
    shape, chunk_size = SHAPES[2]
    # inputs that every precision can hold, so that only the computation differs
    inputs = [x.to(torch.bfloat16).to(torch.float16).double() for x in make_inputs(shape)]
    compare(inputs, dtype, chunk_size)
    compare(inputs, dtype, chunk_size, *make_rows(shape))


@settings(max_examples=25, deadline=None)
@given(
    num_tokens=st.integers(1, 60),
    chunk_size=st.integers(1, 20),
    batch=st.integers(1, 3),
    heads=st.sampled_from([(1, 1), (4, 1), (4, 2), (3, 3)]),
    budget=st.sampled_from([1, 2**18]),
    packed=st.booleans(),
    holes=st.booleans(),
    seed=st.integers(0, 10),
)
def test_any_shape(num_tokens, chunk_size, batch, heads, budget, packed, holes, seed):
    shape = (batch, num_tokens, heads[0], 2, heads[1], 3)
    segments, real = make_rows(shape, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spans, "PAIR_BUDGET", budget)
        compare(
            make_inputs(shape, seed), torch.float64, chunk_size, segments if packed else None, real if holes else None
        )


def test_gradcheck():
    inputs = [x.requires_grad_() for x in make_inputs((2, 6, 2, 2, 1, 1))]
    segments = torch.tensor([[0, 0, 1, 1, 2, 2], [1, 1, 1, 1, 1, 1]])
    real = torch.tensor([[1, 0, 1, 1, 1, 0], [0, 1, 1, 0, 1, 1]], dtype=torch.bool)

    def scan(*tensors):
        return state_space_scan(*tensors[:5], initial_state=tensors[5], segments=segments, real=real, chunk_size=3)

    assert torch.autograd.gradcheck(scan, inputs)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_parts_of_a_stream_are_one_pass(backend):
    """Any cutting through the states is one pass, gradients included, and so is token by token over slots."""
    shape = (2, 41, 4, 3, 2, 5)
    segments, real = make_rows(shape)
    whole = [x.requires_grad_() for x in make_inputs(shape)]
    options = {"chunk_size": 8, "backend": backend}
    output, state = state_space_scan(*whole[:5], initial_state=whole[5], segments=segments, real=real, **options)
    expected = torch.autograd.grad(output.sin().sum() + state.cos().sum(), whole)
    for cuts in ([1, 2, 19, 41], [40, 41]):
        parts, carried, start, previous = [], whole[5], 0, torch.zeros(2, 1, dtype=torch.int64)
        for stop in cuts:
            # 0 goes on: the document of the last real token before the cut
            own = segments[:, start:stop] - previous
            part, carried = state_space_scan(
                *(x[:, start:stop] for x in whole[:5]), initial_state=carried, segments=own,
                real=real[:, start:stop], **options,
            )  # fmt: skip
            parts.append(part)
            for row in range(2):
                seen = real[row, :stop].nonzero()
                previous[row] = segments[row, seen[-1, 0]] if len(seen) else 0
            start = stop
        torch.testing.assert_close(torch.cat(parts, 1), output, atol=1e-11, rtol=1e-11)
        torch.testing.assert_close(carried, state, atol=1e-11, rtol=1e-11)
        gradients = torch.autograd.grad(torch.cat(parts, 1).sin().sum() + carried.cos().sum(), whole)
        for name, ours, one_pass in zip(NAMES, gradients, expected, strict=True):
            torch.testing.assert_close(ours, one_pass, atol=1e-10, rtol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("slots", [[0, 1, 2], [2, 0, 4], [1, 2, 3]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_steps_are_one_pass(slots, dtype):
    inputs = make_inputs((3, 12, 4, 3, 2, 5))
    tensors = [x.to(dtype if i < 3 else torch.promote_types(dtype, torch.float32)) for i, x in enumerate(inputs)]
    output, final_state = state_space_scan(*tensors[:5], initial_state=tensors[5], backend="reference")
    pool = torch.full((5, 4, 3, 5), 7.0, dtype=tensors[5].dtype)
    slot = torch.tensor(slots)
    pool[slot] = tensors[5]
    steps = [state_space_step(*(x[:, t : t + 1] for x in tensors[:5]), pool, slot) for t in range(12)]
    tolerance = {"atol": 1e-12, "rtol": 1e-12} if dtype == torch.float64 else {"atol": 1e-5, "rtol": 8e-3}
    torch.testing.assert_close(torch.cat(steps, 1), output, **tolerance)
    torch.testing.assert_close(pool[slot], final_state, atol=1e-5, rtol=1e-5)
    others = [i for i in range(5) if i not in slots]
    assert torch.equal(pool[others], torch.full_like(pool[others], 7.0))


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_documents_are_apart(backend):
    """Packed is separate, from the first token on, and no gradient passes from one document to another."""
    inputs = [x.requires_grad_() for x in make_inputs((1, 30, 2, 3, 1, 4))]
    bounds = [0, 7, 8, 21, 30]
    segments = torch.cat([torch.full((1, b - a), n + 5) for n, (a, b) in enumerate(itertools.pairwise(bounds))], 1)
    options = {"chunk_size": 4, "backend": backend}
    packed, final = state_space_scan(*inputs[:5], initial_state=inputs[5], segments=segments, **options)
    for a, b in itertools.pairwise(bounds):
        alone, state = state_space_scan(*(x[:, a:b] for x in inputs[:5]), **options)
        torch.testing.assert_close(packed[:, a:b], alone, atol=1e-13, rtol=1e-12)
        loss = packed[:, a:b].sin().sum()
        if b == 30:
            torch.testing.assert_close(final, state, atol=1e-13, rtol=1e-12)
            loss = loss + final.cos().sum()
        gradients = torch.autograd.grad(loss, inputs, retain_graph=True)
        for name, gradient in zip(NAMES[:5], gradients, strict=False):
            outside = torch.cat((gradient[:, :a], gradient[:, b:]), 1)
            assert torch.count_nonzero(outside) == 0, name
            # the decay of a document's first token acts on nothing
            if b - a > 1 or name not in ("log_decay", "query"):
                assert torch.count_nonzero(gradient[:, a:b]) > 0, name
        assert torch.count_nonzero(gradients[5]) == 0


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("kept", [list(range(4, 20)), list(range(16)), [0, 3, 4, 5, 9, 11, 18], []], ids=str)
def test_a_row_with_holes_is_the_row_without_them(backend, kept):
    """Left padding, right padding, holes, nothing at all; whatever the skipped tokens hold and say."""
    inputs = make_inputs((1, 20, 2, 3, 1, 4))
    real = torch.zeros(1, 20, dtype=torch.bool)
    real[:, kept] = True
    segments = torch.arange(20).div(8, rounding_mode="floor")[None]
    garbage = [x.clone() for x in inputs]
    for x in garbage[:5]:
        x[~real] = math.nan
    garbage = [x.requires_grad_() for x in garbage]
    options = {"chunk_size": 4, "backend": backend}
    output, state = state_space_scan(
        *garbage[:5], initial_state=garbage[5], segments=segments.where(real, -9), real=real, **options
    )
    assert torch.count_nonzero(output[~real]) == 0
    gradients = torch.autograd.grad(output.sum() + state.sin().sum(), garbage)
    for name, gradient in zip(NAMES[:5], gradients, strict=False):
        assert torch.count_nonzero(gradient[~real]) == 0, name
    if not kept:
        assert torch.equal(state, inputs[5])
        return
    alone, alone_state = state_space_scan(
        *(x[:, kept] for x in inputs[:5]), initial_state=inputs[5], segments=segments[:, kept], **options
    )
    torch.testing.assert_close(output[:, kept], alone, atol=1e-13, rtol=1e-12)
    torch.testing.assert_close(state, alone_state, atol=1e-13, rtol=1e-12)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_long_rows_of_any_decay():
    """16k tokens that forget nearly nothing, at once, or beyond what a float holds: finite, exact as the recurrence."""
    inputs = make_inputs((1, 16384, 3, 2, 1, 2))
    inputs[3] *= torch.tensor([1e-5, 100.0, 1e30])
    inputs[4] = torch.full_like(inputs[4], 0.01)
    single = [x.float() for x in inputs]
    exact, exact_state = state_space_scan(*inputs[:5], initial_state=inputs[5])
    plain, plain_state = state_space_scan(*single[:5], initial_state=single[5], backend="reference")
    leaves = [x.requires_grad_() for x in single]
    ours, state = state_space_scan(*leaves[:5], initial_state=leaves[5])
    for head in range(3):
        own = [x.detach()[:, :, head] for x in (ours, plain, exact)]
        assert_as_exact_as_pytorch(*own, f"output of head {head}")
    assert_as_exact_as_pytorch(state.detach(), plain_state, exact_state, "final_state")
    for gradient in torch.autograd.grad(ours.sum() + state.sum(), leaves):
        assert gradient.isfinite().all()


def test_a_strong_decay_costs_the_weak_ones_beside_it_no_digits():
    """What follows a decay of e^-5000 keeps its digits, and the gradient of e^-40 is not lost beside those of 1."""
    inputs = make_inputs((1, 64, 1, 2, 1, 2), strongest=0.01)
    inputs[3][:, 20], inputs[3][:, 40] = -5000.0, -40.0
    exact = outputs_and_gradients(inputs, torch.float64, "reference")
    ours = outputs_and_gradients(inputs, torch.float32, "chunked")
    torch.testing.assert_close(ours["output"].double(), exact["output"], atol=2e-5, rtol=2e-5)
    for name in ("log_decay", "key"):
        torch.testing.assert_close(ours[name].double(), exact[name], atol=5e-5, rtol=5e-5)
    small, expected = ours["log_decay"][0, 40, 0].double(), exact["log_decay"][0, 40, 0]
    assert 1e-20 < abs(expected) < 1e-12
    torch.testing.assert_close(small, expected, atol=0.0, rtol=1e-3)


def test_a_decay_of_zero_is_a_new_document():
    inputs = make_inputs((1, 20, 2, 3, 1, 4))
    segments = (torch.arange(20) >= 7).long()[None]
    apart = outputs_and_gradients(inputs, torch.float64, "chunked", 8, segments)
    inputs[3] = torch.where(torch.arange(20)[:, None] == 7, -math.inf, inputs[3].detach())
    forgot = outputs_and_gradients(inputs, torch.float64, "chunked", 8)
    for name, expected in apart.items():
        torch.testing.assert_close(forgot[name], expected, atol=1e-13, rtol=1e-12)


def test_memory_is_linear_in_the_length():
    """Kept for the backward: the inputs and a fraction of them; no intermediate grows faster than they do."""
    kept, largest = [], []
    for num_tokens in (1024, 2048):
        inputs = [x.float().requires_grad_() for x in make_inputs((1, num_tokens, 2, 16, 1, 16))[:5]]
        saved = {}

        def keep(x, saved=saved):
            saved[x.data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.profiler.profile(profile_memory=True) as profile:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                output, _ = state_space_scan(*inputs)
            output.sum().backward()
        size = sum(x.nbytes for x in inputs)
        kept.append(sum(saved.values()) / size)
        largest.append(max(e.self_cpu_memory_usage for e in profile.key_averages()) / size)
    assert max(kept) < 1.1
    assert largest[1] <= largest[0] * 1.1
