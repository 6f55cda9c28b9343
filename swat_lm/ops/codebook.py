"""Vector quantisation with a codebook that follows averages of keys (EMA), not gradients, as pure functions.

What a pass saw is summed, so chunks, micro-batches and processes add up; one call after the step takes it in. The sums
also carry keys that may take the places of dead codes: each is a mean whose weights are so far apart that one of them
outweighs the others, which makes a draw out of a sum. Legend: N keys, S codes, D key size.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# distances that are held at once, about
ELEMENTS = 2**22
# of two waiting times drawn for a place the ratio is uniform: to this power one of them decides, in float64 without
# overflow from the shortest on
SHARPNESS, SHORTEST = 40, 1e-7
# a sum of weights that is lower has lost its digits, and its quotients are anywhere
LEAST = torch.finfo(torch.float64).tiny / torch.finfo(torch.float64).eps


class Seen(NamedTuple):
    """What a pass has seen of keys, as sums in float64: those of several passes are added up."""

    counts: Tensor
    """`[S]`: keys of each code."""
    totals: Tensor
    """`[S, D]`: their sum."""
    spare_weight: Tensor
    """`[S]`: of the keys that may take a code's place."""
    spare_totals: Tensor
    """`[S, D]`: their weighted sum."""


class Codebook(NamedTuple):
    """Codes and the averages that they follow."""

    codes: Tensor
    """`[S, D]`"""
    counts: Tensor
    """`[S]`: running average of a code's keys per step."""
    totals: Tensor
    """`[S, D]`: running average of their sum."""


def unit_keys(x: Tensor) -> Tensor:
    """LayerNorm without gain or bias, divided by `D ** 0.25`: of two such, products are scores of attention."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * x.shape[-1] ** -0.25


@torch.library.custom_op("swat_lm::nearest_codes", mutates_args=())
def nearest_codes(key: Tensor, codes: Tensor) -> Tensor:
    """The code with the least distance to each key `[..., D]`, the first of several: int64 `[...]`.

    Its products have no gradient, and FLOP counters do not count them.
    """
    # an op does not leave autocast by itself, and codes are chosen by small differences
    with torch.autocast(key.device.type, enabled=False):
        half = codes.square().sum(1) / 2
        found = [
            (half - torch.mm(part, codes.t())).argmin(dim=1)
            for part in key.reshape(-1, key.shape[-1]).split(max(1, ELEMENTS // len(codes)))
        ]
    return (torch.cat(found) if found else half.new_zeros(0, dtype=torch.int64)).view(key.shape[:-1])


@nearest_codes.register_fake
def _(key: Tensor, codes: Tensor) -> Tensor:
    return key.new_empty(key.shape[:-1], dtype=torch.int64)


@torch.no_grad()
def seen_of(key: Tensor, code: Tensor, codes: Tensor, waits: Tensor, places: Tensor, real: Tensor | None) -> Seen:
    """What is summed of keys `[..., D]` with their codes `[...]`, without those that are not real.

    Args:
        waits: float64 `[...]`, waiting times of the exponential distribution, one per key. The farther a key is from
            its code, the sooner it comes: of those for one place it is drawn by its squared distance, as k-means++
            draws. A key that is a code already never comes.
        places: int64 `[...]`, the code whose place each key may take, drawn too.
    """
    size, dim = codes.shape
    code, places, key = code.flatten(), places.flatten(), key.reshape(-1, dim).double()
    counted = torch.ones_like(waits).flatten() if real is None else real.flatten().double()
    # not even NaN passes
    key = key.masked_fill((counted == 0)[:, None], 0.0)
    error = (key - codes.double()[code]).square().sum(1) / dim**0.5
    arrival = (waits.flatten() / error).clamp(min=SHORTEST)
    weight = counted * arrival**-SHARPNESS

    def summed(index: Tensor, values: Tensor) -> Tensor:
        return values.new_zeros(size, *values.shape[1:]).index_add_(0, index, values)

    return Seen(
        summed(code, counted), summed(code, key), summed(places, weight), summed(places, weight[:, None] * key)
    )  # fmt: skip


@torch.no_grad()
def absorbed(book: Codebook, seen: Seen, decay: float, dead_below: float) -> Codebook:
    """The codebook after a step: running averages, codes as their means, dead codes in the places of drawn keys.

    A code is dead whose running count is below `dead_below` of the mean over all codes; it begins anew with that mean.
    A code that has no count stays where it is; so does a dead one where the keys drawn for its place lie upon codes.
    """
    wide = book.totals.dtype
    count = decay * book.counts.double() + (1 - decay) * seen.counts
    total = decay * book.totals.double() + (1 - decay) * seen.totals
    codes = torch.where((count > 0)[:, None], total / count.clamp(min=1e-300)[:, None], book.codes.double())
    mean = count.mean()
    revived = (count < dead_below * mean) & (seen.spare_weight > LEAST)
    spare = seen.spare_totals / seen.spare_weight.clamp(min=LEAST)[:, None]
    codes = torch.where(revived[:, None], spare, codes)
    count = torch.where(revived, mean, count)
    total = torch.where(revived[:, None], spare * mean, total)
    return Codebook(codes.to(wide), count.to(wide), total.to(wide))


def perplexity(count: Tensor) -> Tensor:
    """How many codes are in use, as the exponential of the entropy of their counts `[S]`; 1 where nothing counts."""
    share = count / count.sum().clamp(min=1e-300)
    return torch.special.entr(share).sum().exp()
