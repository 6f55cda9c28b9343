"""The documents of packed rows as rows of their own, and back: for what cannot begin anew in the middle of a row.

Documents of like lengths go together, so that no row is more than half padding. Legend: B rows, T tokens, D documents.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from swat_lm.ops.segments import check_rows, documents_of


class Group(NamedTuple):
    """Documents of like lengths."""

    row: Tensor
    """int64 `[D]`: the row of each."""
    document: Tensor
    """int64 `[D]`: its number in the row; 0 goes on from what was before."""
    count: Tensor
    """int64 `[D]`: its tokens, at least one."""
    place: Tensor
    """int64 `[D, longest]`: of each of its tokens in the flattened rows; any place where there is none."""
    is_token: Tensor
    """bool `[D, longest]`."""

    def take(self, x: Tensor) -> Tensor:
        """`[B, T, M]` as `[D, longest, M]`, with zeros after a document's last token."""
        return torch.where(self.is_token[..., None], x.flatten(0, 1)[self.place], 0.0)

    def put(self, result: Tensor, into: Tensor) -> Tensor:
        """`[D, longest, M]` added to its places in `[B, T, M]`."""
        flat = into.flatten(0, 1)
        return flat.index_put((self.place[self.is_token],), result[self.is_token], accumulate=True).view(into.shape)


class Sequences(NamedTuple):
    """All documents of packed rows."""

    groups: list[Group]
    last: Tensor
    """int64 `[B]`: the number of the document that each row ends in."""
    going_on: Tensor
    """int64 `[B]`: tokens of document 0 in each row."""


def unpack(
    segments: Tensor | None, real: Tensor | None, batch: int, num_tokens: int, device: torch.device
) -> Sequences:
    """The documents of rows `[B, T]`: numbered as `documents_of` does, without what is not real.

    Raises:
        ValueError: segments or marks that do not fit.
    """
    check_rows(segments, real, batch, num_tokens, device)
    documents = documents_of(segments, real)
    if documents is None:
        documents = torch.zeros(batch, num_tokens, dtype=torch.int64, device=device)
    counted = torch.ones_like(documents, dtype=torch.bool) if real is None else real
    place = counted.flatten().nonzero().squeeze(1)
    row = place // num_tokens
    key = row * (num_tokens + 1) + documents.flatten()[place]
    key, count = torch.unique_consecutive(key, return_counts=True)
    start = count.cumsum(0) - count
    row, document = key // (num_tokens + 1), key % (num_tokens + 1)
    groups = list(_groups(row, document, count, start, place))
    going_on = (counted & (documents == 0)).sum(1)
    return Sequences(groups, documents[:, -1], going_on)


def _groups(row: Tensor, document: Tensor, count: Tensor, start: Tensor, place: Tensor) -> Iterator[Group]:
    # powers of two, so that there are few groups and little padding
    size = torch.ceil(torch.log2(count.double())).long()
    for one in size.unique().tolist():
        own = size == one
        lengths = count[own]
        order = torch.arange(int(lengths.max()), device=count.device)
        is_token = order < lengths[:, None]
        index = (start[own][:, None] + order).clamp(max=len(place) - 1)
        yield Group(row[own], document[own], lengths, place[index], is_token)
