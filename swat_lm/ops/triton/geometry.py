"""Where the keys of a tile of rows begin and end, and the rows of a tile of keys; on the host and in kernels.

Rows see the keys `lower .. last`. In a regular call `last = row + S - T` and `lower = max(0, last - window + 1)` are
computed; in a ragged one (first_visible or last_visible given) both are tables `[B, T]`, non-decreasing in the row.
"""

# Triton rewrites the bodies of kernels, which a checker of Python misreads
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from swat_lm.ops.calls import AttentionCall

# a longer window is no other one, and its length must fit 32 bits
_LARGEST = 2**30


class Rows(NamedTuple):
    """Visibility of one call as kernels take it; ragged where there are tables."""

    lower: Tensor | None
    last: Tensor | None
    # S - T, for a regular call
    offset: int
    # at most S, so that it fits 32 bits
    window: int
    # whether `last` is `row + offset`, as in a regular call
    is_last_regular: bool

    @classmethod
    def of(cls, call: AttentionCall) -> "Rows":
        """Bring the contract's arguments to this form."""
        batch, num_queries, num_keys = call.query.shape[0], call.query.shape[1], call.key.shape[1]
        first_visible, last_visible, window = call.first_visible, call.last_visible, call.window
        offset = num_keys - num_queries
        clamped = max(num_keys, 1) if window is None else min(window, max(num_keys, 1))
        if first_visible is None and last_visible is None:
            return cls(None, None, offset, clamped, True)
        last = last_visible
        if last is None:
            last = torch.arange(offset, num_keys, dtype=torch.int32, device=call.query.device).expand(batch, -1)
        lower = torch.zeros_like(last) if window is None else (last - (min(window, _LARGEST) - 1)).clamp_min(0)
        if first_visible is not None:
            lower = torch.maximum(lower, first_visible)
        return cls(lower.contiguous(), last.contiguous(), offset, clamped, last_visible is None)

    def of_keys(self, num_keys: int) -> Tensor | None:
        """Return which rows see each key, int32 `[B, 2, S]`: the first and the one after the last; None if regular.

        They are neighbours, since neither `lower` nor `last` decreases from row to row.
        """
        if self.last is None or self.lower is None:
            return None
        key = torch.arange(num_keys, dtype=torch.int32, device=self.last.device).repeat(self.last.shape[0], 1)
        first = torch.searchsorted(self.last, key, out_int32=True)
        end = torch.searchsorted(self.lower, key, right=True, out_int32=True)
        return torch.stack((first, end), dim=1)


def far_tiles_of_keys(window: int, rows: int, keys: int) -> tuple[int, int, int]:
    """Return `(n1, n2, n)` of `tiles_of_rows` for a block of rows far into a sequence."""
    count = -(-(window + rows - 1) // keys)
    # the block's rows are 0 .. rows - 1, its grid of keys ends with them
    first = rows - count * keys
    left = min(-(-max(rows - window - first, 0) // keys), count)
    return left, min(left + max(1 - (first + left * keys), 0) // keys, count), count


def far_tiles_of_rows(window: int, rows: int, keys: int) -> tuple[int, int, int]:
    """Return `(n1, n2, n)` of `rows_of_tile` for a block of keys with a whole window of rows behind it."""
    count = -(-(window + keys - 1) // rows)
    left = min(-(-(keys - 1) // rows), count)
    return left, min(left + max(window - left * rows, 0) // rows, count), count


@triton.jit
def visible_keys(lower_ptr, last_ptr, row, num_queries, num_keys, offset, window, RAGGED: tl.constexpr):
    """Return `(lower, last)` of rows, a scalar or a tile of them; a row past the end sees nothing."""
    if RAGGED:
        exists = row < num_queries
        last = tl.load(last_ptr + row, mask=exists, other=-1)
        return tl.load(lower_ptr + row, mask=exists, other=0), last
    else:
        last = row + offset
        return tl.maximum(last - window + 1, 0), last


@triton.jit
def tiles_of_rows(
    lower_ptr,
    last_ptr,
    first_row,
    num_queries,
    num_keys,
    offset,
    window,
    RAGGED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Return `(start, n1, n2, n)`: of n tiles of keys from `start` on, every row sees all of the tiles n1 .. n2 - 1.

    The grid of tiles ends at the last visible key, so a window that is a multiple of the tile has as few tiles as can
    be. The start may be negative.
    """
    final_row = tl.minimum(first_row + BLOCK_ROWS, num_queries) - 1
    lower_begin, last_begin = visible_keys(
        lower_ptr, last_ptr, first_row, num_queries, num_keys, offset, window, RAGGED
    )  # fmt: skip
    lower_end, last_end = visible_keys(lower_ptr, last_ptr, final_row, num_queries, num_keys, offset, window, RAGGED)
    end = tl.minimum(last_end + 1, num_keys)
    count = tl.maximum(end - lower_begin + BLOCK_KEYS - 1, 0) // BLOCK_KEYS
    start = end - count * BLOCK_KEYS
    left = tl.minimum(tl.maximum(lower_end - start + BLOCK_KEYS - 1, 0) // BLOCK_KEYS, count)
    inner_end = tl.minimum(last_begin + 1, num_keys)
    inner = tl.maximum(inner_end - (start + left * BLOCK_KEYS), 0) // BLOCK_KEYS
    return start, left, tl.minimum(left + inner, count), count


@triton.jit
def rows_of_tile(
    table_ptr,
    first_key,
    num_queries,
    num_keys,
    offset,
    window,
    RAGGED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Return `(start, n1, n2, n)`: of n tiles of rows from `start` on, those in n1 .. n2 - 1 see every key.

    Both ends are bounded: rows before the first that sees a key of the tile, and after the last, are not visited.
    """
    final_key = tl.minimum(first_key + BLOCK_KEYS, num_keys) - 1
    if RAGGED:
        start = tl.load(table_ptr + first_key)
        inner_start = tl.load(table_ptr + final_key)
        inner_end = tl.load(table_ptr + num_keys + first_key)
        end = tl.load(table_ptr + num_keys + final_key)
    else:
        start = tl.maximum(first_key - offset, 0)
        inner_start = tl.maximum(final_key - offset, 0)
        inner_end = tl.minimum(first_key - offset + window, num_queries)
        end = tl.minimum(final_key - offset + window, num_queries)
    count = tl.maximum(end - start + BLOCK_ROWS - 1, 0) // BLOCK_ROWS
    left = tl.maximum(inner_start - start + BLOCK_ROWS - 1, 0) // BLOCK_ROWS
    # keys past the end are no keys: their tile is masked throughout
    left = tl.where(first_key + BLOCK_KEYS > num_keys, count, tl.minimum(left, count))
    inner = tl.maximum(inner_end - (start + left * BLOCK_ROWS), 0) // BLOCK_ROWS
    return start, left, tl.minimum(left + inner, count), count


@triton.jit
def rows_of_keys(table_ptr, key, num_keys, offset, window, RAGGED: tl.constexpr):
    """Return the first and the last row that see each key of a tile; the last is -1 for a key past the end."""
    exists = key < num_keys
    if RAGGED:
        first = tl.load(table_ptr + key, mask=exists, other=0)
        return first, tl.load(table_ptr + num_keys + key, mask=exists, other=0) - 1
    else:
        return key - offset, tl.where(exists, key - offset + window - 1, -1)
