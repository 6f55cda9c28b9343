"""How the blocked backward sums the gradients of keys and values, which neighbouring tiles share.

Apart: tiles that share no key, or one tile alone, add their transposed product to the keys directly.

Skewed: neighbouring tiles share all but one block of keys. Their weights are laid out with one block of elements
between tiles, so that a block of keys finds its own columns in the tiles that see it at one constant stride: with L
columns a row, tile i + t holds them one block further to the left, and the gap makes up for exactly that. One strided
view is then the whole transposed matrix of every key block, and one product per batch sums over all its queries.

        tile 0   . . a b c        the columns c of tile 0, b of tile 1 and a of tile 2 belong to one key block;
        tile 1   . . a b c        zero tiles before and after the batch complete the blocks at its ends
        tile 2   . . a b c
"""

import torch
from torch import Tensor

from swat_lm.ops.tile_batches import KeyGroup, Scratch, TileBatch, TilesOfHead


class KeySums:
    """The gradient of keys or values: summed head-major for one group at a time, then written to `total` once.

    A batched product needs a contiguous result, and a reused one is still in the caches when it is copied out.
    """

    def __init__(self, total: Tensor, name: str, scratch: Scratch) -> None:
        """`total` `[B, S, K, D]`, uninitialised: every key of it is written by the groups of `key_groups`."""
        self.total, self.name, self.scratch = total, name, scratch

    def begin(self, group: KeyGroup) -> None:
        """Start the sums of a group."""
        self.group, heads = group, group.kv_heads.stop - group.kv_heads.start
        self.part = self.scratch.take(self.name, heads, group.end - group.begin, self.total.shape[-1])
        self.is_empty = group.covers
        if not group.covers:
            self.part.zero_()

    def add(self, run: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
        """Add `scale * left @ right` to a contiguous view of `part`."""
        torch.baddbmm(run, left, right, beta=0 if self.is_empty else 1, alpha=scale, out=run)
        self.is_empty = False

    def end(self) -> None:
        """Write the sums out: added where earlier groups have written, and zeros where nobody looks."""
        group = self.group
        total = self.total[group.sequence, :, group.kv_heads].transpose(0, 1)
        total[:, group.known : group.begin].zero_()
        shared = max(0, min(group.known, group.end) - group.begin)
        total[:, group.begin : group.begin + shared].add_(self.part[:, :shared])
        total[:, group.begin + shared : group.end].copy_(self.part[:, shared:])


class ApartTiles:
    """Weights and rows of a batch whose tiles share no key."""

    def __init__(self, batch: TileBatch, scratch: Scratch) -> None:
        self.batch, self.scratch = batch, scratch

    def weights(self, shape: torch.Size) -> Tensor:
        """Uninitialised `[N, rows, keys]` for the weights, later for their gradient."""
        return self.scratch.take("weights", *shape)

    def rows(self, x: Tensor, name: str) -> Tensor:
        """`[B, T, H, D]` -> `[N, rows, D]`."""
        return self.batch.rows(x)

    def add(self, sums: KeySums, weights: Tensor, rows: Tensor, scale: float) -> None:
        """Add `scale * weights^T rows`."""
        run = self.batch.key_sums(sums.part, sums.group.kv_heads, sums.group.begin)
        left = weights.transpose(1, 2)
        if run.is_contiguous():
            sums.add(run, left, rows, scale)
        else:
            # a batched product into a strided result would fall back to one product per tile
            run.add_(torch.bmm(left, rows, out=self.scratch.take("part", *run.shape)), alpha=scale)


class SkewedTiles:
    """Weights and rows of a batch of neighbouring inner tiles, laid out so that key blocks have one stride."""

    def __init__(self, batch: TilesOfHead, scratch: Scratch) -> None:
        tiles = batch.tiles
        self.batch, self.scratch = batch, scratch
        self.count, self.block, self.width = tiles.count, tiles.rows, tiles.keys
        self.blocks_back = tiles.keys // tiles.rows - 1
        self.tile = self.block * self.width + self.block

    def weights(self, shape: torch.Size) -> Tensor:
        """Uninitialised `[N, rows, keys]` between zero tiles."""
        padding, inner = self.blocks_back * self.tile, self.count * self.tile
        self.flat = self.scratch.take("weights", inner + 2 * padding)
        self.flat[:padding].zero_()
        self.flat[padding + inner :].zero_()
        return self.flat[padding:].as_strided(shape, (self.tile, self.width, 1))

    def rows(self, x: Tensor, name: str) -> Tensor:
        """`[B, T, H, D]` -> `[N, rows, D]`, copied between zero rows."""
        padded = self.scratch.take(name, self.count + 2 * self.blocks_back, self.block, x.shape[-1])
        padded[: self.blocks_back].zero_()
        padded[self.blocks_back + self.count :].zero_()
        return padded[self.blocks_back : self.blocks_back + self.count].copy_(self.batch.rows(x))

    def add(self, sums: KeySums, weights: Tensor, rows: Tensor, scale: float) -> None:
        """Add `scale * weights^T rows`."""
        blocks, seen_by, head_dim = self.count + self.blocks_back, self.blocks_back + 1, rows.shape[-1]
        left = self.flat.as_strided(
            (blocks, self.block, seen_by * self.block),
            (self.tile, 1, self.width),
            self.flat.storage_offset() + self.blocks_back * self.block,
        )
        right = rows.as_strided(
            (blocks, seen_by * self.block, head_dim),
            (self.block * head_dim, head_dim, 1),
            rows.storage_offset() - self.blocks_back * self.block * head_dim,
        )
        sums.add(sums.part.view(blocks, self.block, head_dim), left, right, scale)
