"""The capped simplex, and its threshold on every prefix of a sequence of scores (SPARSEK, arXiv 2406.16747).

`SPARSEK(z, k)` is the point of `{p : 0 <= p <= 1, sum p = k}` nearest to z: `p = clip(z - tau, 0, 1)` with the tau at
which that sums to k. On a prefix, row i has the scores that have entered by then, of which the M largest count: a
stream then needs M scores and no more, and decoding is the parallel pass by definition. Derivations are in
docs/mathematics.md.

Legend: B sequences, K heads, T rows, M candidates, N = M + T all that can enter, C rows of a block.
"""

from collections.abc import Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Run:
    """Blocks that are looked at together."""

    order: Tensor
    """int64 `[B, K, g, M + C]`: candidates that any row of a block may have, by falling score."""
    falling: Tensor
    """Their scores."""
    first_row: int
    segments: Tensor | None
    """int64 `[B, T]`, of all rows."""
    total: int
    """k."""
    most: int
    """M."""
    num_rows: int
    """T, without those that fill up the last block."""

    @property
    def num_blocks(self) -> int:
        """g."""
        return self.order.shape[2]

    @property
    def block(self) -> int:
        """C."""
        return self.order.shape[3] - self.most

    @property
    def span(self) -> slice:
        """Of all rows, those of these blocks."""
        return slice(self.first_row, self.first_row + self.num_blocks * self.block)


def capped_simplex(scores: Tensor, total: float) -> Tensor:
    """`SPARSEK(scores, total)` over the last dimension, `[..., n]`; all ones where there are no more than `total`.

    Differentiable by the definition: with F the scores of 0 < p < 1, `dp/dz = diag(1_F) - 1_F 1_F^T / |F|`.

    Args:
        scores: float32 or float64; `-inf` for none, which gets 0.
        total: k, at least 1.
    """
    if not scores.shape[-1]:
        return scores
    falling = scores.detach().sort(dim=-1, descending=True).values
    tau = Merged(falling, torch.zeros_like(falling, dtype=torch.int64), 0, 1).thresholds(total)
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
    for some, of_one_document in _runs(segments, order.shape[2], block, batch * heads * block * block):
        run = Run(order[:, :, some], falling[:, :, some], some.start * block, segments, total, most, num_rows)
        (_fill_by_places if of_one_document else _fill_by_table)(found, run)
    # what was largest before a block: its first k of those that did not enter with it
    inside = order >= most + block * torch.arange(order.shape[2], device=order.device)[:, None]
    held = order.gather(-1, inside.to(torch.int8).sort(dim=-1, stable=True).indices[..., :total])
    columns = most + num_rows
    return Prefixes(
        found.tau[..., :num_rows], found.num_free[..., :num_rows], found.full[..., :columns],
        found.free[..., :columns], found.chosen[..., :columns], held,
    )  # fmt: skip


