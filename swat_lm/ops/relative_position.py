"""T5's buckets of relative positions (arXiv 1910.10683): exact near by, then ever wider up to a farthest distance.

The bucket of a distance, of which each head learns one number; legend: W distances.
"""

import math

import torch
from torch import Tensor

NUM_BUCKETS = 32
FARTHEST = 128


def relative_buckets(
    num_distances: int,
    num_buckets: int = NUM_BUCKETS,
    farthest: int = FARTHEST,
    device: torch.device | str | None = None,
) -> Tensor:
    """The bucket of each distance 0, 1, ..., W - 1 back from a query that sees nothing after it, int64 `[W]`.

    The first half of the buckets are single distances, the others grow in the logarithm; what is as far as `farthest`
    or farther shares the last.

    Raises:
        ValueError: fewer than 2 buckets, or a farthest distance that is no farther than those that have their own.
    """
    exact = num_buckets // 2
    if exact < 1 or farthest <= exact:
        raise ValueError(
            f"num_buckets: expected at least 2 and a farthest distance above half of them, got {num_buckets} buckets "
            f"and {farthest}"
        )
    distance = torch.arange(num_distances, device=device)
    return _buckets(distance, num_buckets, farthest)


def relative_buckets_both_ways(
    window: int, num_buckets: int = NUM_BUCKETS, farthest: int = FARTHEST, device: torch.device | str | None = None
) -> Tensor:
    """The buckets of keys from W - 1 after the query to W - 1 before it, int64 `[2 W - 1]`.

    The first half of the buckets serve keys before the query and itself, the second half those after it.
    """
    ahead = torch.arange(window - 1, -window, -1, device=device)
    half = num_buckets // 2
    return _buckets(ahead.abs(), half, farthest) + torch.where(ahead > 0, half, 0)


def _buckets(distance: Tensor, num_buckets: int, farthest: int) -> Tensor:
    exact = num_buckets // 2
    # in float32, as T5 computes it, so that borders fall where its weights have learnt them
    share = torch.log(distance.clamp(min=1).float() / exact) / math.log(farthest / exact)
    far = exact + (share * (num_buckets - exact)).long()
    return torch.where(distance < exact, distance, far.clamp(max=num_buckets - 1))
