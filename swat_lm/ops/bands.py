"""Geometry of the blocked backend: cuts the band of visible pairs into tiles of query rows by key columns.

Where `last_visible` is the default, the inner tiles of a sequence all have one shape and one table of distances, so
many of them form one batched product. First and last tiles, and rows with a `last_visible` of their own, stand alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# elements of one batch of scores: small enough for caches, large enough for few calls (docs/experiments.md)
TILE_BUDGET = 768 * 1024


@dataclass(frozen=True)
class Tiles:
    """`count` tiles of one sequence, `rows x keys` each; tile i starts `i * step` after the first row and key."""

    sequence: int
    row: int
    key: int
    count: int
    step: int
    rows: int
    keys: int
    # shared by all tiles of the batch: [rows, keys], and where it is a cut of the common table, its first column there
    distance: Tensor
    column: int | None
    # pairs of an own table that the band does not contain [rows, keys]; None for a cut of the common table
    outside: Tensor | None
    # pairs that first_visible hides on top of the band [count, rows, keys]; None where it hides nothing
    hidden: Tensor | None


class Span(NamedTuple):
    """Batches of tiles whose keys lie in `begin .. end - 1`, made as they are asked for."""

    begin: int
    end: int
    num_batches: int
    fewest: int
    """Tiles of its smallest batch."""
    batches: Iterator[Tiles]


@dataclass(frozen=True)
class Band:
    """One call's shape: the window brought to 1 .. S, the rows of a tile, and whole tiles of columns before its own."""

    num_queries: int
    num_keys: int
    window: int
    rows: int
    device: torch.device

    @classmethod
    def of(cls, num_queries: int, num_keys: int, window: int | None, device: torch.device) -> "Band":
        """Clamp the window to the keys there are (None is all of them) and choose the rows of a tile."""
        window = max(num_keys, 1) if window is None else min(window, max(num_keys, 1))
        # few rows waste less of the band's two edges, many feed the matrix product better
        rows = 32 if window <= 160 else 64
        return cls(num_queries, num_keys, window, max(1, min(rows, num_queries)), device)

    @property
    def blocks_back(self) -> int:
        """Blocks of `rows` keys before a tile's own block that its rows may see."""
        return -(-(self.window - 1) // self.rows)

    @property
    def width(self) -> int:
        """Columns of an inner tile, whole blocks of `rows`."""
        return (self.blocks_back + 1) * self.rows

    @property
    def tiles_per_batch(self) -> int:
        """Inner tiles whose scores are held at once."""
        return max(1, TILE_BUDGET // (self.rows * self.width))

    @property
    def is_narrow(self) -> bool:
        """Whether a batch holds many more tiles than a key block is seen by."""
        return 3 * self.blocks_back <= self.tiles_per_batch

    def common_distance(self) -> Tensor:
        """Return the distance of row i to column j of an inner tile, int64 `[rows, width]`."""
        row = torch.arange(self.rows, device=self.device)[:, None]
        return row + self.width - self.rows - torch.arange(self.width, device=self.device)

    def contains(self, distance: Tensor) -> Tensor:
        """Return where a distance lies inside the causal window."""
        return (distance >= 0) & (distance < self.window)

    def cut(self, sequence: int, first: Tensor | None, last: Tensor | None, disjoint: bool) -> Iterator["Span"]:
        """Yield tiles that hold every visible pair of a sequence exactly once, by the keys they share.

        Args:
            sequence: its index in the batch.
            first, last: int32 `[T]`, this sequence's visibility; None is the default.
            disjoint: batch tiles that lie so far apart that no two of them share a key; a span is then several batches.
        """
        if last is None:
            yield from self._cut_regular(sequence, first, disjoint)
        else:
            yield from self._cut_ragged(sequence, first, last.long())

    def _cut_regular(self, sequence: int, first: Tensor | None, disjoint: bool) -> Iterator["Span"]:
        offset, common = self.num_keys - self.num_queries, self.common_distance()
        for runs in self._runs(disjoint):
            block, last_block = runs[0][0], max(block + (count - 1) * stride for block, count, stride in runs)
            begin = max(0, (block - self.blocks_back) * self.rows + offset)
            end = min((last_block + 1) * self.rows, self.num_queries) + offset
            fewest = min(count for _, count, _ in runs)
            yield Span(begin, end, len(runs), fewest, self._tiles(sequence, first, common, runs))

    def _tiles(
        self, sequence: int, first: Tensor | None, common: Tensor, runs: list[tuple[int, int, int]]
    ) -> Iterator[Tiles]:
        rows, offset = self.rows, self.num_keys - self.num_queries
        for block, count, stride in runs:
            row = block * rows
            num_rows = min(rows, self.num_queries - row)
            start = row + offset - self.blocks_back * rows
            column = max(0, -start)
            keys = self.width - rows + num_rows - column
            step = stride * rows
            hidden = None if first is None else _hidden(first, row, start + column, count, step, num_rows, keys)
            distance = common[:num_rows, column : column + keys]
            yield Tiles(
                sequence, row, start + column, count, step, num_rows, keys, distance, column, None, hidden
            )  # fmt: skip

    def _runs(self, disjoint: bool) -> Iterator[list[tuple[int, int, int]]]:
        """Yield by spans `(first block, count, blocks from one tile to the next)` over the blocks of rows."""
        full = self.num_queries // self.rows
        # the first block whose whole tile lies inside the sequence
        inner = -(-(self.blocks_back * self.rows - (self.num_keys - self.num_queries)) // self.rows)
        inner = min(max(inner, 0), full)
        stride = self.blocks_back + 1 if disjoint else 1
        if full - inner <= self.blocks_back:
            # too few to be worth a batch
            inner = full
        yield from ([(block, 1, 1)] for block in range(inner))
        span = self.tiles_per_batch * stride
        for begin in range(inner, full, span):
            end = min(begin + span, full)
            phases = range(begin, min(begin + stride, end))
            yield [(phase, -(-(end - phase) // stride), stride) for phase in phases]
        if self.num_queries % self.rows:
            yield [(full, 1, 1)]

    def _cut_ragged(self, sequence: int, first: Tensor | None, last: Tensor) -> Iterator["Span"]:
        lowest = (last - (self.window - 1)).clamp_min(0)
        if first is not None:
            lowest = torch.maximum(lowest, first.long())
        for row in range(0, self.num_queries, self.rows):
            own_last, own_first = last[row : row + self.rows], lowest[row : row + self.rows]
            begin = min(int(own_first[0]), self.num_keys)
            end = max(min(int(own_last[-1]) + 1, self.num_keys), begin)
            index = torch.arange(begin, end, device=last.device)
            distance = own_last[:, None] - index
            outside = (distance < 0) | (index < own_first[:, None])
            tiles = Tiles(sequence, row, begin, 1, 0, own_last.shape[0], end - begin, distance, None, outside, None)
            yield Span(begin, end, 1, 1, iter([tiles]))


def _hidden(first: Tensor, row: int, key: int, count: int, step: int, rows: int, keys: int) -> Tensor | None:
    first = first[row:].as_strided((count, rows, 1), (step * first.stride(0), first.stride(0), 1))
    begin = key + step * torch.arange(count, device=first.device, dtype=first.dtype).view(count, 1, 1)
    # first_visible never decreases, so the last row of a tile tells whether any of its rows hides a key
    if not bool((first[:, -1:] > begin).any()):
        return None
    return begin + torch.arange(keys, device=first.device, dtype=first.dtype) < first