def _runs(segments: Tensor | None, num_blocks: int, block: int, elements: int) -> Iterator[tuple[slice, bool]]:
    """Blocks to be looked at together, and whether in none of them a document begins; a block has so many elements."""
    begins = [False] * num_blocks
    if segments is not None:
        changed = (segments.diff(dim=1, prepend=segments.new_zeros(len(segments), 1)) != 0).any(0)
        begins = changed.view(num_blocks, block).any(-1).tolist()
    most = max(1, ELEMENTS // max(1, elements))
    at = 0
    while at < num_blocks:
        end = at + 1
        while end < num_blocks and begins[end] == begins[at] and end - at < most:
            end += 1
        yield slice(at, end), not begins[at]
        at = end


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


def _fill_by_table(found: Prefixes, run: Run) -> None:
    """Find what some blocks have to say, in tables `[B, K, g, C, M + C]`: documents may begin."""
    order, falling, segments = run.order, run.falling, run.segments
    rows = torch.arange(run.span.start, run.span.stop, device=order.device).view(run.num_blocks, run.block, 1)
    entered = (order[..., None, :] - run.most <= rows) & (falling > NONE)[..., None, :] & (rows < run.num_rows)
    if segments is not None:
        own = torch.cat((segments.new_zeros(len(segments), run.most), segments), dim=1)
        of_candidates = own[:, None].expand(-1, order.shape[1], -1).gather(-1, order.flatten(2)).view(order.shape)
        of_rows = segments[:, run.span].reshape(-1, 1, run.num_blocks, run.block, 1)
        entered &= of_candidates[..., None, :] == of_rows
    rank = entered.cumsum(-1, dtype=torch.int32)
    chosen, counted = entered & (rank <= run.total), entered & (rank <= run.most)
    # a row's own candidates in falling order, the others behind
    own = torch.where(counted, falling[..., None, :], NONE)
    place = own.argsort(dim=-1, descending=True, stable=True)
    tau = Merged(own.gather(-1, place), torch.zeros_like(place), 0, 1).thresholds(run.total)
    full = counted & (falling[..., None, :] >= tau + 1)
    free = counted & (falling[..., None, :] > tau) & ~full
    found.tau[..., run.span], found.num_free[..., run.span] = tau.squeeze(-1).flatten(2), free.sum(-1).flatten(2)
    for into, where in ((found.full, full), (found.free, free), (found.chosen, chosen)):
        into.scatter_add_(-1, order.flatten(2), where.sum(-2).flatten(2))


def _fill_by_places(found: Prefixes, run: Run) -> None:
    """As `_fill_by_table` for blocks in which no document begins, from places in the falling order alone.

    In the order of a block the candidates that a row counts end at a place that only falls from row to row, and
    thresholds rise: so the rows of a candidate follow one another, and where they end is looked up.
    """
    order, falling, block = run.order, run.falling.contiguous(), run.block
    base = run.first_row + block * torch.arange(run.num_blocks, device=order.device)[:, None]
    # the row, of its block, with which a candidate enters
    entered = order - run.most - base
    merged = Merged(falling, entered.clamp(min=0), block, block, is_new=entered >= 0)
    ends = merged.end_of(run.most).cummin(-1).values
    # rising but for rounding
    tau = merged.thresholds(run.total, ends).cummax(-1).values
    upper = tau + 1
    rising = (-falling).contiguous()
    num_free = merged.count_at(torch.minimum(torch.searchsorted(rising, (-tau).contiguous()), ends)) - merged.count_at(
        torch.minimum(torch.searchsorted(rising, (-upper).contiguous(), right=True), ends)
    )
    found.tau[..., run.span], found.num_free[..., run.span] = tau.flatten(2), num_free.flatten(2).long()
    real_rows = (run.num_rows - base).clamp(max=block)
    place = torch.arange(falling.shape[-1], device=order.device).expand(falling.shape)
    begin = entered.clamp(min=0)

    def rows_until(end: Tensor) -> Tensor:
        """Rows from the one a candidate enters with to before this one."""
        return (torch.minimum(end, real_rows) - begin).clamp(min=0).masked_fill_(falling == NONE, 0)

    def rows_with(ends: Tensor) -> Tensor:
        """How many first rows count a place."""
        return torch.searchsorted((-ends).contiguous(), (-place).contiguous())

    counted = rows_with(ends)
    full = rows_until(torch.minimum(torch.searchsorted(upper.contiguous(), falling, right=True), counted))
    free = rows_until(torch.minimum(torch.searchsorted(tau.contiguous(), falling), counted)) - full
    chosen = rows_until(rows_with(merged.end_of(run.total).cummin(-1).values))
    for into, number in ((found.full, full), (found.free, free), (found.chosen, chosen)):
        into.scatter_add_(-1, order.flatten(2), number.flatten(2))


def running_sums(counted: Tensor, numbers: Tensor) -> Tensor:
    """How many of the first are counted, and their numbers' sum, from none to all: complex `[..., n + 1]`, n + sum i.

    As one number, one look into the table finds both.
    """
    found = numbers.new_zeros(*counted.shape[:-1], counted.shape[-1] + 1, 2)
    torch.cumsum(counted, dim=-1, out=found[..., 1:, 0])
    torch.cumsum(counted * numbers, dim=-1, out=found[..., 1:, 1])
    return torch.view_as_complex(found)


class Merged:
    """Scores in falling order `[..., n]`, of which some enter row by row: sums over a row's own up to any place.

    Legend: R rows, C of the n enter.
    """

    def __init__(
        self, falling: Tensor, entered: Tensor, num_new: int, num_rows: int, is_new: Tensor | None = None
    ) -> None:
        """`entered` `[..., n]` is the row with which those enter that `is_new`, of which there are `num_new`."""
        self.falling = falling
        real = falling > NONE
        numbers = torch.where(real, falling, 0.0)
        always = real if is_new is None else real & ~is_new
        self.always = running_sums(always.to(falling.dtype), numbers)
        self.shape = (*falling.shape[:-1], num_rows)
        self.new = None
        if is_new is None:
            return
        self.num_before = F.pad(is_new.cumsum(-1), (1, 0))
        # the new ones in falling order, and which of them each row has
        place = (~is_new).to(torch.int8).sort(dim=-1, stable=True).indices[..., :num_new]
        rows = torch.arange(num_rows, device=falling.device)[:, None]
        # after all rows where there is none
        since = entered.gather(-1, place).masked_fill_(~real.gather(-1, place), num_rows)
        has = (since[..., None, :] <= rows).to(falling.dtype)
        self.new = running_sums(has, numbers.gather(-1, place)[..., None, :])

    def count_at(self, place: Tensor) -> Tensor:
        """How many of its own each row has before these places `[..., R]`."""
        return self._at(place, self.always.real, None if self.new is None else self.new.real)

    def sums_at(self, place: Tensor) -> Tensor:
        """How many, and their sum, as one complex number."""
        return self._at(place, self.always, self.new)

    def _at(self, place: Tensor, always: Tensor, new: Tensor | None) -> Tensor:
        found = always.gather(-1, place)
        if new is None:
            return found
        return found + new.gather(-1, self.num_before.gather(-1, place)[..., None]).squeeze(-1)

    def end_of(self, number: int) -> Tensor:
        """The first place before which a row has so many of its own, `[..., R]`; n where it has fewer."""
        length = self.falling.shape[-1]
        low = torch.zeros(self.shape, dtype=torch.int64, device=self.falling.device)
        high = torch.full_like(low, length)
        for _ in range(length.bit_length()):
            middle = (low + high) // 2
            enough = (self.count_at(middle) >= number) | (low >= high)
            low, high = torch.where(enough, low, middle + 1), torch.where(enough, torch.minimum(middle, high), high)
        return high

    def thresholds(self, total: float, ends: Tensor | None = None) -> Tensor:
        """The largest tau `[..., R]` at which `sum clip(z - tau, 0, 1)` of a row's own before `ends` reaches the total.

        `-inf` where a row has no more than that. f(t) = sum clip(z - t, 0, 1) falls piecewise linearly between corners
        at all z and all z - 1. The last corner with f >= k begins the piece that holds tau; it is searched by halves.
        """
        falling, length = self.falling, self.falling.shape[-1]
        corners, at_end = _corners(falling)
        # a score's corner at z - 1 makes it free, the one at z makes it 0: how many have not come to theirs yet, which
        # are the first in the falling order. Comparing z with t + 1 instead would be wrong by rounding.
        above = length - at_end.cumsum(-1)
        if ends is None:
            ends = torch.full(self.shape, length, device=falling.device)

        def value_at(place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """The corner there `[..., R]`, f, and how many scores f falls with right of it."""
            at, beyond = corners.gather(-1, place), above.gather(-1, place)
            # corners of both kinds up to there are one more than the place
            whole = (2 * length - 1) - place - beyond
            beyond, whole = (self.sums_at(torch.minimum(x, ends)) for x in (beyond, whole))
            finite = at.masked_fill(at == NONE, 0.0)
            reached = beyond.imag - finite * beyond.real - (whole.imag - (finite + 1) * whole.real)
            return at, reached.masked_fill(at == NONE, -NONE), beyond.real - whole.real

        low = torch.zeros(self.shape, dtype=torch.int64, device=falling.device)
        high = torch.full_like(low, 2 * length)
        for _ in range((2 * length).bit_length()):
            middle = (low + high) // 2
            reaches = (value_at(middle.clamp(max=2 * length - 1))[1] >= total) & (middle < high)
            low, high = torch.where(reaches, middle, low), torch.where(reaches, high, middle)
        at, reached, inside = value_at(low)
        tau = at + torch.where(inside > 0, (reached - total) / inside.clamp(min=1), 0.0)
        return tau.masked_fill(self.count_at(ends) <= total, NONE)


def _corners(falling: Tensor) -> tuple[Tensor, Tensor]:
    """All z and all z - 1 of falling scores `[..., n]`, rising `[..., 2n]`, and which of them are a z.

    Both are in order, so they are merged, which takes half the time of sorting them.
    """
    ends = falling.flip(-1).contiguous()
    begins = ends - 1
    own = torch.arange(ends.shape[-1], device=ends.device)
    corners = torch.cat((ends, begins), dim=-1)
    at_end = torch.zeros_like(corners, dtype=torch.bool)
    place = own + torch.searchsorted(begins, ends)
    at_end.scatter_(-1, place, True)
    corners.scatter_(-1, place, ends)
    corners.scatter_(-1, own + torch.searchsorted(ends, begins, right=True), begins)
    return corners, at_end
