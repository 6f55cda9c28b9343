"""Every backend against the definition: outputs and every gradient, over the shapes where bands have edges."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swat_lm.ops import bands, window_attention
from tests.exactness import assert_as_exact_as_pytorch

# B, T, S, H, K, D: odd sizes, grouped heads, fewer queries than keys, one query, nothing
SHAPES = [
    (2, 70, 70, 4, 2, 8),
    (1, 200, 200, 2, 2, 16),
    (2, 33, 111, 4, 1, 8),
    (1, 63, 64, 3, 3, 10),
    (2, 1, 9, 2, 1, 4),
    (1, 0, 5, 2, 2, 4),
]
NAMES = ("query", "key", "value", "slopes", "score_bias")


def windows_for(num_queries: int) -> list[int | None]:
    return [*sorted({1, 2, max(1, num_queries - 1), max(1, num_queries), num_queries + 1, 40}), None]


def make_inputs(shape, seed=0):
    batch, num_queries, num_keys, num_heads, num_kv_heads, head_dim = shape
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)  # noqa: E731
    return [
        draw(batch, num_queries, num_heads, head_dim),
        draw(batch, num_keys, num_kv_heads, head_dim),
        draw(batch, num_keys, num_kv_heads, head_dim),
        draw(num_heads) * 0.3,
        draw(num_heads) * 0.5,
    ]


def ragged(shape, seed=0):
    batch, num_queries, num_keys, *_ = shape
    generator = torch.Generator().manual_seed(seed + 1)
    first = torch.randint(0, num_keys, (batch, num_queries), generator=generator).sort(dim=1).values
    last = torch.randint(0, num_keys, (batch, num_queries), generator=generator).sort(dim=1).values
    return first.to(torch.int32), last.to(torch.int32)


def hidden_keys(shape, seed=0):
    return torch.rand(shape[0], shape[2], generator=torch.Generator().manual_seed(seed + 2)) < 0.3


def outputs_and_gradients(inputs, dtype, backend, score_function, window, first=None, last=None, **options):
    query, key, value, slopes, bias = (t.to(dtype).requires_grad_() for t in inputs)
    softmax = score_function == "softmax"
    result = window_attention(
        query, key, value, window=window, score_function=score_function, slopes=slopes, score_bias=bias,
        first_visible=first, last_visible=last, return_lse=softmax, backend=backend, **options,
    )  # fmt: skip
    output, lse = result if softmax else (result, None)
    loss = output.to(torch.float64).sin().sum()
    if lse is not None:
        loss = loss + lse.masked_fill(lse.isinf(), 0.0).to(torch.float64).cos().sum()
    gradients = torch.autograd.grad(loss, (query, key, value, slopes, bias))
    return {"output": output, **({"lse": lse} if softmax else {}), **dict(zip(NAMES, gradients, strict=True))}


def compare(inputs, dtype, backend, score_function, window, first=None, last=None, **options):
    arguments = (score_function, window, first, last)
    exact = outputs_and_gradients(inputs, torch.float64, "reference", *arguments, **options)
    plain = outputs_and_gradients(inputs, dtype, "reference", *arguments, **options)
    ours = outputs_and_gradients(inputs, dtype, backend, *arguments, **options)
    for name, expected in exact.items():
        if dtype == torch.float64:
            torch.testing.assert_close(ours[name], expected, atol=1e-10, rtol=1e-10)
            continue
        # an output sums a term of about 1 per visible key; one number per head sums a term of about sqrt(D)
        # (times the distance) for every visible pair, rounded twice
        batch, num_queries, _, head_dim = inputs[0].shape
        reach = inputs[1].shape[1] if window is None else min(window, inputs[1].shape[1])
        terms = 2 * math.sqrt(batch * num_queries * reach * head_dim)
        summed = {"slopes": terms * reach, "score_bias": terms, "output": math.sqrt(reach)}.get(name, 0.0)
        assert_as_exact_as_pytorch(ours[name].detach(), plain[name].detach(), expected.detach(), name, summed)


@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocked_equals_reference(shape, score_function):
    inputs = make_inputs(shape)
    for window in windows_for(shape[1]):
        compare(inputs, torch.float32, "blocked", score_function, window)


@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_blocked_equals_reference_with_visibility(shape, score_function):
    inputs, (first, last) = make_inputs(shape), ragged(shape)
    for window, (f, s) in itertools.product((1, 7, None), ((first, None), (None, last), (first, last))):
        compare(inputs, torch.float32, "blocked", score_function, window, f, s)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
def test_blocked_in_other_precisions(dtype, score_function):
    shape = SHAPES[0]
    # inputs that every precision can hold, so that only the computation differs
    inputs = [t.to(torch.bfloat16).to(torch.float16).double() for t in make_inputs(shape)]
    compare(inputs, dtype, "blocked", score_function, 20)


@pytest.mark.parametrize(("window", "budget"), [(100, 2**18), (100, 7 * 32 * 160), (300, 2**17), (31, 1)])
@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
def test_every_way_of_batching_tiles(monkeypatch, score_function, window, budget):
    """Neighbouring tiles, tiles that share no key, and single ones, with grouped heads and documents."""
    monkeypatch.setattr(bands, "TILE_BUDGET", budget)
    shape = (1, 1000, 1010, 4, 2, 4)
    inputs = make_inputs(shape)
    documents = torch.arange(1000, dtype=torch.int32).div(170, rounding_mode="floor").mul(170)[None]
    for first, options in ((None, {}), (documents, {}), (documents, {"softcap": 2.0, "hidden": hidden_keys(shape)})):
        compare(inputs, torch.float32, "blocked", score_function, window, first, **options)


@settings(max_examples=40, deadline=None)
@given(
    num_queries=st.integers(1, 150),
    earlier=st.integers(0, 90),
    window=st.one_of(st.none(), st.integers(1, 200)),
    group=st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]),
    score_function=st.sampled_from(["sigmoid", "softmax"]),
    documents=st.booleans(),
    softcap=st.sampled_from([None, 0.5, 3.0]),
    holes=st.booleans(),
    seed=st.integers(0, 10),
)
def test_any_shape(num_queries, earlier, window, group, score_function, documents, softcap, holes, seed):
    shape = (1, num_queries, num_queries + earlier, group[0], group[1], 4)
    first = ragged(shape, seed)[0] if documents else None
    hidden = hidden_keys(shape, seed) if holes else None
    options = {"softcap": softcap, "hidden": hidden}
    compare(make_inputs(shape, seed), torch.float64, "blocked", score_function, window, first, **options)


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
def test_soft_capped_by_a_plain_definition(backend, score_function):
    """Query by query: the scaled product is capped, then slope and bias are added, then keys are hidden."""
    shape = (2, 9, 14, 4, 2, 8)
    query, key, value, slopes, bias = (t.requires_grad_() for t in make_inputs(shape))
    query, hidden = 4 * query, hidden_keys(shape)
    options = {"score_function": score_function, "slopes": slopes, "score_bias": bias, "scale": 0.7, "softcap": 1.5}
    output = window_attention(query, key, value, window=6, hidden=hidden, backend=backend, **options)
    rows = []
    for b, t, h in itertools.product(range(2), range(9), range(4)):
        own = 5 + t
        seen = [j for j in range(own - 5, own + 1) if not hidden[b, j]]
        distance = own - torch.tensor(seen)
        product = (key[b, seen, h // 2] * query[b, t, h]).sum(-1) * 0.7
        assert (product.abs() > 1.5).any() or len(seen) < 4
        scores = 1.5 * (product / 1.5).tanh() + slopes[h] * distance + bias[h]
        weights = scores.sigmoid() if score_function == "sigmoid" else scores.softmax(0)
        rows.append(weights @ value[b, seen, h // 2])
    expected = torch.stack(rows).view_as(output)
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=1e-12)
    inputs = (query, key, value, slopes, bias)
    gradients = [torch.autograd.grad(result.sin().sum(), inputs, retain_graph=True) for result in (output, expected)]
    for name, ours, plain in zip(NAMES, *gradients, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-12, rtol=1e-12, msg=name)


@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
def test_gradcheck(backend, score_function, softcap):
    query, key, value, slopes, bias = (t.requires_grad_() for t in make_inputs((1, 7, 9, 2, 1, 3)))
    first = torch.tensor([[0, 0, 3, 3, 9, 9, 9]], dtype=torch.int32)

    def attend(*tensors):
        result = window_attention(
            *tensors[:3], window=4, score_function=score_function, slopes=tensors[3], score_bias=tensors[4],
            first_visible=first, return_lse=score_function == "softmax", softcap=softcap, backend=backend,
        )  # fmt: skip
        if score_function == "sigmoid":
            return result
        output, lse = result
        return output, lse[:, :4]  # the rows after them see nothing, their lse is -inf

    assert torch.autograd.gradcheck(attend, (query, key, value, slopes, bias))


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
def test_a_row_that_sees_nothing_is_exactly_zero_and_gives_no_gradient(backend, score_function):
    query, key, value, slopes, bias = (t.float().requires_grad_() for t in make_inputs((1, 40, 40, 2, 1, 4)))
    first = torch.zeros(1, 40, dtype=torch.int32)
    first[:, 30:] = 40
    output = window_attention(
        query, key, value, window=8, score_function=score_function, slopes=slopes, score_bias=bias,
        first_visible=first, backend=backend,
    )  # fmt: skip
    assert torch.equal(output[:, 30:], torch.zeros_like(output[:, 30:]))
    gradients = torch.autograd.grad(output[:, 30:].sum() + 0 * output.sum(), (query, key, value, slopes, bias))
    for name, gradient in zip(NAMES, gradients, strict=True):
        assert torch.count_nonzero(gradient) == 0, name


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_the_key_at_the_window_edge(backend):
    """The key at distance W - 1 matters; the one at distance W has exactly zero gradient."""
    query, key, value, *_ = (t.requires_grad_() for t in make_inputs((1, 100, 100, 1, 1, 4)))
    for window, row in ((1, 50), (7, 60), (33, 99)):
        output = window_attention(query, key, value, window=window, backend=backend)
        d_key, d_value = torch.autograd.grad(output[0, row].sum(), (key, value))
        for gradient in (d_key, d_value):
            magnitude = gradient[0, :, 0].abs().amax(dim=-1)
            assert magnitude[row - window + 1] > 0
            assert torch.count_nonzero(magnitude[: row - window + 1]) == 0
            assert torch.count_nonzero(magnitude[row + 1 :]) == 0


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_slope_signs_by_what_they_cause(backend):
    """A negative slope lets the nearest key win, a positive one the farthest."""
    num_keys = 30
    query = torch.zeros(1, num_keys, 2, num_keys)
    key = torch.zeros(1, num_keys, 1, num_keys)
    value = torch.eye(num_keys).view(1, num_keys, 1, num_keys)
    weights = window_attention(query, key, value, window=10, slopes=torch.tensor([-0.5, 0.5]), backend=backend)
    recent, old = weights[0, -1, 0, -10:], weights[0, -1, 1, -10:]
    assert (recent.diff() > 0).all()
    assert (old.diff() < 0).all()
    # Eq. 5 with q.k = 0: sigmoid(slope * distance), distance 0 at the query's own key
    distance = torch.arange(9, -1, -1.0)
    torch.testing.assert_close(recent, torch.sigmoid(-0.5 * distance))
    torch.testing.assert_close(old, torch.sigmoid(0.5 * distance))


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_sigmoid_is_not_shift_invariant_and_softmax_is(backend):
    query, key, value, *_ = make_inputs((1, 20, 20, 1, 1, 4))
    run = lambda f, b: window_attention(query, key, value, window=5, score_function=f, score_bias=b, backend=backend)  # noqa: E731
    torch.testing.assert_close(run("softmax", 0.0), run("softmax", 3.0))
    assert (run("sigmoid", 0.0) - run("sigmoid", 3.0)).abs().max() > 0.1


@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
def test_saturated_scores_stay_finite(score_function):
    """Steep slopes of both signs: weights of exactly 0 and 1, no NaN anywhere, forward and backward."""
    inputs = make_inputs((1, 300, 300, 2, 2, 4))
    inputs[3] = torch.tensor([-50.0, 50.0])
    result = outputs_and_gradients(inputs, torch.float32, "blocked", score_function, 256)
    for name, tensor in result.items():
        assert tensor.isfinite().all(), name


def test_parts_over_disjoint_keys_join():
    """Softmax joins by lse; sigmoid parts add."""
    query, key, value, *_ = make_inputs((1, 12, 40, 2, 1, 4))
    split = torch.full((1, 12), 25, dtype=torch.int32)
    low_last = torch.full((1, 12), 24, dtype=torch.int32)
    whole, whole_lse = window_attention(query, key, value, window=None, score_function="softmax", return_lse=True)
    new, new_lse = window_attention(
        query, key, value, window=None, score_function="softmax", first_visible=split, return_lse=True
    )
    old, old_lse = window_attention(
        query, key, value, window=None, score_function="softmax", last_visible=low_last, return_lse=True
    )
    joined = torch.logaddexp(new_lse, old_lse)
    torch.testing.assert_close(joined, whole_lse)
    parts = new * (new_lse - joined).exp()[..., None] + old * (old_lse - joined).exp()[..., None]
    torch.testing.assert_close(parts, whole)
    sigmoid = lambda **kw: window_attention(query, key, value, window=None, **kw)  # noqa: E731
    torch.testing.assert_close(sigmoid(first_visible=split) + sigmoid(last_visible=low_last), sigmoid())


def test_memory_is_linear_in_the_length():
    """The largest intermediate does not grow with T: only inputs, outputs and a fixed scratch exist."""
    peaks = []
    for num_tokens in (2048, 4096):
        query, key, value = (torch.randn(1, num_tokens, 2, 16) for _ in range(3))
        with torch.profiler.profile(profile_memory=True) as profile:
            window_attention(query, key, value, window=128)
        largest = max((e.self_cpu_memory_usage for e in profile.key_averages()), default=0)
        peaks.append(largest / query.nbytes)
    assert peaks[1] <= peaks[0] * 1.1


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_no_nan_leaves_a_row_that_sees_nothing(backend):
    query, key, value = (torch.randn(1, 8, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    first = torch.tensor([[3, 3, 3, 3, 4, 5, 6, 7]], dtype=torch.int32)
    logs = [
        window_attention(
            query, key, value, window=window, score_function="softmax", first_visible=first, return_lse=True,
            backend=backend,
        )[1]
        for window in (4, 2)
    ]  # fmt: skip
    # of two rows that see nothing the gradient is not a number
    torch.logaddexp(*logs)[:, 3:].sum().backward()
    for tensor in (query, key):
        assert tensor.grad is not None
        assert bool(tensor.grad.isfinite().all())
