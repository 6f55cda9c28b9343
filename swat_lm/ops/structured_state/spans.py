"""A chunk after a state: spans of tokens as products with matrices that are made once, states from span to span.

What a chunk adds and what it makes of a state that is not known yet are apart, so that whoever holds the state may be
asked once for it. Legend: R rows, T tokens, M channels, N numbers of a state, Q tokens of a span, S spans.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from swat_lm.ops.long_convolution import toeplitz
from swat_lm.ops.structured_state.products import columns, power_of_each, product, rows
from swat_lm.ops.structured_state.system import Discrete

LONGEST = 64


class Spans(NamedTuple):
    """What a span of Q tokens does, in the precision of the state."""

    powers: list[Tensor]
    """The matrix to 1, 2, 4, ..., Q, each `[M, N, N]`."""
    written: Tensor
    """`[M, N, Q]`: what each token leaves in the state after the span."""
    read: Tensor
    """`[M, Q, N]`: what each token sees of the state before the span."""
    within: Tensor
    """`[M, Q, Q]`: what each token sees of the span's tokens."""

    @property
    def length(self) -> int:
        """Q."""
        return self.within.shape[1]


def span_length(num_tokens: int) -> int:
    """Q for a chunk of T tokens: a power of two."""
    return min(LONGEST, 1 << max(0, num_tokens - 1).bit_length())


def make_spans(discrete: Discrete, row: Tensor, powers: list[Tensor], length: int, dtype: torch.dtype) -> Spans:
    """Spans of Q tokens, a power of two; `powers` are squares up to the power Q at least, `row` reads a state."""
    count = length.bit_length()
    moved = columns(powers[: count - 1], discrete.entry, length)
    seen = rows(powers[: count - 1], row, length)
    taps = product(seen, discrete.entry[..., None])[..., 0]
    found = (*powers[:count], moved.flip(2), product(seen, discrete.matrix), toeplitz(taps, None, length))
    *matrices, written, read, within = (x.to(dtype) for x in found)
    return Spans(matrices, written, read, within)


def run(x: Tensor, counts: Tensor | None, spans: Spans) -> tuple[Tensor, Tensor]:
    """Outputs `[R, T, M]` of rows after nothing, and the states `[R, M, N]` after their last tokens.

    `counts`, int64 `[R]`: tokens of each row, zeros after them; None: T.
    """
    num_rows, num_tokens, channels = x.shape
    length = spans.length
    count = -(-num_tokens // length)
    cut = F.pad(x, (0, 0, 0, count * length - num_tokens)).unflatten(1, (count, length))
    # [M, Q, S R]
    inputs = cut.permute(3, 2, 1, 0).flatten(2)
    added = product(spans.written, inputs).unflatten(2, (count, num_rows))
    state = added.new_zeros(channels, added.shape[1], num_rows)
    states = [state]
    for number in range(count):
        state = product(spans.powers[-1], state) + added[:, :, number]
        states.append(state)
    before = torch.stack(states[:-1], dim=2).flatten(2)
    output = product(spans.within, inputs) + product(spans.read, before)
    output = output.unflatten(2, (count, num_rows)).permute(3, 2, 1, 0).flatten(1, 2)[:, :num_tokens]
    if counts is None:
        counts = torch.full((num_rows,), num_tokens, device=x.device)
    return output, _after_whole_spans(states, counts, spans) + _rest(x, counts, spans)


def passed(state: Tensor, counts: Tensor, num_tokens: int, spans: Spans) -> tuple[Tensor, Tensor]:
    """What T tokens see of the states `[R, M, N]` before them, `[R, T, M]`, and the states that many tokens later."""
    count = -(-num_tokens // spans.length)
    states = [state.permute(1, 2, 0)]
    for _ in range(count):
        states.append(product(spans.powers[-1], states[-1]))
    output = product(spans.read, torch.stack(states[:-1], dim=2).flatten(2))
    output = output.unflatten(2, (count, -1)).permute(3, 2, 1, 0).flatten(1, 2)[:, :num_tokens]
    return output, _after_whole_spans(states, counts, spans)


def _after_whole_spans(states: list[Tensor], counts: Tensor, spans: Spans) -> Tensor:
    """The state after a row's last whole span, moved on by its tokens after that, `[R, M, N]`."""
    whole, rest = counts // spans.length, counts % spans.length
    row = torch.arange(len(counts), device=counts.device)
    held = torch.stack(states).permute(3, 0, 1, 2)[row, whole]
    return power_of_each(spans.powers[:-1], held, rest)


def _rest(x: Tensor, counts: Tensor, spans: Spans) -> Tensor:
    """What the tokens after a row's last whole span add to its state, `[R, M, N]`."""
    place = counts[:, None] + torch.arange(-spans.length, 0, device=counts.device)
    own = place >= (counts // spans.length * spans.length)[:, None]
    row = torch.arange(len(counts), device=counts.device)[:, None]
    inputs = torch.where(own[..., None], x[row, place.clamp(min=0)], 0.0)
    return product(spans.written, inputs.permute(2, 1, 0)).permute(2, 0, 1)


def step(x: Tensor, matrix: Tensor, entry: Tensor, row: Tensor, state: Tensor, by_row: bool) -> tuple[Tensor, Tensor]:
    """One token `[B, M]` after states `[B, M, N]`: what is read of the state after it, and that state.

    `by_row`: no row's sums depend on how many there are beside it.
    """
    columns = state.permute(1, 2, 0)
    if by_row:
        moved = torch.cat([product(matrix, columns[:, :, b : b + 1]) for b in range(len(x))], dim=2).permute(2, 0, 1)
    else:
        moved = product(matrix, columns).permute(2, 0, 1)
    moved = moved + x[..., None] * entry
    return (moved * row).sum(2), moved
