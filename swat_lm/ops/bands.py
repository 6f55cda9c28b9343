"""Geometry of the blocked backend: cuts the band of visible pairs into tiles of query rows by key columns.

Where `last_visible` is the default, the inner tiles of a sequence all have one shape and one table of distances, so
many of them form one batched product. First and last tiles, and rows with a `last_visible` of their own, stand alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# elements of one batch of scores: what stays, beside its operands, in the second-level caches of a few cores
TILE_BUDGET = 192 * 1024


@dataclass(frozen=True)
class Tiles:
    """`count` tiles of one sequence, `rows x keys` each; tile i starts `i * rows` after the first row and key."""

    sequence: int
    row: int
    key: int
    count: int
    rows: int
    keys: int
    # shared by all tiles of the batch: [rows, keys], and where it is a cut of the common table, its first column there
    distance: Tensor
    column: int | None
    # pairs of an own table that the band does not contain [rows, keys]; None for a cut of the common table
    outside: Tensor | None
    # pairs that first_visible hides on top of the band [count, rows, keys]; None where it hides nothing
    hidden: Tensor | None


@dataclass(frozen=True)
class Band:
    """One call's shape: the window brought to 1 .. S, and the rows of a tile."""

    batch: int
    num_queries: int
    num_keys: int
    window: int
    rows: int
    device: torch.device

    @classmethod
    def of(cls, batch: int, num_queries: int, num_keys: int, window: int | None, device: torch.device) -> "Band":
        """Clamp the window to the keys there are (None is all of them) and choose the rows of a tile."""
        window = max(num_keys, 1) if window is None else min(window, max(num_keys, 1))
        # few rows waste less of the band's two edges, many feed the matrix product better
        rows = 32 if window <= 160 else 64
        return cls(batch, num_queries, num_keys, window, max(1, min(rows, num_queries)), device)

    @property
    def width(self) -> int:
        """Columns of an inner tile."""
        return self.rows + self.window - 1

    def common_distance(self) -> Tensor:
        """Return the distance of row i to column j of an inner tile, int64 `[rows, width]`."""
        row = torch.arange(self.rows, device=self.device)[:, None]
        return row + self.window - 1 - torch.arange(self.width, device=self.device)

    def contains(self, distance: Tensor) -> Tensor:
        """Return where a distance lies inside the causal window."""
        return (distance >= 0) & (distance < self.window)

    def cut(self, first_visible: Tensor | None, last_visible: Tensor | None) -> Iterator[Tiles]:
        """Yield tiles that hold every visible pair of every row exactly once, sequence by sequence."""
        for sequence in range(self.batch):
            first = None if first_visible is None else first_visible[sequence]
            if last_visible is None:
                yield from self._cut_regular(sequence, first)
            else:
                yield from self._cut_ragged(sequence, first, last_visible[sequence].long())

    def _cut_regular(self, sequence: int, first: Tensor | None) -> Iterator[Tiles]:
        rows, offset = self.rows, self.num_keys - self.num_queries
        common = self.common_distance()
        full_blocks = self.num_queries // rows
        # the first block whose whole tile lies inside the sequence
        first_inner = min(-(-max(self.window - 1 - offset, 0) // rows), full_blocks)
        per_batch = max(1, TILE_BUDGET // (rows * self.width))
        spans = [(block * rows, 1, rows) for block in range(first_inner)]
        spans += [
            (block * rows, min(per_batch, full_blocks - block), rows)
            for block in range(first_inner, full_blocks, per_batch)
        ]
        if self.num_queries % rows:
            spans.append((full_blocks * rows, 1, self.num_queries % rows))
        for row, count, num_rows in spans:
            start = row + offset - (self.window - 1)
            column = max(0, -start)
            keys = num_rows + self.window - 1 - column
            hidden = None if first is None else _hidden(first, row, start + column, count, num_rows, keys)
            distance = common[:num_rows, column : column + keys]
            yield Tiles(sequence, row, start + column, count, num_rows, keys, distance, column, None, hidden)

    def _cut_ragged(self, sequence: int, first: Tensor | None, last: Tensor) -> Iterator[Tiles]:
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
            yield Tiles(sequence, row, begin, 1, own_last.shape[0], end - begin, distance, None, outside, None)


def _hidden(first: Tensor, row: int, key: int, count: int, rows: int, keys: int) -> Tensor | None:
    first = first[row : row + count * rows].view(count, rows, 1)
    begin = key + rows * torch.arange(count, device=first.device, dtype=first.dtype).view(count, 1, 1)
    # first_visible never decreases, so the last row of a tile tells whether any of its rows hides a key
    if not bool((first[:, -1:] > begin).any()):
        return None
    return begin + torch.arange(keys, device=first.device, dtype=first.dtype) < first
