"""A bias by distance in the operator and its step, against the definition; T5's buckets against transformers'."""

import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from swat_lm.ops import window_attention, window_attention_step
from swat_lm.ops.relative_position import relative_buckets, relative_buckets_both_ways
from swat_lm.ops.ring import empty_ring
from tests.ops.test_backends import NAMES, hidden_keys, make_inputs, ragged

SHAPES = [(2, 70, 70, 4, 2, 8), (1, 200, 200, 2, 2, 16), (2, 33, 111, 4, 1, 8), (2, 1, 9, 2, 1, 4)]


@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
def test_the_definition_is_the_equation(score_function):
    """A bias that is linear in the distance is a slope."""
    query, key, value, slopes, bias = make_inputs(SHAPES[0])
    relative = slopes[:, None] * torch.arange(9.0, dtype=torch.float64) + bias[:, None]
    options = {"window": 9, "score_function": score_function, "backend": "reference"}
    expected = window_attention(query, key, value, slopes=slopes, score_bias=bias, **options)
    torch.testing.assert_close(window_attention(query, key, value, relative_bias=relative, **options), expected)


@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocked_equals_reference(shape, score_function):
    """Outputs and every gradient, that to the bias among them; with visibility, holes and caps."""
    first, last = ragged(shape)
    cases = [
        {"window": window, **more}
        for window in sorted({1, 2, 40, shape[2] - 1, shape[2] + 3})
        for more in ({}, {"first_visible": first}, {"last_visible": last, "hidden": hidden_keys(shape), "softcap": 1.5})
    ]
    for case in cases:
        found = []
        for backend in ("reference", "blocked"):
            inputs = [x.requires_grad_() for x in make_inputs(shape)]
            # a wider one than is asked for serves as well
            relative = torch.randn(shape[3], case["window"] + 2, dtype=torch.float64,
                                   generator=torch.Generator().manual_seed(3)).requires_grad_()  # fmt: skip
            output = window_attention(
                *inputs[:3], slopes=inputs[3], score_bias=inputs[4], relative_bias=relative,
                score_function=score_function, backend=backend, **case,
            )  # fmt: skip
            found.append((output, *torch.autograd.grad(output.sin().sum(), (*inputs, relative))))
        for name, ours, expected in zip(("output", *NAMES, "relative_bias"), found[1], found[0], strict=True):
            torch.testing.assert_close(
                ours, expected, atol=1e-10, rtol=1e-10, msg=lambda m, n=name, c=case: f"{n} {c} {m}"
            )


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
def test_a_step_is_the_whole_row(score_function, batch_invariant):
    """Rows together and apart, over rings in order and out of it."""
    heads, kv_heads, size, window, count = 4, 2, 8, 6, 15
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    query, key, value = (draw(3, count, n, size) for n in (heads, kv_heads, kv_heads))
    relative = draw(heads, window)
    options = {"score_function": score_function, "relative_bias": relative}
    expected = window_attention(query, key, value, window=window, backend="reference", **options)
    for backend in ("blocked", "reference"):
        for slots in ([0, 1, 2], [2, 0, 1]):
            rings = [empty_ring(3, window, kv_heads, size, query) for _ in range(2)]
            slot, begins = torch.tensor(slots), torch.tensor([0, 0, 0] if slots[0] == 0 else [0, 2, 5])
            for t in range(count + int(begins.max())):
                own = ((t >= begins) & (t - begins < count)).nonzero().squeeze(1)
                place = (t - begins)[own]
                got = window_attention_step(
                    *(x[own, place].unsqueeze(1) for x in (query, key, value)), *rings, slot[own], place,
                    backend=backend, batch_invariant=batch_invariant, **options,
                )  # fmt: skip
                torch.testing.assert_close(got[:, 0], expected[own, place], atol=1e-12, rtol=1e-12)


def test_other_backends_refuse_it_by_name():
    query, key, value, *_ = make_inputs(SHAPES[0])
    relative = torch.zeros(4, 9)
    with pytest.raises(ValueError, match="backend: 'triton' cannot serve this call: relative_bias is served by"):
        window_attention(query, key, value, window=9, relative_bias=relative, backend="triton")
    rings = [empty_ring(2, 9, 2, 8, query) for _ in range(2)]
    with pytest.raises(ValueError, match="backend: 'triton' cannot serve this call: relative_bias is served by"):
        window_attention_step(
            *(x[:, :1] for x in (query, key, value)), *rings, torch.arange(2), torch.zeros(2, dtype=torch.int64),
            relative_bias=relative, backend="triton",
        )  # fmt: skip
    for window, wrong, message in (
        (None, relative, "^relative_bias: holds a number for every distance, so it needs a window"),
        (10, relative, r"^relative_bias: expected a number for every head and distance, \[4, 10\], got \[4, 9\]"),
        (9, relative[:3], r"^relative_bias: .* \[4, 9\], got \[3, 9\]"),
        (9, relative.long(), "^relative_bias: expected a floating-point tensor on cpu, got torch.int64"),
    ):
        with pytest.raises(ValueError, match=message):
            window_attention(query, key, value, window=window, relative_bias=wrong)


def test_buckets_are_those_of_t5():
    distance = torch.arange(300)
    for buckets, farthest in ((32, 128), (16, 64)):
        theirs = T5Attention._relative_position_bucket(-distance, False, buckets, farthest)
        assert torch.equal(relative_buckets(300, buckets, farthest), theirs)
        ahead = torch.arange(199, -200, -1)
        theirs = T5Attention._relative_position_bucket(ahead, True, buckets, farthest)
        assert torch.equal(relative_buckets_both_ways(200, buckets, farthest), theirs)
    with pytest.raises(ValueError, match=r"^num_buckets: expected at least 2 .* got 32 buckets and 16"):
        relative_buckets(5, 32, 16)
