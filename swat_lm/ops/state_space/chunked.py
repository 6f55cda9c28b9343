"""The scan in chunks: linear in time and memory, forward and recomputing backward, in plain PyTorch; any device.

Inside a chunk all pairs of tokens are products of matrices, between chunks only the state passes (Mamba-2, arXiv
2405.21060, section 6). The backward keeps the inputs and the states at the beginnings of spans. Mathematics:
docs/mathematics.md.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from swat_lm.ops.precision import sum_dtype
from swat_lm.ops.state_space.spans import Part, Scan, Span, count_spans


class Grouped(NamedTuple):
    """Shapes of a span: heads stand in groups `[b n, G, L, R P]` for products with keys and queries."""

    groups: int
    repeats: int
    head_dim: int

    @classmethod
    def of(cls, scan: Scan) -> "Grouped":
        """Read them off the inputs."""
        groups = scan.key.shape[2]
        return cls(groups, scan.value.shape[2] // groups, scan.value.shape[3])

    def rows(self, x: Tensor, weights: Tensor) -> Tensor:
        """`[b, n, L, H, P]` times `[b, n, L, H]` -> `[b n G, L, R P]`, contiguous."""
        b, n, length = x.shape[:3]
        result = weights.new_empty(b, n, self.groups, length, self.repeats, self.head_dim)
        split = (self.groups, self.repeats)
        torch.mul(
            x.unflatten(3, split).transpose(2, 3), weights.unflatten(3, split).transpose(2, 3)[..., None], out=result
        )
        return result.view(-1, length, self.repeats * self.head_dim)

    def heads(self, x: Tensor, b: int) -> Tensor:
        """`[b n G, L, R P]` -> `[b, n, L, H, P]`, a view where there is one group."""
        x = x.view(b, -1, self.groups, x.shape[1], self.repeats, self.head_dim)
        return x.transpose(2, 3).flatten(3, 4)


def forward(scan: Scan, initial_state: Tensor | None, chunk_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return `(output [B, T, H, P], final_state [B, H, P, N], states before every span [spans, B, H, P, N])`."""
    batch, num_tokens, num_heads, head_dim = scan.value.shape
    output = torch.empty_like(scan.value, memory_format=torch.contiguous_format)
    shape = (batch, num_heads, head_dim, scan.key.shape[3])
    final_state = output.new_empty(shape, dtype=sum_dtype(scan.value))
    span_states = final_state.new_empty(count_spans(num_tokens, chunk_size), *shape)
    grouped = Grouped.of(scan)
    for rows in scan.row_groups(chunk_size):
        state = final_state[rows].zero_() if initial_state is None else initial_state[rows]
        for span in scan.spans(rows, chunk_size):
            span_states[span.number, rows] = state
            part = Part.of(scan, span)
            decays = part.decays
            incoming, state = _states(part, grouped, state)
            from_past = torch.bmm(part.query.flatten(0, 1), incoming.transpose(1, 2))
            result = grouped.heads(from_past, len(part.value)) * decays.into.transpose(2, 3)[..., None]
            scores = torch.matmul(part.query, part.key.transpose(2, 3))
            weights = _per_group(decays.within, grouped).mul_(scores[:, :, None])
            inside = torch.bmm(weights.flatten(0, 2), _per_head(part.value, part.step_size))
            result += inside.view(*decays.into.shape, head_dim).transpose(2, 3)
            span.chunks(output).copy_(result)
        final_state[rows] = state
    return output, final_state, span_states


def backward(
    grad_output: Tensor, grad_final_state: Tensor | None, scan: Scan, span_states: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the scan's five inputs, in their dtypes, and of the initial state; last span first."""
    results = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in scan[:5]]
    d_initial = torch.zeros_like(span_states[0])
    if grad_final_state is not None:
        d_initial.copy_(grad_final_state)
    for rows in scan.row_groups(chunk_size):
        d_state = d_initial[rows]
        for span in reversed(scan.spans(rows, chunk_size)):
            gradients, d_state = _span_backward(scan, span, grad_output, d_state, span_states[span.number, rows])
            for result, gradient in zip(results, gradients, strict=True):
                span.chunks(result).copy_(gradient)
        d_initial[rows] = d_state
    d_query, d_key, d_value, d_log_decay, d_step_size = results
    return d_query, d_key, d_value, d_log_decay, d_step_size, d_initial


