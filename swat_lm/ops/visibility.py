"""Which keys a row may see, as two integers per row; the one place where masks, documents and paddings are converted.

Row t sees the keys `max(first, last - window + 1) .. last`; `first > last` means that it sees nothing. Every function
here returns `Visibility(first_visible, last_visible)`, int32 `[B, T]` or None for the default (first 0, last
S - T + t), checks the values it is given (which costs a device sync on a GPU), and keeps both non-decreasing in t.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Visibility(NamedTuple):
    """Indices into the keys, int32 `[B, T]`; None stands for the operator's default."""

    first_visible: Tensor | None
    last_visible: Tensor | None


def from_attention_mask(attention_mask: Tensor, num_queries: int | None = None) -> Visibility:
    """Convert a padding mask `[B, S]` over the keys (1 or True = real) for queries that are the last T of them.

    Left and right padding are both accepted; a row at a padded place sees nothing.

    Args:
        attention_mask: `[B, S]`, one run of ones per row.
        num_queries: T, at most S; S when None.

    Raises:
        ValueError: the mask is not two-dimensional, holds other values than 0 and 1, or has a hole (names the row).
    """
    if attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask: expected a padding mask [batch, keys], got shape {list(attention_mask.shape)}; "
            "what a row may see beyond padding is given by window, first_visible and last_visible"
        )
    num_keys = attention_mask.shape[1]
    num_queries = num_keys if num_queries is None else num_queries
    if not 0 <= num_queries <= num_keys:
        raise ValueError(f"num_queries: expected 0 to {num_keys} (the keys in attention_mask), got {num_queries}")
    real = attention_mask != 0
    if attention_mask.dtype != torch.bool and bool((real & (attention_mask != 1)).any()):
        raise ValueError("attention_mask: expected only 0 (padding) and 1 (real token); additive masks have no meaning")
    if bool(real.all()):
        return Visibility(None, None)
    starts = real.clone()
    starts[:, 1:] &= ~real[:, :-1]
    broken = (starts.sum(dim=1) > 1).nonzero()
    if broken.numel():
        raise ValueError(
            f"attention_mask: row {int(broken[0])} has a hole (real tokens, then padding, then real tokens); "
            "a row must be one run of real tokens, padded on the left or on the right"
        )
    start = torch.where(real.any(dim=1), real.to(torch.int32).argmax(dim=1), num_keys)
    index = torch.arange(num_keys - num_queries, num_keys, device=real.device)
    own = real[:, num_keys - num_queries :]
    # a padded row after the text must point past every key, one before it already lies left of the first real key
    first = torch.where(own | (index < start[:, None]), start[:, None], num_keys)
    return Visibility(first.to(torch.int32), None)


def from_mask_with_holes(
    attention_mask: Tensor, num_queries: int | None = None, ends_hidden: bool = False
) -> tuple[Visibility, Tensor | None]:
    """Convert a padding mask `[B, S]` that may have holes: padding between real tokens, which nobody sees.

    Args:
        attention_mask: `[B, S]`, 1 or True = real.
        num_queries: T, at most S; S when None.
        ends_hidden: whether padding after a row's last real token counts as a hole too, since tokens will follow.

    Returns:
        Visibility as if the holes were seen, and bool `[B, S]` of the keys in holes, None where there are none.
    """
    if attention_mask.dim() != 2:
        return from_attention_mask(attention_mask, num_queries), None
    real = attention_mask != 0
    # after the first real token, and before the last
    hidden = ~real & (real.cumsum(dim=1) > 0)
    if not ends_hidden:
        hidden &= real.flip(1).cumsum(dim=1).flip(1) > 0
    if not bool(hidden.any()):
        return from_attention_mask(attention_mask, num_queries), None
    if attention_mask.dtype != torch.bool and bool((real & (attention_mask != 1)).any()):
        raise ValueError("attention_mask: expected only 0 (padding) and 1 (real token); additive masks have no meaning")
    return from_attention_mask(real | hidden, num_queries), hidden


def from_document_ids(document_ids: Tensor) -> Visibility:
    """Convert the document of each token, `[B, T]` integers, for rows that hold several documents one after another.

    A change of id begins a document. A negative id marks padding, which sees nothing and is seen by nobody.

    Raises:
        ValueError: not `[B, T]` integers, or an id that comes again after another document (names the row).
    """
    if document_ids.dim() != 2 or document_ids.is_floating_point() or document_ids.dtype == torch.bool:
        raise ValueError(
            f"document_ids: expected integers [batch, tokens], got {document_ids.dtype} {list(document_ids.shape)}"
        )
    batch, num_tokens = document_ids.shape
    if num_tokens == 0:
        return Visibility(None, None)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    padding = document_ids < 0
    if not bool((starts[:, 1:].any()) | padding.any()):
        return Visibility(None, None)
    _refuse_recurring_ids(document_ids, starts & ~padding)
    index = torch.arange(num_tokens, device=document_ids.device).expand(batch, -1)
    first = torch.where(starts & ~padding, index, 0).cummax(dim=1).values
    if bool(padding.any()):
        # a padded row points to the start of the next document (or past the end), so that first stays non-decreasing
        ahead = torch.where(starts & ~padding, index, num_tokens).flip(1).cummin(dim=1).values.flip(1)
        first = torch.where(padding, ahead, first)
    return Visibility(first.to(torch.int32), None)


def from_position_ids(position_ids: Tensor) -> Visibility:
    """Convert positions `[B, T]` that restart with every packed document: one that does not follow begins it."""
    if position_ids.dim() != 2 or position_ids.is_floating_point():
        raise ValueError(
            f"position_ids: expected integers [batch, tokens], got {position_ids.dtype} {list(position_ids.shape)}"
        )
    breaks = torch.zeros_like(position_ids, dtype=torch.int32)
    breaks[:, 1:] = (position_ids[:, 1:] != position_ids[:, :-1] + 1).to(torch.int32)
    return from_document_ids(breaks.cumsum(dim=1))


def from_cu_seqlens(cu_seqlens: Tensor, num_tokens: int) -> Visibility:
    """Convert cumulative lengths `[documents + 1]` (flash-attn's varlen form) of one packed row: `[1, T]`.

    Raises:
        ValueError: the lengths do not begin at 0, do not end at `num_tokens`, or decrease.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens: expected integers [documents + 1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    lengths = cu_seqlens.diff()
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != num_tokens or bool((lengths < 0).any()):
        raise ValueError(
            f"cu_seqlens: expected a non-decreasing run from 0 to {num_tokens} (the tokens of the row), "
            f"got {cu_seqlens.tolist()}"
        )
    return Visibility(torch.repeat_interleave(cu_seqlens[:-1], lengths).to(torch.int32).unsqueeze(0), None)


def _refuse_recurring_ids(document_ids: Tensor, starts: Tensor) -> None:
    rows, columns = starts.nonzero(as_tuple=True)
    labels = torch.stack((rows, document_ids[rows, columns].to(rows.dtype)), dim=1)
    unique, counts = labels.unique(dim=0, return_counts=True)
    again = unique[counts > 1]
    if again.numel():
        raise ValueError(
            f"document_ids: row {int(again[0, 0])} returns to document {int(again[0, 1])} after another one; "
            "the tokens of a document must stand together"
        )
