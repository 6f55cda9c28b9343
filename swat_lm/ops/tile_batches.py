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
        return self._tiled(x[self.tiles.sequence, self.tiles.row :, self.head], self.tiles.rows)

    def keys(self, x: Tensor) -> Tensor:
        """`[B, S, K, D]` -> `[N, keys, D]`; neighbouring tiles may overlap, so this one is for reading only."""
        return self._tiled(x[self.tiles.sequence, self.tiles.key :, self.kv_head], self.tiles.keys)

    def key_gradient(self, x: Tensor) -> Tensor:
        """`[B, K, S, D]` -> `[N, keys, D]`, for tiles that share no key."""
        return self._tiled(x[self.tiles.sequence, self.kv_head, self.tiles.key :], self.tiles.keys)

    def _tiled(self, x: Tensor, length: int) -> Tensor:
        stride = x.stride(0)
        return x.as_strided((self.tiles.count, length, *x.shape[1:]), (self.tiles.step * stride, *x.stride()))

    def add_per_head(self, d_scores: Tensor, d_bias: HeadBias) -> None:
        """Add this head's sums of dS * distance and of dS to `[H]` each."""
        total = d_scores.sum(0, dtype=d_bias.slopes.dtype)
        d_bias.constant[self.head] += total.sum()
        d_bias.slopes[self.head] += (total * self.tiles.distance).sum()


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

    def key_gradient(self, x: Tensor) -> Tensor:
        """`[B, K, S, D]` -> `[N, keys, D]`."""
        t = self.tiles
        return x[t.sequence, :, t.key : t.key + t.keys]

    def add_per_head(self, d_scores: Tensor, d_bias: HeadBias) -> None:
        """Add these heads' sums of dS * distance and of dS to `[H]` each."""
        total = d_scores.to(d_bias.slopes.dtype)
        d_bias.constant[self.heads] += total.sum((1, 2))
        d_bias.slopes[self.heads] += (total * self.tiles.distance).sum((1, 2))


TileBatch = TilesOfHead | HeadsOfTile


def tile_batches(
    band: Band,
    bias: HeadBias,
    batch_size: int,
    num_kv_heads: int,
    first_visible: Tensor | None,
    last_visible: Tensor | None,
    disjoint: bool = False,
) -> Iterator[TileBatch]:
    """Yield every batch of tiles with its bias (-inf outside the band), tiles outside and heads inside.

    In that order one pass over query, key and value touches each of their cache lines while it is still near.
    """
    num_heads = bias.slopes.shape[0]
    group_size = num_heads // num_kv_heads
    common: Tensor | None = None
    if last_visible is None and num_heads * band.rows * band.width <= COMMON_TABLE_LIMIT:
        common = _masked(bias, band.common_distance(), band)
    for sequence in range(batch_size):
        first = None if first_visible is None else first_visible[sequence]
        last = None if last_visible is None else last_visible[sequence]
        for tiles in band.cut(sequence, first, last, disjoint):
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

    def take(self, name: str, *shape: int) -> Tensor:
        """Return an uninitialised contiguous tensor of this shape; what the name held before is lost."""
        size = torch.Size(shape).numel()
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[name] = self._like.new_empty(size)
        return buffer[:size].view(shape)
