"""Attention over blocks of keys is the definition's, in output, lse and the gradients of queries, keys and values."""

from typing import Any

import pytest
import torch

from swat_lm.ops import full_softmax
from swat_lm.ops.reference import window_attention_reference
from swat_lm.ops.streamed import streamed_attention


def inputs(num_queries: int, num_keys: int, scale: float = 1.0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(num_queries * 100 + num_keys)
    shapes = ((2, num_queries, 4, 6), (2, num_keys, 2, 6), (2, num_keys, 2, 6))
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    drawn[0] *= scale
    return tuple(each.requires_grad_() for each in drawn)


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("num_queries", "num_keys", "key_block"), [(6, 24, 4), (24, 24, 7), (5, 23, 24), (1, 9, 1)])
def test_it_is_the_definition(score_function: str, num_queries: int, num_keys: int, key_block: int):
    first = torch.randint(0, num_keys, (2, num_queries), dtype=torch.int32, generator=torch.Generator().manual_seed(3))
    first = first.sort(dim=1).values
    # a row that sees nothing
    first[1, -1] = num_keys
    hidden = torch.zeros(2, num_keys, dtype=torch.bool)
    hidden[0, 1::3] = True
    slopes = torch.tensor([0.3, -0.2, 0.0, 0.1], dtype=torch.float64)
    for more in ({}, {"first": first}, {"first": first, "hidden": hidden, "softcap": 0.9}):
        found = []
        given = (slopes, -0.5, more.get("first"))
        tensors = inputs(num_queries, num_keys)
        found.append(
            window_attention_reference(
                *tensors, *given, None, None, score_function, 0.4, more.get("softcap"), more.get("hidden")
            )
        )
        found.append(
            streamed_attention(
                *tensors, key_block=key_block, score_function=score_function, slopes=slopes, score_bias=-0.5, scale=0.4,
                first_visible=more.get("first"), softcap=more.get("softcap"), hidden=more.get("hidden"),
            )
        )  # fmt: skip
        weights = torch.randn(found[0][0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        results = []
        for output, lse in found:
            loss = (output * weights).sum()
            if score_function == "softmax":
                loss = loss + (lse.masked_fill(lse == -torch.inf, 0) * weights[..., 0]).sum()
            results.append((output.detach(), *torch.autograd.grad(loss, tensors)))
        for name, actual, expected in zip(("output", "dQ", "dK", "dV"), results[1], results[0], strict=True):
            torch.testing.assert_close(
                actual, expected, rtol=0, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
            )
            assert expected.any() or num_queries == 1, name
        if "first" in more:
            assert not results[1][0][1, -1].any()


def test_what_the_fused_kernel_computes_goes_to_it(monkeypatch: pytest.MonkeyPatch):
    asked: list[bool] = []
    serves = full_softmax.serves

    def served(*given: Any) -> bool:
        asked.append(serves(*given))
        return asked[-1]

    monkeypatch.setattr(full_softmax, "serves", served)
    tensors, nothing_before = inputs(9, 30), torch.zeros(2, 9, dtype=torch.int32)
    for first in (None, nothing_before):
        asked.clear()
        output, lse = window_attention_reference(*tensors, None, 0.7, first, None, None, "softmax", 0.4)
        assert lse is not None
        expected = output, lse
        actual = streamed_attention(
            *tensors, key_block=4, score_function="softmax", score_bias=0.7, scale=0.4, first_visible=first
        )
        # here, and by the operator that it is handed to
        assert asked == [True, True]
        # with a gradient of the lse, which the kernel has not, and without
        for of in (1, 2):
            sums = [torch.cat([part.sin().flatten() for part in each[:of]]).sum() for each in (actual, expected)]
            found, right = (torch.autograd.grad(loss, tensors, retain_graph=True) for loss in sums)
            for mine, other in zip((*actual, *found), (*expected, *right), strict=True):
                torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)
    others: tuple[dict[str, Any], ...] = ({"slopes": torch.ones(4)}, {"softcap": 3.0}, {"score_function": "sigmoid"})
    for more in others:
        asked.clear()
        streamed_attention(*tensors, key_block=4, **{"score_function": "softmax", **more})
        assert not any(asked), more


def test_extreme_scores_stay_finite():
    for score_function in ("softmax", "sigmoid"):
        tensors = inputs(7, 19, scale=1e4)
        output, _ = streamed_attention(*tensors, key_block=5, score_function=score_function)
        for gradient in torch.autograd.grad(output.square().sum(), tensors):
            assert gradient.isfinite().all()


def test_gradcheck_and_refusals():
    tensors = inputs(3, 7)
    assert torch.autograd.gradcheck(
        lambda *each: streamed_attention(*each, key_block=3, score_function="softmax"), tensors
    )
    with pytest.raises(ValueError, match="key_block: expected at least 1, got 0"):
        streamed_attention(*tensors, key_block=0)
    with pytest.raises(ValueError, match="key: expected at least the 7 places of the queries, got 3"):
        streamed_attention(tensors[1], tensors[0][:, :3, :2], tensors[0][:, :3, :2], key_block=3)
    with pytest.raises(ValueError, match="get no gradient here"):
        streamed_attention(*tensors, key_block=3, score_bias=torch.zeros(4, requires_grad=True))
