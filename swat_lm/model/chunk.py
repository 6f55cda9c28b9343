"""Where each token of a chunk stands in its stream and what it may see, from masks, positions or document ids."""

from dataclasses import dataclass

import torch
from torch import Tensor

from swat_lm.mixers.protocol import Visible
from swat_lm.ops.visibility import from_attention_mask, from_cu_seqlens, from_document_ids, from_position_ids


@dataclass
class ChunkPlan:
    """Absolute positions int64 `[B or 1, T]`, what is visible, and how many tokens are real where there is padding."""

    positions: Tensor
    visible: Visible
    num_real: Tensor | None = None
    """int64 `[B]`: real tokens of the chunk; None without padding."""
    past_real: Tensor | None = None
    """int64 `[B]`: real tokens before the chunk; None without padding."""
    packed: bool = False
    """Whether a row holds more than one document."""


def plan_chunk(
    batch: int,
    num_tokens: int,
    num_past: int,
    device: torch.device,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> ChunkPlan:
    """Plan a chunk of T tokens that follows `num_past` columns.

    Args:
        attention_mask: `[B, num_past + T]`, 1 = real; left or right padding.
        position_ids: `[B or 1, T]`; used for rotary. Without a mask, a position that does not follow begins a document.
        document_ids: integers `[B, T]`; a change begins a document, a negative id is padding.

    Raises:
        ValueError: a mask that is not two-dimensional, has a hole (so: decoding after right padding) or another length.
    """
    if position_ids is not None and position_ids.dim() == 1:
        position_ids = position_ids.unsqueeze(0)
    for name, given, rows in (("position_ids", position_ids, (1, batch)), ("document_ids", document_ids, (batch,))):
        if given is not None and (given.dim() != 2 or given.shape[0] not in rows or given.shape[1] != num_tokens):
            raise ValueError(f"{name}: expected [{batch}, {num_tokens}], got {list(given.shape)}")
    if attention_mask is not None:
        _check_mask(attention_mask, batch, num_past + num_tokens)
    if document_ids is not None:
        return _plan_documents(document_ids, num_tokens, num_past, attention_mask, position_ids)  # type: ignore[call-arg]
    if attention_mask is not None:
        return _plan_padding(attention_mask, num_tokens, num_past, position_ids)  # type: ignore[call-arg]
    if position_ids is None:
        return ChunkPlan(torch.arange(num_past, num_past + num_tokens, device=device).unsqueeze(0), Visible())
    if num_tokens == 1:
        return ChunkPlan(position_ids.long(), Visible())
    return _plan_positions(position_ids, batch, num_past)  # type: ignore[call-arg]


def documents_from_lengths(cu_seqlens: Tensor, batch: int, num_tokens: int) -> Tensor:
    """Document ids `[1, T]` of one flattened row from cumulative lengths `[documents + 1]`.

    Raises:
        ValueError: more than one row, or lengths that do not make up the row.
    """
    if batch != 1:
        raise ValueError(f"cu_seq_lens_q: describes one flattened row, got a batch of {batch}; use document_ids")
    # the first token of its document is an id as good as any
    first = from_cu_seqlens(cu_seqlens, num_tokens).first_visible
    assert first is not None
    return first


@torch.compiler.disable
def _plan_documents(
    document_ids: Tensor, num_tokens: int, num_past: int, attention_mask: Tensor | None, position_ids: Tensor | None
) -> ChunkPlan:
    if num_past:
        raise ValueError(
            "document_ids: packed documents cannot follow a cache; pass whole rows without past_key_values, "
            "or use forward_chunk, whose carry knows documents"
        )
    if attention_mask is not None:
        document_ids = document_ids.masked_fill(attention_mask == 0, -1)
    first = from_document_ids(document_ids).first_visible
    own = torch.arange(num_tokens, device=document_ids.device)
    positions = own.unsqueeze(0) if first is None else (own - first.long()).clamp(min=0)
    positions = positions if position_ids is None else position_ids.long()
    return ChunkPlan(positions, Visible(first), packed=first is not None)


@torch.compiler.disable
def _plan_padding(attention_mask: Tensor, num_tokens: int, num_past: int, position_ids: Tensor | None) -> ChunkPlan:
    first = from_attention_mask(attention_mask, num_tokens).first_visible
    real = attention_mask != 0
    positions = (real.cumsum(1) - 1).clamp(min=0)[:, num_past:] if position_ids is None else position_ids.long()
    if first is None:
        return ChunkPlan(positions, Visible())
    return ChunkPlan(positions, Visible(first - num_past), real[:, num_past:].sum(1), real[:, :num_past].sum(1))


@torch.compiler.disable
def _plan_positions(position_ids: Tensor, batch: int, num_past: int) -> ChunkPlan:
    first = from_position_ids(position_ids).first_visible
    if first is None:
        return ChunkPlan(position_ids.long(), Visible())
    if num_past:
        # tokens before the first break go on with the document that the cache holds
        first = first.masked_fill(first == 0, -num_past)
    return ChunkPlan(position_ids.long(), Visible(first.expand(batch, -1).contiguous()), packed=True)


def _check_mask(attention_mask: Tensor, batch: int, num_columns: int) -> None:
    if attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask: expected a padding mask [batch, tokens], got shape {list(attention_mask.shape)}; "
            "four-dimensional masks have no meaning here: windows and documents are given as such"
        )
    if tuple(attention_mask.shape) != (batch, num_columns):
        raise ValueError(
            f"attention_mask: expected [{batch}, {num_columns}] (all tokens so far), got {list(attention_mask.shape)}"
        )
