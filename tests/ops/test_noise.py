"""Noise as a function: the numbers themselves, so that no device, version or machine may draw others."""

import math

import pytest
import torch

from swat_lm.ops.noise import logistic, scrambled, uniform


def test_the_numbers_are_these():
    """As plain Python has them, whose whole numbers have no end."""

    def plain(value: int) -> int:
        value = ((value ^ value >> 16) * 0x21F0AAAD) % 2**32
        value = ((value ^ value >> 15) * 0x735A2D97) % 2**32
        return value ^ value >> 15

    words = (3, 2**62 + 7, 0, 2**33 + 1)
    state = 0x9E3779B9
    for word in words:
        for half in (word % 2**32, word >> 32):
            state = plain((state + 0x9E3779B9) % 2**32 ^ half)
    assert uniform(torch.tensor(words[0]), *words[1:]).item() == (state + 0.5) / 2**32
    assert uniform(words[0], torch.tensor([words[1]]), *words[2:]).tolist() == [(state + 0.5) / 2**32]


def test_scrambling_loses_nothing():
    values = torch.randint(2**32, (50_000,), generator=torch.Generator().manual_seed(0)).unique()
    found = scrambled(values)
    assert len(found.unique()) == len(values)
    assert int(found.min()) >= 0
    assert int(found.max()) < 2**32


def test_neighbours_are_independent():
    """Places in a row, layers and seeds side by side: even, and not correlated with each other."""
    seeds, places = torch.arange(64)[:, None], torch.arange(512)
    for layer in (0, 1):
        drawn = uniform(seeds, layer, places)
        assert drawn.shape == (64, 512)
        counts = torch.histc(drawn.float(), bins=16, min=0, max=1)
        # chi squared with 15 degrees of freedom: beyond 37.7 once in a thousand
        expected = drawn.numel() / 16
        assert float(((counts - expected) ** 2 / expected).sum()) < 37.7
        centred = drawn - 0.5
        other = uniform(seeds, layer + 1, places) - 0.5
        for pairs in (centred[:, 1:] * centred[:, :-1], centred[1:] * centred[:-1], centred * other):
            # of standard deviation 1 / 12 each
            assert abs(float(pairs.mean())) < 4 / 12 / math.sqrt(pairs.numel())


def test_the_difference_of_two_gumbel_numbers_is_logistic():
    drawn = logistic(torch.arange(40_000))
    gumbel = [-torch.log(-torch.log(uniform(torch.arange(40_000), which))) for which in (1, 2)]
    both = gumbel[0] - gumbel[1]
    for margin in (-1.5, 0.0, 0.4):
        share = torch.sigmoid(torch.tensor(margin)).item()
        for noise in (drawn, both):
            assert (margin + noise > 0).double().mean().item() == pytest.approx(share, abs=4 * 0.5 / 200)
    assert drawn.var().item() == pytest.approx(math.pi**2 / 3, rel=0.05)
    assert drawn.isfinite().all()
