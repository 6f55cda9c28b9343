"""Quantised attention over a chunk and its past: documents in blocks of their own, and what leaves the window, summed.

Blocks count from a document's start, and rows stand where they stand, so what does not begin a block is laid out anew:
what goes on from a past behind two blocks of kept items. Legend: B rows, T tokens, P kept items, D key size, E value
size, S codes, N documents, L places, W two blocks.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from swat_lm.layers.base import InPlace, Past
from swat_lm.layers.chunk import Chunk
from swat_lm.ops.quantised_attention import LEAD, code_sums, quantised_attention
from swat_lm.ops.sequences import Group, Sequences, unpack


class Items(NamedTuple):
    """What is kept of tokens, `[B, P + T, ...]`."""

    key: Tensor
    value: Tensor
    code: Tensor


class Places(NamedTuple):
    """Documents laid out in blocks."""

    row: Tensor
    """int64 `[N]`"""
    is_last: Tensor
    """bool `[N]`: its row ends in it."""
    index: Tensor
    """int64 `[N, L]`: which of a row's items stands in each place; any where there is none."""
    place: Tensor
    """int64 `[N, L]`: how many tokens of the document stand before it."""
    seen: Tensor
    """bool `[N, L]`: there is one, and it counts."""
    end: Tensor
    """int64 `[N]`: tokens of the document up to the chunk's end."""
    lead: int
    """Places before the first that rows stand in."""
    is_row: Tensor
    """bool `[N, L - lead]`: a token of the chunk stands there."""

    def take(self, items: Tensor) -> Tensor:
        """`[B, P + T, ...]` as `[N, L, ...]`."""
        return items[self.row[:, None], self.index]


def attend_by_code(
    query: Tensor, key: Tensor, value: Tensor, code: Tensor, codes: Tensor, bias: Tensor, chunk: Chunk,
    past: Past | None, block: int, both_ways: bool,
) -> Tensor:  # fmt: skip
    """What queries `[B, T, D]` find, `[B, T, E]`; the past, if any, is extended."""
    if past is None and chunk.first is None:
        return quantised_attention(
            query, key, value, code, codes, bias, block=block, seen=chunk.real, both_ways=both_ways
        )
    items, num_past, before = Items(key, value, code), 0, None
    if past is not None:
        kept, num_past = past.extend(near_key=key, near_value=value, near_code=code)
        items = Items(kept["near_key"], kept["near_value"], kept["near_code"])
    documents = documents_of_chunk(chunk, query)
    goes_on = past is not None
    laid = chunk._once(
        ("by code", num_past, block, goes_on), lambda: lay_out(documents, chunk, num_past, block, goes_on)
    )
    if past is not None:
        before = fold(laid, documents, items, past, len(codes), block)
    # in what is kept, which autocast may have made narrower
    output = items.value.new_zeros(value.shape)
    for one in laid:
        queries = query[one.row[:, None], (one.index[:, one.lead :] - num_past).clamp(min=0)]
        counts, totals = (None, None) if before is None or not one.lead else (x[one.row] for x in before)
        found = quantised_attention(
            queries, one.take(items.key), one.take(items.value), one.take(items.code), codes, bias, block=block,
            seen=one.seen, counts=counts, totals=totals, both_ways=both_ways,
        )  # fmt: skip
        row = one.row[:, None].expand_as(one.is_row)[one.is_row]
        column = one.index[:, one.lead :][one.is_row] - num_past
        output = output.index_put((row, column), found[one.is_row])
    return output


def documents_of_chunk(chunk: Chunk, like: Tensor) -> Sequences:
    """The documents of a chunk's rows with the tokens that nobody sees, which keep their places; made once."""
    seen = None if chunk.first is None else chunk.first <= chunk.places
    batch, num_tokens = like.shape[:2]
    return chunk._once("documents", lambda: unpack(chunk.segments, seen, batch, num_tokens, like.device))


def lay_out(documents: Sequences, chunk: Chunk, num_past: int, block: int, goes_on: bool) -> list[Places]:
    """Documents that begin in the chunk, and behind two blocks those that go on from the past, if there is one."""
    blind, found = chunk.hidden_items(num_past), []
    for group in documents.groups:
        going_on = (group.document == 0) & goes_on
        for which, make in ((~going_on, begun), (going_on, gone_on)):
            if bool(which.any()):
                own = Group(*(x[which] for x in group))
                is_last = own.document == documents.last[own.row]
                found.append(make(own, is_last, chunk, num_past, block))
    if blind is None:
        return found
    return [one._replace(seen=one.seen & ~one.take(blind)) for one in found]


