"""The capped simplex, and its threshold on every prefix of a sequence of scores (SPARSEK, arXiv 2406.16747).

`SPARSEK(z, k)` is the point of `{p : 0 <= p <= 1, sum p = k}` nearest to z: `p = clip(z - tau, 0, 1)` with the tau at
which that sums to k. On a prefix, row i has the scores that have entered by then, of which the M largest count: a
stream then needs M scores and no more, and decoding is the parallel pass by definition. Derivations are in
docs/mathematics.md.

Legend: B sequences, K heads, T rows, M candidates, N = M + T all that can enter, C rows of a block.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NONE = float("-inf")
"""The score of no candidate."""
ELEMENTS = 2**19
"""Numbers of a table that are held at once, about."""


class Prefixes(NamedTuple):
    """What `prefix_thresholds` finds. Candidate s < M was there before, candidate M + i enters with row i.

    Thresholds rise along a document, so rows in which a candidate has p = 1, 0 < p < 1 and p = 0 follow one another.
    """

    tau: Tensor
    """float64 `[B, K, T]`; `-inf` where no more than k have entered."""
    num_free: Tensor
    """int64 `[B, K, T]`: candidates with 0 < p < 1."""
    full: Tensor
    """int64 `[B, K, N]`: rows in which a candidate has p = 1."""
    free: Tensor
    """int64 `[B, K, N]`: rows in which it has 0 < p < 1."""
    chosen: Tensor
    """int64 `[B, K, N]`: rows in which it is among the k largest."""
    held: Tensor
    """int64 `[B, K, blocks, k]`: the k largest candidates before each block of C rows, the largest first."""


def capped_simplex(scores: Tensor, total: float) -> Tensor:
    """`SPARSEK(scores, total)` over the last dimension, `[..., n]`; all ones where there are no more than `total`.

    Differentiable by the definition: with F the scores of 0 < p < 1, `dp/dz = diag(1_F) - 1_F 1_F^T / |F|`.

    Args:
        scores: float32 or float64; `-inf` for none, which gets 0.
        total: k, at least 1.
    """
    if not scores.shape[-1]:
        return scores
    ordered = scores.detach().sort(dim=-1, descending=True).values
    tau = _thresholds(ordered, (ordered > NONE)[..., None, :], total)[0]
    shifted = torch.where(scores == NONE, 0.0, scores.detach() - tau)
    free = (shifted > 0) & (shifted < 1)
    # the same number, with the gradient of its definition
    mean = torch.where(free, scores, 0.0).sum(-1, keepdim=True) / free.sum(-1, keepdim=True).clamp(min=1)
    tau = tau + (mean - mean.detach())
    # not `clamp`, whose gradient passes at its ends
    return torch.where(free, scores - tau, (shifted >= 1).to(scores.dtype))


def prefix_thresholds(entering: Tensor, before: Tensor, segments: Tensor | None, total: int, block: int) -> Prefixes:
    """The thresholds of all prefixes, in time and memory linear in T.

    Args:
        entering: float64 `[B, K, T]`, the score that enters with each row; `-inf` for none.
        before: float64 `[B, K, M]`, candidates from before, falling; they belong to segment 0.
        segments: int64 `[B, T]`, rising: a row has the candidates of its own segment alone; None: all are 0.
        total: k, at least 1 and at most M.
        block: C.
    """
    batch, heads, num_rows = entering.shape
    most = before.shape[-1]
    # a last block of fewer rows is filled up with rows in which nothing enters
    missing = -num_rows % block
    if missing:
        entering = F.pad(entering, (0, missing), value=NONE)
        segments = None if segments is None else torch.cat((segments, segments[:, -1:].expand(-1, missing)), dim=1)
    order, falling = _sorted_blocks(entering, before, segments, block)
    shape = batch, heads, most + entering.shape[-1]
    full, free, chosen = (order.new_zeros(shape) for _ in range(3))
    num_free = torch.empty_like(entering, dtype=torch.int64)
    found = Prefixes(torch.empty_like(entering), num_free, full, free, chosen, order[..., :0])
    step = max(1, ELEMENTS // (batch * heads * block * order.shape[-1]))
    for begin in range(0, order.shape[2], step):
        some = slice(begin, begin + step)
        _fill(found, order[:, :, some], falling[:, :, some], begin * block, segments, total, most, num_rows)
    # what was largest before a block: its first k of those that did not enter with it
    inside = order >= most + block * torch.arange(order.shape[2], device=order.device)[:, None]
    held = order.gather(-1, inside.to(torch.int8).sort(dim=-1, stable=True).indices[..., :total])
    columns = most + num_rows
    return Prefixes(
        found.tau[..., :num_rows], found.num_free[..., :num_rows], found.full[..., :columns],
        found.free[..., :columns], found.chosen[..., :columns], held,
    )  # fmt: skip


def _sorted_blocks(entering: Tensor, before: Tensor, segments: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
    """Candidates that any row of a block may have, by falling score and then by age, and their scores.

    `[B, K, blocks, M + C]` both: int64 indices, float64. Of those that no row may have the score is `-inf`.
    """
    most, device = before.shape[-1], before.device
    scores, index = before, torch.arange(most, device=device).expand(before.shape)
    orders, falling = [], []
    for begin in range(0, entering.shape[-1], block):
        rows = torch.arange(begin, begin + block, device=device)
        index = torch.cat((index, (most + rows).expand(*index.shape[:2], -1)), dim=-1)
        scores, place = torch.cat((scores, entering[..., rows]), dim=-1).sort(dim=-1, descending=True, stable=True)
        index = index.gather(-1, place)
        orders.append(index)
        falling.append(scores)
        if segments is not None:
            # what belongs to a document that has ended is not handed on
            own = torch.cat((segments.new_zeros(len(segments), most), segments), dim=1)[:, None].expand(
                -1, index.shape[1], -1
            )
            alive = own.gather(-1, index) == segments[:, begin + block - 1, None, None]
            scores, place = scores.masked_fill(~alive, NONE).sort(dim=-1, descending=True, stable=True)
            index = index.gather(-1, place)
        scores, index = scores[..., :most], index[..., :most]
    return torch.stack(orders, dim=2), torch.stack(falling, dim=2)


def _fill(
    found: Prefixes,
    order: Tensor,
    falling: Tensor,
    first_row: int,
    segments: Tensor | None,
    total: int,
    most: int,
    num_rows: int,
) -> None:
    """Find what some blocks `[B, K, g, M + C]` have to say, in tables `[B, K, g, C, M + C]`."""
    blocks, block = order.shape[2], order.shape[3] - most
    rows = torch.arange(first_row, first_row + blocks * block, device=order.device).view(blocks, block, 1)
    entered = (order[..., None, :] - most <= rows) & (falling > NONE)[..., None, :] & (rows < num_rows)
    if segments is not None:
        own = torch.cat((segments.new_zeros(len(segments), most), segments), dim=1)
        of_candidates = own[:, None].expand(-1, order.shape[1], -1).gather(-1, order.flatten(2)).view(order.shape)
        of_rows = segments[:, first_row : first_row + blocks * block].reshape(-1, 1, blocks, block, 1)
        entered &= of_candidates[..., None, :] == of_rows
    rank = entered.cumsum(-1, dtype=torch.int32)
    chosen, counted = entered & (rank <= total), entered & (rank <= most)
    tau, _ = _thresholds(falling, counted, total)
    shifted = falling[..., None, :] - tau[..., None]
    full, free = counted & (shifted >= 1), counted & (shifted > 0) & (shifted < 1)
    span = slice(first_row, first_row + blocks * block)
    found.tau[..., span], found.num_free[..., span] = tau.flatten(2), free.sum(-1).flatten(2)
    for into, where in ((found.full, full), (found.free, free), (found.chosen, chosen)):
        into.scatter_add_(-1, order.flatten(2), where.sum(-2).flatten(2))


def _thresholds(falling: Tensor, counted: Tensor, total: float) -> tuple[Tensor, Tensor]:
    """The largest tau `[..., R]` with `sum clip(z - tau, 0, 1) >= total` of each row's own part of falling scores.

    f(t) = sum clip(z - t, 0, 1) falls piecewise linearly between corners at all z and all z - 1. The last corner with
    f >= k begins the piece that holds tau; it is searched by halves.

    Args:
        falling: `[..., n]`; `-inf` at the end for none.
        counted: bool `[..., R, n]`: which of them a row has.

    Returns:
        tau, `-inf` where a row has no more than `total`, and how many each row has.
    """
    numbers = falling.masked_fill(falling == NONE, 0.0)[..., None, :]
    count = F.pad(counted.cumsum(-1, dtype=falling.dtype), (1, 0))
    sums = F.pad((numbers * counted).cumsum(-1), (1, 0))
    corners, kind = torch.cat((falling, falling - 1), dim=-1).sort(dim=-1)
    # a score's corner at z - 1 makes it free, the one at z makes it 0: how many have not come to theirs yet, which are
    # the first in the falling order. Comparing z with t + 1 instead would be wrong by rounding.
    at_end = kind < falling.shape[-1]
    above = falling.shape[-1] - at_end.cumsum(-1)
    full = falling.shape[-1] - (~at_end).cumsum(-1)
    shape = counted.shape[:-1]

    def value_at(place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The corner there `[..., R]`, f, and how many scores f falls with right of it."""
        at = corners.gather(-1, place)
        beyond, whole = above.gather(-1, place)[..., None], full.gather(-1, place)[..., None]
        num_beyond, num_whole = count.gather(-1, beyond).squeeze(-1), count.gather(-1, whole).squeeze(-1)
        sum_beyond, sum_whole = sums.gather(-1, beyond).squeeze(-1), sums.gather(-1, whole).squeeze(-1)
        finite = at.masked_fill(at == NONE, 0.0)
        reached = (sum_beyond - finite * num_beyond) - (sum_whole - (finite + 1) * num_whole)
        return at, reached.masked_fill(at == NONE, -NONE), num_beyond - num_whole

    low = torch.zeros(shape, dtype=torch.int64, device=falling.device)
    high = torch.full_like(low, corners.shape[-1])
    for _ in range(corners.shape[-1].bit_length()):
        middle = (low + high) // 2
        reaches = value_at(middle.clamp(max=corners.shape[-1] - 1))[1] >= total
        reaches &= middle < high
        low, high = torch.where(reaches, middle, low), torch.where(reaches, high, middle)
    at, reached, inside = value_at(low)
    tau = at + torch.where(inside > 0, (reached - total) / inside.clamp(min=1), 0.0)
    num_counted = count[..., -1]
    return tau.masked_fill(num_counted <= total, NONE), num_counted
