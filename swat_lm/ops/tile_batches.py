"""Views that make one batched product of tiles: many tiles of one head, or one tile of many heads.

Both kinds answer the same questions: which rows, which keys, where key gradients go. They are views, never copies.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from swat_lm.ops.bands import Band, Tiles
from swat_lm.ops.head_bias import HeadBias

# a table of biases for all heads larger than this is made tile by tile instead of once (full attention over long rows)
COMMON_TABLE_LIMIT = 2**22


class TilesOfHead:
    """All tiles of one query head as one batch, N = tiles.count."""

    def __init__(self, tiles: Tiles, head: int, group_size: int, bias: Tensor) -> None:
        """`bias` is the head's own, `[rows, keys]`."""
        self.tiles, self.head, self.kv_head, self.bias = tiles, head, head // group_size, bias

    def rows(self, x: Tensor) -> Tensor:
        """`[B, T, H, ...]` -> `[N, rows, ...]`."""
        return self._tiled(x[self.tiles.sequence, self.tiles.row :, self.head], self.tiles.rows)

    def keys(self, x: Tensor) -> Tensor:
        """`[B, S, K, D]` -> `[N, keys, D]`; neighbouring tiles may overlap, so this one is for reading only."""
        return self._tiled(x[self.tiles.sequence, self.tiles.key :, self.kv_head], self.tiles.keys)

    def key_sums(self, x: Tensor, kv_heads: slice, begin: int) -> Tensor:
        """`[heads, keys of a group, D]` -> `[N, keys, D]`, for tiles that share no key."""
        return self._tiled(x[self.kv_head - kv_heads.start, self.tiles.key - begin :], self.tiles.keys)

    def _tiled(self, x: Tensor, length: int) -> Tensor:
        return x.as_strided((self.tiles.count, length, *x.shape[1:]), (self.tiles.step * x.stride(0), *x.stride()))

    def add_per_head(self, d_scores: Tensor, d_bias: HeadBias) -> None:
        """Add this head's sums of dS * distance and of dS to `[H]` each."""
        total = d_scores.sum(0, dtype=d_bias.slopes.dtype)
        d_bias.constant[self.head] += total.sum()
        d_bias.slopes[self.head] += (total * self.tiles.distance).sum()
        if d_bias.relative is not None:
            _add_by_distance(total[None], self.tiles.distance, d_bias.relative[self.head : self.head + 1])


class HeadsOfTile:
    """One tile of one query head per key/value head as one batch, N = K: member g of every group."""

    def __init__(self, tiles: Tiles, member: int, group_size: int, bias: Tensor) -> None:
        self.tiles = tiles
        self.heads = slice(member, None, group_size)
        self.bias = bias[self.heads]

    def rows(self, x: Tensor) -> Tensor:
        """`[B, T, H, ...]` -> `[N, rows, ...]`."""
        t = self.tiles
        return x[t.sequence, t.row : t.row + t.rows, self.heads].transpose(0, 1)

    def keys(self, x: Tensor) -> Tensor:
        """`[B, S, K, D]` -> `[N, keys, D]`."""
        t = self.tiles
        return x[t.sequence, t.key : t.key + t.keys].transpose(0, 1)

    def key_sums(self, x: Tensor, kv_heads: slice, begin: int) -> Tensor:
        """`[K, keys of a group, D]` -> `[N, keys, D]`."""
        return x[:, self.tiles.key - begin : self.tiles.key - begin + self.tiles.keys]

    def add_per_head(self, d_scores: Tensor, d_bias: HeadBias) -> None:
        """Add these heads' sums of dS * distance and of dS to `[H]` each."""
        total = d_scores.to(d_bias.slopes.dtype)
        d_bias.constant[self.heads] += total.sum((1, 2))
        d_bias.slopes[self.heads] += (total * self.tiles.distance).sum((1, 2))
        if d_bias.relative is not None:
            _add_by_distance(total, self.tiles.distance, d_bias.relative[self.heads])


def _add_by_distance(total: Tensor, distance: Tensor, sums: Tensor) -> None:
    """Add `[N, rows, keys]` to a view `[N, W]`; pairs outside the window hold zeros."""
    sums.index_add_(1, distance.clamp(0, sums.shape[1] - 1).flatten(), total.flatten(1))


TileBatch = TilesOfHead | HeadsOfTile


