"""Sampling draws what it says, and only that."""

import pytest
import torch

from swat_lm.serve.sampling import Sampling, sample

LOGITS = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))


def shares(sampling: Sampling, count: int = 4000) -> list[float]:
    """How often each token is drawn."""
    drawn = sample(LOGITS.expand(count, -1), sampling, torch.Generator().manual_seed(0))
    return (torch.bincount(drawn, minlength=4) / count).tolist()


def test_temperature():
    assert shares(Sampling(temperature=0)) == [1, 0, 0, 0]
    assert shares(Sampling()) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    # so low that dividing by it would leave float32
    assert shares(Sampling(temperature=1e-45)) == [1, 0, 0, 0]
    squared = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    assert shares(Sampling(temperature=0.5)) == pytest.approx((squared / squared.sum()).tolist(), abs=0.03)


def test_top_k_and_top_p():
    assert shares(Sampling(top_k=2)) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert shares(Sampling(top_k=9)) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    # 0.5 does not reach 0.6, 0.5 + 0.3 does
    assert shares(Sampling(top_p=0.6)) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert shares(Sampling(top_p=0.01)) == [1, 0, 0, 0]


def test_padded_vocabulary_is_never_drawn():
    assert shares(Sampling(vocab_size=1)) == [1, 0, 0, 0]
    greedy = sample(torch.tensor([[0.0, 1.0, 9.0]]), Sampling(temperature=0, vocab_size=2))
    assert greedy.tolist() == [1]


def test_same_seed_same_tokens():
    draws = [sample(LOGITS.expand(50, -1), Sampling(), torch.Generator().manual_seed(3)).tolist() for _ in range(2)]
    assert draws[0] == draws[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"vocab_size": 0}, "vocab_size"),
    ],
)
def test_bad_values(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Sampling(**arguments)
