"""The capped simplex and its thresholds on prefixes: against bisection, and row by row against the definition."""

import pytest
import torch

from swat_lm.ops.capped_simplex import NONE, capped_simplex, prefix_thresholds


def bisected(scores: torch.Tensor, total: int) -> torch.Tensor:
    low, high = scores.min() - 2, scores.max() + 1
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (scores - middle).clamp(0, 1).sum() >= total else (low, middle)
    return (scores - low).clamp(0, 1)


@pytest.mark.parametrize("spread", [0.0, 0.05, 0.3, 1.0, 10.0])
@pytest.mark.parametrize("total", [1, 3, 12])
def test_it_is_the_projection(spread, total):
    generator = torch.Generator().manual_seed(total)
    scores = torch.randn(20, 40, generator=generator, dtype=torch.float64) * spread
    # ties as well
    scores[10:] = (scores[10:] * 4).round() / 4
    found = capped_simplex(scores, total)
    assert found.min() >= 0
    assert found.max() <= 1
    torch.testing.assert_close(found.sum(-1), torch.full((20,), float(total), dtype=torch.float64), rtol=0, atol=1e-12)
    for row, mine in zip(scores, found, strict=True):
        torch.testing.assert_close(mine, bisected(row, total), rtol=0, atol=1e-12)


def test_by_hand():
    # where a port that clamps only from below gives 2.325, .325, .225, .125
    scores = torch.tensor([3, 1, 0.9, 0.8, -1], dtype=torch.float64)
    expected = torch.tensor([1, 2.3 / 3, 2 / 3, 1.7 / 3, 0], dtype=torch.float64)
    torch.testing.assert_close(capped_simplex(scores, 3), expected)
    # no more than k: all of them, and nothing is nothing
    few = torch.tensor([NONE, -3.0, NONE, 7.0])
    assert capped_simplex(few, 2).tolist() == [0.0, 1.0, 0.0, 1.0]
    # k = 1 is sparsemax (arXiv 1602.02068)
    torch.testing.assert_close(capped_simplex(torch.tensor([0.1, 0.3, -2.0]), 1), torch.tensor([0.4, 0.6, 0.0]))


def test_gradients():
    scores = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda given: capped_simplex(given, 3), (scores,))
    # confident: the k-th leads by more than 1, so nothing is free and nothing has a gradient
    confident = torch.tensor([5.0, 4.0, 1.0, 0.0], requires_grad=True)
    capped_simplex(confident, 2)[0].backward()
    assert not confident.grad.any()


def test_so_many_candidates_are_enough():
    """With the scores' spread at the start, 4 k largest hold all that is free; with fewer the threshold is too low."""
    scores = 0.7 * torch.randn(1, 1, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = capped_simplex(scores[0, 0], 32)
    support = int((exact > 0).sum())
    assert 40 < support < 128
    for most, is_enough in ((128, True), (support, True), (40, False)):
        before = torch.full((1, 1, most), NONE, dtype=torch.float64)
        found = prefix_thresholds(scores, before, None, 32, 64)
        error = ((scores[0, 0] - found.tau[0, 0, -1]).clamp(0, 1) - exact).abs().max()
        assert error < 1e-12 if is_enough else error > 0.05
        assert found.num_free[0, 0, -1] <= most


@pytest.mark.parametrize("spread", [0.0, 0.05, 0.5, 2.0, 20.0])
@pytest.mark.parametrize(("block", "documents"), [(4, False), (4, True), (16, True)])
def test_every_prefix_by_the_definition(spread, block, documents):
    generator = torch.Generator().manual_seed(block)
    num_rows, most, total = 37, 8, 3
    entering = torch.randn(2, 2, num_rows, generator=generator, dtype=torch.float64) * spread
    entering[torch.rand(entering.shape, generator=generator) < 0.2] = NONE
    before = (torch.randn(2, 2, most, generator=generator, dtype=torch.float64) * spread).sort(descending=True).values
    before[..., 5:] = NONE
    # one document ends in each block
    segments = torch.arange(num_rows).div(block, rounding_mode="floor").expand(2, -1) if documents else None
    found = prefix_thresholds(entering, before, segments, total, block)
    scores = torch.cat((before, entering), dim=-1)
    owner = torch.zeros(2, most + num_rows, dtype=torch.int64)
    if segments is not None:
        owner[:, most:] = segments
    chosen, full, free = (torch.zeros_like(found.chosen) for _ in range(3))
    for b, h, row in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(num_rows)).tolist():
        mine = 0 if segments is None else int(segments[b, row])
        own = [s for s in range(most + row + 1) if scores[b, h, s] > NONE and owner[b, s] == mine]
        own = sorted(own, key=lambda s: (-scores[b, h, s].item(), s))[:most]
        chosen[b, h, own[:total]] += 1
        tau = found.tau[b, h, row]
        weights = (scores[b, h, own] - tau).clamp(0, 1)
        torch.testing.assert_close(weights, capped_simplex(scores[b, h, own], total), rtol=0, atol=1e-12)
        assert (tau == NONE) == (len(own) <= total)
        is_full = scores[b, h, own] >= tau + 1
        is_free = (scores[b, h, own] > tau) & ~is_full
        full[b, h, own] += is_full
        free[b, h, own] += is_free
        assert found.num_free[b, h, row] == is_free.sum()
    for name, expected in (("chosen", chosen), ("full", full), ("free", free)):
        assert torch.equal(getattr(found, name), expected), name