class KeyGroup(NamedTuple):
    """Batches that look at the same keys `begin .. end - 1` of the same key/value heads, made as they are asked for."""

    sequence: int
    kv_heads: slice
    begin: int
    end: int
    known: int
    """Keys that earlier groups of these heads have looked at are those below this one."""
    covers: bool
    """Whether the first batch looks at all of the keys, and so does any other."""
    batches: Iterable[TileBatch]


def key_groups(
    band: Band,
    bias: HeadBias,
    batch_size: int,
    num_kv_heads: int,
    first_visible: Tensor | None,
    last_visible: Tensor | None,
    disjoint: bool = False,
) -> Iterator[KeyGroup]:
    """Yield every batch of tiles with its bias (-inf outside the band).

    Tiles are outside and heads inside, so that one pass over query, key and value touches each of their cache lines
    while it is still near. A span of several batches goes over its keys again and again: there heads are outside, so
    that the keys of one and the sums of their gradients stay in the caches. Keys that nobody looks at lie between one
    group's `known` and `begin`; a group without batches ends a sequence.
    """
    group_size = bias.slopes.shape[0] // num_kv_heads
    tables = BiasTables(band, bias, last_visible is None)
    everyone = slice(0, num_kv_heads)
    for sequence in range(batch_size):
        first = None if first_visible is None else first_visible[sequence]
        last = None if last_visible is None else last_visible[sequence]
        known = 0
        for span in band.cut(sequence, first, last, disjoint):
            if span.num_batches == 1:
                tiles = next(span.batches)
                table = tables.of(tiles)
                for kv_heads in [slice(i, i + 1) for i in range(num_kv_heads)] if tiles.count > 1 else [everyone]:
                    batches = _batches(tiles, table, kv_heads, group_size)
                    yield KeyGroup(sequence, kv_heads, span.begin, span.end, known, True, batches)
            elif span.fewest > 1:
                cut = list(span.batches)
                for kv_head in range(num_kv_heads):
                    own, heads = slice(kv_head, kv_head + 1), range(kv_head * group_size, (kv_head + 1) * group_size)
                    batches = (
                        TilesOfHead(tiles, head, group_size, tables.of(tiles, slice(head, head + 1))[0])
                        for tiles in cut
                        for head in heads
                    )
                    yield KeyGroup(sequence, own, span.begin, span.end, known, False, batches)
            else:
                batches = (
                    batch for tiles in span.batches for batch in _batches(tiles, tables.of(tiles), everyone, group_size)
                )
                yield KeyGroup(sequence, everyone, span.begin, span.end, known, False, batches)
            known = max(known, span.end)
        yield KeyGroup(sequence, everyone, band.num_keys, band.num_keys, known, True, ())


class BiasTables:
    """Biases of tiles, cut from one common table where that is not too large."""

    def __init__(self, band: Band, bias: HeadBias, is_regular: bool) -> None:
        self.band, self.bias = band, bias
        is_small = bias.slopes.shape[0] * band.rows * band.width <= COMMON_TABLE_LIMIT
        self.common = self._masked(band.common_distance()) if is_regular and is_small else None

    def of(self, tiles: Tiles, heads: slice = slice(None)) -> Tensor:
        """`[heads, rows, keys]` of these query heads, -inf outside the band."""
        if self.common is not None and tiles.column is not None:
            return self.common[heads, : tiles.rows, tiles.column : tiles.column + tiles.keys]
        return self._masked(tiles.distance, heads, tiles.outside)

    def _masked(self, distance: Tensor, heads: slice = slice(None), outside: Tensor | None = None) -> Tensor:
        outside = ~self.band.contains(distance) if outside is None else outside
        return self.bias.of(heads).at(distance).masked_fill_(outside, float("-inf"))


def _batches(tiles: Tiles, table: Tensor, kv_heads: slice, group_size: int) -> Iterator[TileBatch]:
    if tiles.count > 1:
        for head in range(kv_heads.start * group_size, kv_heads.stop * group_size):
            yield TilesOfHead(tiles, head, group_size, table[head])
    else:
        for member in range(group_size):
            yield HeadsOfTile(tiles, member, group_size, table)


class Scratch:
    """Buffers of one call, reused by every tile: the first request of a name sizes it, a larger one replaces it."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """Return an uninitialised contiguous tensor of this shape; what the name held before is lost."""
        size = torch.Size(shape).numel()
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[name] = self._like.new_empty(size)
        return buffer[:size].view(shape)