def begun(group: Group, is_last: Tensor, chunk: Chunk, num_past: int, block: int) -> Places:
    """Documents from their own beginning on."""
    column = group.place - group.row[:, None] * chunk.num_tokens
    place = torch.arange(column.shape[1], device=column.device).expand_as(column)
    index = torch.where(group.is_token, column + num_past, 0)
    return Places(group.row, is_last, index, place, group.is_token, group.count, 0, group.is_token)


def gone_on(group: Group, is_last: Tensor, chunk: Chunk, num_past: int, block: int) -> Places:
    """Documents that go on, from the beginning of the block two before the one that their first token stands in."""
    column = group.place[:, 0] - group.row * chunk.num_tokens
    known = chunk.document_places
    before = known[group.row if len(known) > 1 else 0, column]
    into = before % block
    lead = LEAD * block
    places = torch.arange(lead + int((into + group.count).max()), device=into.device)
    # from the first token of the chunk on, and below 0 of the past
    own = places - lead - into[:, None]
    place = own + before[:, None]
    index = num_past + own + torch.where(own >= 0, column[:, None], 0)
    is_item = (own < group.count[:, None]) & (own > -lead) & (place >= 0) & (index >= 0)
    is_row = (is_item & (own >= 0))[:, lead:]
    index = torch.where(is_item, index, 0)
    return Places(group.row, is_last, index, place, is_item, before + group.count, lead, is_row)


def fold(
    laid: list[Places], documents: Sequences, items: Items, past: Past, num_codes: int, block: int
) -> tuple[Tensor, Tensor]:
    """Counts `[B, S]` and sums `[B, S, E]` from before the chunk; those of items that leave are kept with them.

    After n tokens of a document, all but the last W - 1 have left.
    """
    batch, size = len(items.value), items.value.shape[-1]
    counts = items.code.new_zeros(batch, num_codes)
    totals = items.value.new_zeros(batch, num_codes, size, dtype=torch.float64)
    for one in laid:
        leaves = one.seen & one.is_last[:, None] & (one.place <= (one.end - LEAD * block)[:, None])
        own = code_sums(one.take(items.code), one.take(items.value).double(), leaves, num_codes)
        counts, totals = (x.index_add(0, one.row, more) for x, more in zip((counts, totals), own, strict=True))
    goes_on = documents.last == 0
    return (
        past.fold("code_counts", goes_on[:, None].long(), counts),
        past.fold("code_totals", goes_on[:, None, None].double(), totals),
    )


def step_by_code(
    query: Tensor, key: Tensor, value: Tensor, code: Tensor, codes: Tensor, bias: Tensor, past: InPlace
) -> Tensor:
    """What one token per row finds, `[B, 1, E]`, in place over slots: its item is kept, and one leaves.

    Which keys are near changes gradients alone, so all but one of the kept ones are.
    """
    slot, position, kept = past.slot, past.position, past.kept
    window = kept["near_key"].shape[1]
    own = position % window
    for name, new in (("near_key", key), ("near_value", value), ("near_code", code)):
        kept[name][slot, own] = new[:, 0].to(kept[name].dtype)
    oldest = (own + 1) % window
    leaves, left = position >= window - 1, kept["near_code"][slot, oldest]
    kept["code_counts"][slot, left] += leaves.long()
    gone = torch.where(leaves[:, None], kept["near_value"][slot, oldest], 0.0)
    kept["code_totals"][slot, left] += gone.to(kept["code_totals"].dtype)
    wide = query.dtype
    counts, totals = kept["code_counts"][slot], kept["code_totals"][slot].to(wide)
    distance = (position[:, None] - torch.arange(window, device=slot.device)) % window
    by_distance = torch.cat((bias.to(wide), bias.new_zeros(window - len(bias), dtype=wide)))
    is_near = (distance <= position[:, None]) & (distance < window - 1)
    # as the op of a whole chunk does
    with torch.autocast(query.device.type, enabled=False):
        near = torch.matmul(query, kept["near_key"][slot].to(wide).transpose(1, 2)) + by_distance[distance][:, None]
        near = near.masked_fill(~is_near[:, None], -torch.inf)
        far = torch.matmul(query, codes.to(wide).t()).masked_fill((counts == 0)[:, None], -torch.inf)
        # the row's own key is always near
        most = torch.maximum(near.amax(-1), far.amax(-1))[..., None]
        near, far = (near - most).exp(), (far - most).exp()
        weight = near.sum(-1, keepdim=True) + (far * counts.to(wide)[:, None]).sum(-1, keepdim=True)
        found = torch.matmul(near, kept["near_value"][slot].to(wide)) + torch.matmul(far, totals)
        return (found / weight).to(value.dtype)
