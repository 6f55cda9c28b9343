"""From masks, positions, document ids and slots to the `Chunk` that layers see.

Legend: B rows, T tokens of the chunk, P items before it.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from swat_lm.layers.base import Layer
from swat_lm.layers.chunk import FARTHEST, Chunk
from swat_lm.model.configuration import SwatConfig
from swat_lm.model.pasts import Carry, Rows
from swat_lm.model.slots import Slots
from swat_lm.ops.visibility import from_cu_seqlens, from_document_ids, from_mask_with_holes, from_position_ids

# what Hugging Face's tools pass along and no causal language model has a use for
TOLERATED = {
    "cache_position", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "is_causal", "token_type_ids",
    "tokenizer", "assistant_tokenizer", "output_hidden_states",
}  # fmt: skip


def plan_chunk(
    batch: int,
    num_tokens: int,
    num_past: int,
    device: torch.device,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    document_ids: Tensor | None = None,
    *,
    goes_on: bool = False,
    ends_hidden: bool = False,
) -> Chunk:
    """Plan a chunk of T tokens that follows `num_past` columns.

    Args:
        attention_mask: `[B, num_past + T]`, 1 = real; padding on either side; holes are hidden tokens.
        position_ids: `[B or 1, T]`; used for rotary. Without a mask, a position that does not follow begins a document.
        document_ids: integers `[B, T]`; a change begins a document, a negative id is padding.
        goes_on: whether a cache is kept, so that tokens may follow.
        ends_hidden: whether padding on the right is a hole, behind which tokens see what is before it.

    Raises:
        ValueError: a mask that is not two-dimensional or of another length, or documents after a past.
    """
    if position_ids is not None and position_ids.dim() == 1:
        position_ids = position_ids.unsqueeze(0)
    for name, given, rows in (("position_ids", position_ids, (1, batch)), ("document_ids", document_ids, (batch,))):
        if given is not None and (given.dim() != 2 or given.shape[0] not in rows or given.shape[1] != num_tokens):
            raise ValueError(f"{name}: expected [{batch}, {num_tokens}], got {list(given.shape)}")
    if attention_mask is not None:
        check_mask(attention_mask, batch, num_past + num_tokens)
    chunk = _plan(batch, num_tokens, num_past, device, attention_mask, position_ids, document_ids, goes_on, ends_hidden)
    chunk.before = num_past
    return chunk


def _plan(
    batch: int,
    num_tokens: int,
    num_past: int,
    device: torch.device,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    document_ids: Tensor | None,
    goes_on: bool,
    ends_hidden: bool,
) -> Chunk:
    if document_ids is not None:
        return _plan_documents(document_ids, num_tokens, num_past, attention_mask, position_ids)
    if attention_mask is not None:
        return _plan_mask(attention_mask, num_tokens, num_past, position_ids, goes_on or ends_hidden)
    if position_ids is None:
        return Chunk(torch.arange(num_past, num_past + num_tokens, device=device).unsqueeze(0))
    if num_tokens == 1 or (goes_on and torch.compiler.is_compiling()):
        # a graph cannot look whether documents begin, which a cache would refuse
        return Chunk(position_ids.long())
    return _plan_positions(position_ids, batch, num_past)


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


def _plan_documents(
    document_ids: Tensor, num_tokens: int, num_past: int, attention_mask: Tensor | None, position_ids: Tensor | None
) -> Chunk:
    if num_past:
        raise ValueError(
            "document_ids: packed documents cannot follow a cache; pass whole rows without past_key_values, "
            "or a carry, which knows documents"
        )
    if attention_mask is not None:
        document_ids = document_ids.masked_fill(attention_mask == 0, -1)
    first = from_document_ids(document_ids).first_visible
    own = torch.arange(num_tokens, device=document_ids.device)
    positions = own.unsqueeze(0) if first is None else (own - first.long()).clamp(min=0)
    return Chunk(positions if position_ids is None else position_ids.long(), first)


def _plan_mask(
    attention_mask: Tensor, num_tokens: int, num_past: int, position_ids: Tensor | None, ends_hidden: bool
) -> Chunk:
    visibility, hidden = from_mask_with_holes(attention_mask, num_tokens, ends_hidden=ends_hidden)
    real = attention_mask != 0
    positions = (real.cumsum(1) - 1).clamp(min=0)[:, num_past:] if position_ids is None else position_ids.long()
    first = visibility.first_visible
    chunk = Chunk(positions, None if first is None else first - num_past)
    if hidden is not None:
        chunk.hidden, chunk.past_hidden = hidden[:, num_past:], hidden[:, :num_past]
    return chunk


def _plan_positions(position_ids: Tensor, batch: int, num_past: int) -> Chunk:
    first = from_position_ids(position_ids).first_visible
    if first is None:
        return Chunk(position_ids.long())
    if num_past:
        # tokens before the first break go on with the document that the cache holds
        first = first.masked_fill(first == 0, -num_past)
    return Chunk(position_ids.long(), first.expand(batch, -1).contiguous())


def draws_noise(layers: Iterable[Layer], is_training: bool) -> bool:
    """Whether a pass needs seeds of its rows."""
    return is_training and any(layer.draws_noise for layer in layers)


def row_seeds(given: int | Tensor | None, batch: int, device: torch.device) -> Tensor:
    """What the rows of a training pass draw noise from, int64 `[B]`; drawn by PyTorch's generator where none is given.

    Raises ValueError for seeds that are not one whole number, or one per row.
    """
    if given is None:
        # by the CPU's generator, which is the same whatever the device is
        return torch.randint(2**63 - 1, (batch,)).to(device)
    if not isinstance(given, Tensor):
        return torch.full((batch,), given, dtype=torch.int64, device=device)
    if given.dtype != torch.int64 or given.shape != (batch,):
        raise ValueError(
            f"noise_seed: expected a whole number or int64 [{batch}], got {given.dtype} {list(given.shape)}"
        )
    return given.to(device)


def check_mask(attention_mask: Tensor, batch: int, num_columns: int) -> None:
    """Raise ValueError for a mask that is not a padding mask of this shape."""
    if attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask: expected a padding mask [batch, tokens], got shape {list(attention_mask.shape)}; "
            "four-dimensional masks have no meaning here: windows and documents are given as such"
        )
    if tuple(attention_mask.shape) != (batch, num_columns):
        raise ValueError(
            f"attention_mask: expected [{batch}, {num_columns}] (all tokens so far), got {list(attention_mask.shape)}"
        )


def plan_stream(slots: Slots, rows: Rows, hidden: Tensor | None = None) -> Chunk:
    """The chunk of rows that go on from slots, each from its own position.

    Args:
        hidden: bool `[B, T]`, tokens that nobody sees.
    """
    num_tokens, device = rows.num_tokens, rows.position.device
    begin = 0 if rows.begin is None else rows.begin
    # what is kept stands right before the first column that is
    start = rows.position - begin
    own = torch.arange(num_tokens, device=device)
    positions = (start - slots.skipped[rows.slot])[:, None] + own
    past_hidden = slots.remember_holes(rows, hidden)
    if hidden is not None:
        positions = positions - (hidden.cumsum(1) - hidden.long())
    chunk = Chunk(positions.clamp(min=0), None, None, hidden, past_hidden, before=start[:, None])
    if slots.ragged:
        # what stands before a stream's first token is not there; padding has moved that token to the right
        first = (-start).clamp(min=FARTHEST).to(torch.int32)[:, None].expand(-1, num_tokens)
        if rows.end is not None:
            first = torch.where(own >= rows.end[:, None], num_tokens, first)
        chunk.first = first.contiguous()
    return chunk


def plan_carry(input_ids: Tensor, document_ids: Tensor | None, carry: Carry) -> tuple[Chunk, Carry]:
    """The chunk `[B, T]` after a carry, and the carry after it but for the pasts of the layers.

    A document may begin in an older chunk. Raises ValueError for ids that are given for some chunks only.
    """
    num_tokens = carry.num_tokens + input_ids.shape[1]
    if carry.planned is not None:
        return carry.planned, Carry(carry.mode, (), num_tokens)
    if document_ids is None and carry.document is None:
        positions = torch.arange(carry.num_tokens, num_tokens, device=input_ids.device).unsqueeze(0)
        return Chunk(positions), Carry(carry.mode, (), num_tokens)
    if document_ids is None or (carry.document is None and carry.num_tokens):
        raise ValueError("document_ids: give them for every chunk of a stream or for none")
    if document_ids.shape != input_ids.shape[:2]:
        raise ValueError(f"document_ids: expected {list(input_ids.shape[:2])}, got {list(document_ids.shape)}")
    ids = document_ids.long()
    before, length = carry.document, carry.document_length
    if before is None or length is None:
        before, length = torch.full_like(ids[:, 0], -1), torch.zeros_like(ids[:, 0])
    joined = torch.cat((before.unsqueeze(1), ids), dim=1)
    # numbered by their changes: ids need to differ between neighbours only
    numbers = (joined[:, 1:] != joined[:, :-1]).cumsum(1)
    numbers = torch.cat((torch.zeros_like(numbers[:, :1]), numbers), dim=1).masked_fill(joined < 0, -1)
    first = from_document_ids(numbers).first_visible
    own = torch.arange(ids.shape[1], device=ids.device)
    if first is None:
        start = (-length).unsqueeze(1).expand_as(ids)
    else:
        # index 0 is the carried document, which began `length` tokens before this chunk
        start = torch.where(first[:, 1:] == 0, -length.unsqueeze(1), first[:, 1:].long() - 1)
    positions = (own - start).clamp(min=0)
    after = torch.where(ids[:, -1] < 0, 0, ids.shape[1] - start[:, -1])
    chunk = Chunk(positions, start.clamp(min=FARTHEST).to(torch.int32), before=length.unsqueeze(1))
    return chunk, Carry(carry.mode, (), num_tokens, ids[:, -1], after)


def refuse_unknown(kwargs: dict[str, Any], name: str, config: SwatConfig) -> None:
    """Raise TypeError for keywords of a `forward` that would change its result, ValueError for attention weights."""
    if kwargs.pop("output_attentions", None) or config.output_attentions:
        raise ValueError("output_attentions: windowed attention never forms its weights, so they cannot be returned")
    # an argument that says nothing, or no, changes nothing, whatever it is called
    unknown = sorted(
        key for key, value in kwargs.items() if value is not None and value is not False and key not in TOLERATED
    )
    if unknown:
        raise TypeError(f"{name}.forward got unexpected keyword arguments: {', '.join(unknown)}")
