"""Full softmax attention on a CPU goes to PyTorch's kernel where the kernel can do it, and is the equation's."""

from typing import Any

import pytest
import torch

from swat_lm.ops import full_softmax, window_attention

# B, T, S, H, K, D, window
SHAPES = [(2, 5, 5, 4, 2, 8, None), (2, 7, 19, 6, 2, 16, None), (2, 70, 150, 4, 1, 32, None), (2, 33, 40, 4, 4, 16, 40)]


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-13), (torch.float32, 3e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("slopes", [None, -1.0, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_equation(
    shape: Any, slopes: float | None, dtype: torch.dtype, within: float, monkeypatch: pytest.MonkeyPatch
):
    batch, count, total, heads, kv_heads, size, window = shape
    torch.manual_seed(0)
    query = torch.randn(batch, count, heads, size, dtype=dtype, requires_grad=True)
    key, value = (torch.randn(batch, total, kv_heads, size, dtype=dtype, requires_grad=True) for _ in range(2))
    incoming, called = torch.randn_like(query), []
    of_heads = None if slopes is None else slopes * 0.5 ** torch.arange(1, heads + 1)
    for name in ("forward", "backward"):
        own = getattr(full_softmax, name)
        monkeypatch.setattr(full_softmax, name, lambda *a, own=own, name=name: (called.append(name), own(*a))[1])
    results = []
    for backend in ("reference", "blocked"):
        # nobody is hidden
        first = torch.zeros(batch, count, dtype=torch.int32)
        output, lse = window_attention(
            query, key, value, window=window, score_function="softmax", slopes=of_heads, score_bias=0.3,
            first_visible=first, return_lse=True, backend=backend,
        )  # fmt: skip
        results.append((output, lse, *torch.autograd.grad(output, (query, key, value), incoming)))
    # with slopes the gradient comes by tiles
    assert called == ["forward", "backward"][: 2 if slopes is None else 1]
    # where the oldest keys weigh most, scores are as large as their bias, and rounded so
    room = 1 if slopes != 1.0 else max(1, total / 2)
    for found, wanted in zip(*results, strict=True):
        assert (found - wanted).abs().max() <= within * room


@pytest.mark.parametrize(
    "asked",
    [
        {"window": 4},
        {"score_function": "sigmoid"},
        {"slopes": torch.tensor([0.1, -0.1]), "scale": 0.0},
        {"softcap": 2.0},
        {"first_visible": torch.tensor([[0, 0, 0, 2, 2]], dtype=torch.int32)},
        {"hidden": torch.tensor([[True, False, False, False, False]])},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_what_it_does_not_know_is_left_to_the_tiles(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    def refused(*_: Any) -> Any:
        raise AssertionError("not for this kernel")

    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 5, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    for name in ("forward", "backward"):
        monkeypatch.setattr(full_softmax, name, refused)
    call = {"window": None, "score_function": "softmax", **asked}
    results = [
        torch.autograd.grad(window_attention(query, key, value, backend=name, **call).square().sum(), (query, key))
        for name in ("reference", "blocked")
    ]
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)


def test_slopes_that_learn_have_their_gradient():
    torch.manual_seed(0)
    given = [torch.randn(1, 70, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    slopes = torch.tensor([0.1, -0.1], dtype=torch.float64, requires_grad=True)
    results = []
    for backend in ("reference", "blocked"):
        output = window_attention(*given, window=None, score_function="softmax", slopes=slopes, backend=backend)
        results.append((output, *torch.autograd.grad(output.sin().sum(), (*given, slopes))))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_with_slopes_far_into_a_row_float32_is_as_near_as_tiles(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 200, 2, 16), torch.randn(1, 9000, 1, 16), torch.randn(1, 9000, 1, 16)
    how = {"window": None, "score_function": "softmax", "slopes": torch.tensor([-0.5, -0.001]), "backend": "blocked"}
    kernel = window_attention(query, key, value, **how)
    monkeypatch.setattr(full_softmax, "serves", lambda *_: False)
    tiles = window_attention(query, key, value, **how)
    exact = window_attention(query.double(), key.double(), value.double(), **how)
    assert (kernel - exact).abs().max() <= 3 * (tiles - exact).abs().max() <= 1e-5


def test_the_gradient_of_an_lse_comes_by_tiles():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 6, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    results = []
    for backend in ("reference", "blocked"):
        output, lse = window_attention(
            query, key, value, window=None, score_function="softmax", return_lse=True, backend=backend
        )
        results.append(torch.autograd.grad((output * lse[..., None]).sum(), (query, key, value)))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)


def apart(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, whose channels do not lie side by side."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.parametrize("strided", ["query", "key", "value", "incoming"])
def test_any_strides_will_do(strided: str):
    torch.manual_seed(0)
    given = {name: torch.randn(1, 9, 2, 8) for name in ("query", "key", "value", "incoming")}
    given["query"], given["incoming"] = given["query"][:, 4:], given["incoming"][:, 4:]
    given[strided] = apart(given[strided])
    results = []
    for backend in ("reference", "blocked"):
        leaves = [given[name].detach().requires_grad_() for name in ("query", "key", "value")]
        output = window_attention(*leaves, window=None, score_function="softmax", backend=backend)
        results.append((output, *torch.autograd.grad(output, leaves, given["incoming"])))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)


def test_what_is_no_number_stays_none():
    """As in the equation: a query that is broken breaks its own row, a value those that see it."""
    for broken in ("query", "key", "value"):
        torch.manual_seed(0)
        given = {name: torch.randn(1, 5, 2, 4) for name in ("query", "key", "value")}
        given[broken][0, 2, 1, 3] = torch.nan
        found, wanted = (
            window_attention(**given, window=None, score_function="softmax", return_lse=True, backend=backend)
            for backend in ("blocked", "reference")
        )
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, equal_nan=True)
