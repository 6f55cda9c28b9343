"""How the chunked scan cuts rows into chunks: spans of a few chunks of a few rows, as one batch of products.

Everything between two chunks is a state. Inside a chunk the decay between two tokens is a sum of the logarithms between
them, never a difference of two longer sums, so that a strong decay costs the weak ones beside it no digits; documents
are kept apart by multiplying with 0, so that no logarithm is ever infinite because of them.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from swat_lm.ops.precision import sum_dtype

# chunks that are one batch of products; a state is kept for the backward at the beginning of every span
CHUNKS_PER_SPAN = 8
# pairs of tokens over all heads of a span above which a CPU takes the rows of a batch one after another
PAIR_BUDGET = 2**18


class Span(NamedTuple):
    """`num_chunks` chunks of `length` tokens of `rows`, from token `start`; `number` among the spans of its rows."""

    rows: slice
    number: int
    start: int
    num_chunks: int
    length: int

    @property
    def tokens(self) -> slice:
        """The span's tokens."""
        return slice(self.start, self.start + self.num_chunks * self.length)

    def chunks(self, x: Tensor) -> Tensor:
        """`[B, T, ...]` -> `[b, n, L, ...]`, a view."""
        return x[self.rows, self.tokens].unflatten(1, (self.num_chunks, self.length))


class Scan(NamedTuple):
    """The scan's inputs, as in the contract; `documents` of `documents_of`, 0 the initial state's."""

    query: Tensor
    key: Tensor
    value: Tensor
    log_decay: Tensor
    step_size: Tensor
    documents: Tensor | None
    real: Tensor | None

    def row_groups(self, chunk_size: int) -> Iterator[slice]:
        """Yield the rows of the batch that go through the chunks together."""
        batch, num_tokens, num_heads, _ = self.value.shape
        together = max(batch, 1)
        if self.value.device.type == "cpu":
            length = min(chunk_size, num_tokens)
            pairs = num_heads * min(CHUNKS_PER_SPAN, -(-num_tokens // length)) * length**2
            together = max(1, min(batch, PAIR_BUDGET // pairs))
        for first in range(0, batch, together):
            yield slice(first, min(first + together, batch))

    def spans(self, rows: slice, chunk_size: int) -> list[Span]:
        """Cut the rows into spans; what is left over after the last whole chunk is a span of its own."""
        whole, rest = divmod(self.value.shape[1], chunk_size)
        cuts = [
            (first * chunk_size, min(CHUNKS_PER_SPAN, whole - first), chunk_size)
            for first in range(0, whole, CHUNKS_PER_SPAN)
        ]
        if rest:
            cuts.append((whole * chunk_size, 1, rest))
        return [Span(rows, number, *cut) for number, cut in enumerate(cuts)]


def count_spans(num_tokens: int, chunk_size: int) -> int:
    """Return how many spans every row has."""
    return -(-(num_tokens // chunk_size) // CHUNKS_PER_SPAN) + (1 if num_tokens % chunk_size else 0)


class Decays(NamedTuple):
    """What is left of one token's input at another place; exactly 0 across documents."""

    within: Tensor
    """`[b, n, H, L, L]`: at token t of what entered at token s <= t."""
    into: Tensor
    """`[b, n, H, L]`: at token t of the state before the chunk."""
    out: Tensor
    """`[b, n, H, L]`: after the chunk of what entered at token s."""
    whole: Tensor
    """`[b, n, H]`: after the chunk of the state before it."""


class Part(NamedTuple):
    """A span's inputs in the precision of the state; tokens that are not real hold zeros."""

    query: Tensor
    """`[b n, G, L, N]`"""
    key: Tensor
    """`[b n, G, L, N]`"""
    value: Tensor
    """`[b, n, L, H, P]`"""
    step_size: Tensor
    """`[b, n, L, H]`"""
    decays: Decays

    @classmethod
    def of(cls, scan: Scan, span: Span) -> "Part":
        """Load a span's part of the inputs."""
        dtype = sum_dtype(scan.value)
        query, key, value, log_decay, step_size = (span.chunks(x).to(dtype) for x in scan[:5])
        if scan.real is not None:
            skipped = ~span.chunks(scan.real)
            # all of them, so that not even NaN passes from a token that does not count
            query, key, value = (x.masked_fill(skipped[..., None, None], 0.0) for x in (query, key, value))
            log_decay, step_size = (x.masked_fill(skipped[..., None], 0.0) for x in (log_decay, step_size))
        query, key = (x.flatten(0, 1).transpose(1, 2).contiguous() for x in (query, key))
        return cls(query, key, value, step_size, _decays(log_decay, scan.documents, span))


def _decays(log_decay: Tensor, documents: Tensor | None, span: Span) -> Decays:
    """Return the decays of `[b, n, L, H]` logarithms."""
    logs = log_decay.transpose(2, 3).contiguous()
    length = span.length
    # column s holds the logarithms after s; their running sum over rows is the decay from s to t
    after = logs[..., None].expand(*logs.shape, length).tril(-1)
    within = torch.cumsum(after, dim=-2, out=after).exp_().tril_()
    into = logs.cumsum(dim=-1).exp_()
    if documents is not None:
        own = span.chunks(documents)
        before = F.pad(documents[span.rows], (1, 0))[:, span.start : span.tokens.stop : length]
        within *= (own[:, :, :, None] == own[:, :, None, :])[:, :, None]
        into *= (own == before[..., None])[:, :, None]
    return Decays(within, into, within[..., -1, :], into[..., -1])
