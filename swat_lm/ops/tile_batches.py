"""Views that make one batched product of tiles: many tiles of one head, or one tile of many heads.

Both kinds answer the same questions: which rows, which keys, where key gradients go. They are views, never copies.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from swat_lm.ops.bands import Band, Tiles
from swat_lm.ops.head_bias import HeadBias

# a table of biases for all heads larger than this is made tile by tile instead of once (full attention over long rows)
COMMON_TABLE_LIMIT = 2**22


class TilesOfHead:
    """All tiles of one query head as one batch, N = tiles.count."""

    def __init__(self, tiles: Tiles, head: int, group_size: int, bias: Tensor) -> None:
        self.tiles, self.head, self.kv_head = tiles, head, head // group_size
        self.bias = bias[head]

    def rows(self, x: Tensor) -> Tensor:
        """`[B, T, H, ...]` -> `[N, rows, ...]`."""
        t = self.tiles
        return x[t.sequence, t.row : t.row + t.count * t.rows, self.head].unflatten(0, (t.count, t.rows))

    def keys(self, x: Tensor) -> Tensor:
        """`[B, S, K, D]` -> `[N, keys, D]`; neighbouring tiles overlap, so this one is for reading only."""
        return self._overlapping(x[self.tiles.sequence, self.tiles.key :, self.kv_head], self.tiles.keys)

    def key_runs(self, x: Tensor) -> Iterator[tuple[Tensor, slice]]:
        """`[B, K, S, D]` -> `[N, run, D]` in which no two tiles overlap, each with its columns of the tile."""
        t = self.tiles
        own = x[t.sequence, self.kv_head]
        # the odd run comes first, so that all others are whole tiles of a contiguous stretch
        for start in range(t.keys % t.rows - t.rows if t.keys % t.rows else 0, t.keys, t.rows):
            columns = slice(max(start, 0), start + t.rows)
            yield self._overlapping(own[t.key + columns.start :], columns.stop - columns.start), columns

    def _overlapping(self, own: Tensor, length: int) -> Tensor:
        stride = own.stride(0)
        return own.as_strided(
            (self.tiles.count, length, own.shape[1]), (self.tiles.rows * stride, stride, own.stride(1))
        )

    def add_per_head(self, d_scores: Tensor, d_slopes: Tensor, d_constant: Tensor) -> None:
        """Add this head's sums of dS * distance and of dS to `[H]` each."""
        total = d_scores.sum(0, dtype=d_slopes.dtype)
        d_constant[self.head] += total.sum()
        d_slopes[self.head] += (total * self.tiles.distance).sum()


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

    def key_runs(self, x: Tensor) -> Iterator[tuple[Tensor, slice]]:
        """`[B, K, S, D]` -> `[N, keys, D]`."""
        t = self.tiles
        yield x[t.sequence, :, t.key : t.key + t.keys], slice(0, t.keys)

    def add_per_head(self, d_scores: Tensor, d_slopes: Tensor, d_constant: Tensor) -> None:
        """Add these heads' sums of dS * distance and of dS to `[H]` each."""
        total = d_scores.to(d_slopes.dtype)
        d_constant[self.heads] += total.sum((1, 2))
        d_slopes[self.heads] += (total * self.tiles.distance).sum((1, 2))


TileBatch = TilesOfHead | HeadsOfTile


def tile_batches(
    band: Band, bias: HeadBias, num_kv_heads: int, first_visible: Tensor | None, last_visible: Tensor | None
) -> Iterator[TileBatch]:
    """Yield every batch of tiles with its bias (-inf outside the band), tiles outside and heads inside.

    In that order one pass over query, key and value touches each of their cache lines while it is still near.
    """
    num_heads = bias.slopes.shape[0]
    group_size = num_heads // num_kv_heads
    common: Tensor | None = None
    if last_visible is None and num_heads * band.rows * band.width <= COMMON_TABLE_LIMIT:
        common = _masked(bias, band.common_distance(), band)
    for tiles in band.cut(first_visible, last_visible):
        if tiles.outside is not None:
            table = bias.at(tiles.distance).masked_fill_(tiles.outside, float("-inf"))
        elif common is None or tiles.column is None:
            table = _masked(bias, tiles.distance, band)
        else:
            table = common[:, : tiles.rows, tiles.column : tiles.column + tiles.keys]
        if tiles.count > 1:
            for head in range(num_heads):
                yield TilesOfHead(tiles, head, group_size, table)
        else:
            for member in range(group_size):
                yield HeadsOfTile(tiles, member, group_size, table)


def _masked(bias: HeadBias, distance: Tensor, band: Band) -> Tensor:
    return bias.at(distance).masked_fill_(~band.contains(distance), float("-inf"))


class Scratch:
    """Buffers of one call, reused by every tile: the first request of a name sizes it, a larger one replaces it."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: torch.Size) -> Tensor:
        """Return an uninitialised contiguous tensor of this shape; what the name held before is lost."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < shape.numel():
            buffer = self._buffers[name] = self._like.new_empty(shape.numel())
        return buffer[: shape.numel()].view(shape)