def _span_backward(
    scan: Scan, span: Span, grad_output: Tensor, d_state: Tensor, state: Tensor
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return the gradients of query, key, value, log_decay and step_size, and that of the state before the span.

    With weights M[t, s] = (q[t] . k[s]) within[t, s] and u[s] = step_size[s] value[s]; S and dS' are the state before
    the chunk and the gradient of the one after it:

        du[s] = sum_t M[t, s] dy[t]  +  out[s] dS' k[s]
        dq[t] = sum_s within[t, s] (dy[t] . u[s]) k[s]  +  into[t] S^T dy[t]
        dk[s] = sum_t within[t, s] (dy[t] . u[s]) q[t]  +  out[s] dS'^T u[s]
        dS    = whole dS'  +  sum_t into[t] dy[t] q[t]^T
    """
    part, grouped, b = Part.of(scan, span), Grouped.of(scan), span.rows.stop - span.rows.start
    decays = part.decays
    d_output = span.chunks(grad_output).to(part.value.dtype)
    if scan.real is not None:
        d_output = d_output.masked_fill(~span.chunks(scan.real)[..., None, None], 0.0)
    query, key = part.query.flatten(0, 1), part.key.flatten(0, 1)
    into, out = decays.into.transpose(2, 3), decays.out.transpose(2, 3)

    # between the chunks
    incoming, _ = _states(part, grouped, state)
    d_read = grouped.rows(d_output, into)
    # gradients of the states after each chunk, and of the one before the first
    outgoing, d_state = _passed_on(
        torch.bmm(d_read.transpose(1, 2), query), decays.whole, grouped.groups, d_state,
        reversed(range(span.num_chunks)),
    )  # fmt: skip
    stored = grouped.rows(part.value, part.step_size * out)
    d_query = torch.bmm(d_read, incoming)
    d_key = torch.bmm(stored, outgoing)
    d_stored = torch.bmm(key, outgoing.transpose(1, 2))
    by_past = grouped.heads(torch.bmm(query, incoming.transpose(1, 2)).mul_(d_read), b).sum(-1).transpose(2, 3)
    by_future = grouped.heads(d_stored * stored, b).sum(-1).transpose(2, 3)
    by_both = (incoming.view(*decays.whole.shape, -1) * outgoing.view(*decays.whole.shape, -1)).sum(-1) * decays.whole
    d_input = grouped.heads(d_stored, b) * out[..., None]

    # inside them
    inputs, d_outputs = _per_head(part.value, part.step_size), _per_head(d_output, None)
    scores = torch.matmul(part.query, part.key.transpose(2, 3))
    weights = _per_group(decays.within, grouped) * scores[:, :, None]
    d_weights = torch.bmm(d_outputs, inputs.transpose(1, 2)).view(weights.shape)
    by_pairs = _sums_across((d_weights * weights).view(decays.within.shape))
    inside = torch.bmm(weights.flatten(0, 2).transpose(1, 2), d_outputs)
    d_input += inside.view(*decays.out.shape, -1).transpose(2, 3)
    d_scores = d_weights.mul_(_per_group(decays.within, grouped)).sum(2).flatten(0, 1)
    d_query = torch.baddbmm(d_query, d_scores, key)
    d_key = torch.baddbmm(d_key, d_scores.transpose(1, 2), query)

    d_logs = by_pairs + by_past.flip(-1).cumsum(-1).flip(-1) + F.pad(by_future.cumsum(-1)[..., :-1], (1, 0))
    d_logs = (d_logs + by_both[..., None]).transpose(2, 3)
    if scan.real is not None:
        d_logs = d_logs.masked_fill(~span.chunks(scan.real)[..., None], 0.0)
    d_step_size = (d_input * part.value).sum(-1)
    d_value = d_input * part.step_size[..., None]
    d_query, d_key = (
        x.view(b, span.num_chunks, grouped.groups, span.length, -1).transpose(2, 3) for x in (d_query, d_key)
    )  # fmt: skip
    return (d_query, d_key, d_value, d_logs, d_step_size), d_state


def _states(part: Part, grouped: Grouped, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return the states before each chunk, `[b n G, R P, N]`, and the one after the last, `[b, H, P, N]`."""
    stored = grouped.rows(part.value, part.step_size * part.decays.out.transpose(2, 3))
    added = torch.bmm(stored.transpose(1, 2), part.key.flatten(0, 1))
    return _passed_on(added, part.decays.whole, grouped.groups, state, range(part.decays.whole.shape[1]))


def _passed_on(
    added: Tensor, whole: Tensor, groups: int, state: Tensor, chunks: Iterable[int]
) -> tuple[Tensor, Tensor]:
    """Pass a state, or its gradient, on over the chunks in this order: what each finds, and what the last leaves.

    Every chunk decays it by `whole` and adds its own. Shapes as those of `_states`.
    """
    added = added.view(*whole.shape[:2], *state.shape[1:])
    found = torch.empty_like(added)
    for chunk in chunks:
        found[:, chunk] = state
        state = torch.addcmul(added[:, chunk], state, whole[:, chunk, :, None, None])
    return found.view(whole.shape[0] * whole.shape[1] * groups, -1, state.shape[-1]), state


def _per_head(x: Tensor, weights: Tensor | None) -> Tensor:
    """`[b, n, L, H, P]`, times `[b, n, L, H]` -> `[b n H, L, P]`, contiguous."""
    b, n, length, num_heads, head_dim = x.shape
    result = x.new_empty(b, n, num_heads, length, head_dim)
    x = x.transpose(2, 3)
    if weights is None:
        result.copy_(x)
    else:
        torch.mul(x, weights.transpose(2, 3)[..., None], out=result)
    return result.view(-1, length, head_dim)


def _per_group(within: Tensor, grouped: Grouped) -> Tensor:
    """`[b, n, H, L, L]` -> `[b n, G, R, L, L]`, a view."""
    return within.flatten(0, 1).unflatten(1, (grouped.groups, grouped.repeats))


def _sums_across(pairs: Tensor) -> Tensor:
    """Sum `[..., t, s]` over the pairs that a token stands between, s < u <= t, for every token u.

    A logarithm is in the decay of those pairs and no others. Taking the difference of sums over rows and columns would
    be cheaper and lose the gradient of a strong decay in the rounding of the weak ones.
    """
    return F.pad(pairs.cumsum(-1).tril_(-1).sum(-2)[..., :-1], (1, 0))
