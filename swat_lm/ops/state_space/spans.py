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
        """`[B, T, ...]` -> `[n, b, L, ...]`, a view: chunks first, so that states follow each other in memory."""
        return x[self.rows, self.tokens].unflatten(1, (self.num_chunks, self.length)).transpose(0, 1)


class Scan(NamedTuple):
    """The scan's inputs, as in the contract; `documents` of `documents_of`, 0 the initial state's."""

    query: Tensor
    key: Tensor
    value: Tensor
    log_decay: Tensor
    step_size: Tensor
    documents: Tensor | None
    real: Tensor | None
    skip: Tensor | None

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
    """`[n, b, H, L, L]`: at token t of what entered at token s <= t."""
    into: Tensor
    """`[n, b, H, L]`: at token t of the state before the chunk."""
    out: Tensor
    """`[n, b, H, L]`: after the chunk of what entered at token s."""
    whole: Tensor
    """`[n, b, H]`: after the chunk of the state before it."""


class Part:
    """A span's inputs in the precision of the state; tokens that are not real hold zeros.

    Products with keys and queries take the heads of a group together, "jointly": `[n b G, L, R P]` for R heads.
    """

    query: Tensor
    """`[n b G, L, N]`, and the key alike."""
    value: Tensor
    """`[n, b, L, H, P]`"""
    step_size: Tensor
    """`[n, b, L, H]`"""
    stored: Tensor
    """What is left of the inputs after the chunk, jointly."""

    def __init__(self, scan: Scan, span: Span) -> None:
        dtype = sum_dtype(scan.value)
        query, key, value, log_decay, step_size = (span.chunks(x).to(dtype) for x in scan[:5])
        if scan.real is not None:
            skipped = ~span.chunks(scan.real)
            # all of them, so that not even NaN passes from a token that does not count
            query, key, value = (x.masked_fill(skipped[..., None, None], 0.0) for x in (query, key, value))
            log_decay, step_size = (x.masked_fill(skipped[..., None], 0.0) for x in (log_decay, step_size))
        self.shape = value.shape
        self.groups, self.state_size = key.shape[3:]
        self.repeats = value.shape[3] // self.groups
        self.query, self.key = (x.transpose(2, 3).flatten(0, 2) for x in (query, key))
        self.value, self.step_size = value, step_size
        self.decays = _decays(log_decay, scan.documents, span)
        self.stored = self.jointly(value, step_size * self.decays.out.transpose(2, 3))

    def jointly(self, x: Tensor, weights: Tensor) -> Tensor:
        """`[n, b, L, H, P]` times `[n, b, L, H]` -> `[n b G, L, R P]`, contiguous."""
        n, b, length, _, head_dim = x.shape
        result = weights.new_empty(n, b, self.groups, length, self.repeats, head_dim)
        split = (self.groups, self.repeats)
        torch.mul(
            x.unflatten(3, split).transpose(2, 3), weights.unflatten(3, split).transpose(2, 3)[..., None], out=result
        )
        return result.view(-1, length, self.repeats * head_dim)

    def apart(self, x: Tensor) -> Tensor:
        """`[n b G, L, R P]` -> `[n, b, L, H, P]`, a view where there is one group."""
        n, b, length, _, head_dim = self.shape
        return x.view(n, b, self.groups, length, self.repeats, head_dim).transpose(2, 3).flatten(3, 4)

    def per_head(self, x: Tensor, weights: Tensor | None) -> Tensor:
        """`[n, b, L, H, P]`, times `[n, b, L, H]` -> `[n b H, L, P]`, contiguous."""
        n, b, length, num_heads, head_dim = x.shape
        result = x.new_empty(n, b, num_heads, length, head_dim)
        x = x.transpose(2, 3)
        if weights is None:
            result.copy_(x)
        else:
            torch.mul(x, weights.transpose(2, 3)[..., None], out=result)
        return result.view(-1, length, head_dim)

    def per_token(self, x: Tensor) -> Tensor:
        """`[n b H, L, P]` -> `[n, b, L, H, P]`, a view."""
        n, b, length, num_heads, head_dim = self.shape
        return x.view(n, b, num_heads, length, head_dim).transpose(2, 3)

    def per_group(self, x: Tensor) -> Tensor:
        """Pairs of every head as `[n b, G, R, L, L]`, a view."""
        length = self.shape[2]
        return x.view(-1, self.groups, self.repeats, length, length)

    def states(self, before: Tensor) -> Tensor:
        """The state before every chunk, and the one after the last: `[n + 1, b, H, P, N]`."""
        return self._passed_on(before, self.stored, self.key, backwards=False)

    def d_states(self, after: Tensor, d_read: Tensor) -> Tensor:
        """Their gradients, from that of the last and what reading gives to those of every chunk, jointly."""
        return self._passed_on(after, d_read, self.query, backwards=True)

    def _passed_on(self, begin: Tensor, left: Tensor, right: Tensor, backwards: bool) -> Tensor:
        n, b, _, num_heads, head_dim = self.shape
        found = begin.new_empty(n + 1, b, num_heads, head_dim, self.state_size)
        found[-1 if backwards else 0] = begin
        # added where they go to, over which the others are passed on in place
        torch.bmm(left.transpose(1, 2), right, out=self.joint(found[:-1] if backwards else found[1:]))
        whole = self.decays.whole[..., None, None]
        for chunk in reversed(range(n)) if backwards else range(n):
            to, of = (chunk, chunk + 1) if backwards else (chunk + 1, chunk)
            found[to].addcmul_(found[of], whole[chunk])
        return found

    def joint(self, states: Tensor) -> Tensor:
        """`[n, b, H, P, N]` -> `[n b G, R P, N]`, a view."""
        return states.view(-1, self.repeats * self.shape[4], self.state_size)


def _decays(log_decay: Tensor, documents: Tensor | None, span: Span) -> Decays:
    """Return the decays of `[n, b, L, H]` logarithms."""
    logs = log_decay.transpose(2, 3).contiguous()
    length = span.length
    # column s holds the logarithms after s; their running sum over rows is the decay from s to t
    after = logs[..., None].expand(*logs.shape, length).tril(-1)
    within = torch.cumsum(after, dim=-2, out=after).exp_().tril_()
    into = logs.cumsum(dim=-1).exp_()
    if documents is not None:
        own = span.chunks(documents)
        before = F.pad(documents[span.rows], (1, 0))[:, span.start : span.tokens.stop : length].t()
        within *= (own[..., :, None] == own[..., None, :])[:, :, None]
        into *= (own == before[..., None])[:, :, None]
    # a copy: pairs are multiplied in place later
    return Decays(within, into, within[..., -1, :].clone(), into[..., -1])
