"""The scan in chunks: linear in time and memory, forward and recomputing backward, in plain PyTorch; any device.

Inside a chunk all pairs of tokens are products of matrices, between chunks only the state passes (Mamba-2, arXiv
2405.21060, section 6). The backward keeps the inputs and the states at the beginnings of spans. Mathematics:
docs/mathematics.md.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from swat_lm.ops.precision import sum_dtype
from swat_lm.ops.state_space.spans import Part, Scan, Span, count_spans


def forward(scan: Scan, initial_state: Tensor | None, chunk_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return `(output [B, T, H, P], final_state [B, H, P, N], states before every span [spans, B, H, P, N])`."""
    batch, num_tokens, num_heads, head_dim = scan.value.shape
    output = torch.empty_like(scan.value, memory_format=torch.contiguous_format)
    shape = (batch, num_heads, head_dim, scan.key.shape[3])
    final_state = output.new_empty(shape, dtype=sum_dtype(scan.value))
    span_states = final_state.new_empty(count_spans(num_tokens, chunk_size), *shape)
    for rows in scan.row_groups(chunk_size):
        state = final_state[rows].zero_() if initial_state is None else initial_state[rows]
        for span in scan.spans(rows, chunk_size):
            span_states[span.number, rows] = state
            part = Part(scan, span)
            states, decays = part.states(state), part.decays
            from_past = torch.bmm(part.query, part.joint(states[:-1]).transpose(1, 2))
            scores = torch.bmm(part.query, part.key.transpose(1, 2))
            weights = part.per_group(decays.within).mul_(scores.view(-1, part.groups, 1, span.length, span.length))
            inside = torch.bmm(weights.flatten(0, 2), part.per_head(part.value, part.step_size))
            result = part.per_token(inside)
            result.addcmul_(part.apart(from_past), decays.into.transpose(2, 3)[..., None])
            if scan.skip is not None:
                result.addcmul_(part.value, scan.skip.to(result.dtype)[:, None])
            span.chunks(output).copy_(result)
            state = states[-1]
        final_state[rows] = state
    return output, final_state, span_states


def backward(
    grad_output: Tensor, grad_final_state: Tensor | None, scan: Scan, span_states: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the scan's five inputs, in their dtypes, of the initial state and of the skip connection.

    The last is `[H]`, zeros where there is none. The last span goes first.
    """
    results = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in scan[:5]]
    d_skip = span_states.new_zeros(scan.value.shape[2])
    d_initial = torch.zeros_like(span_states[0])
    if grad_final_state is not None:
        d_initial.copy_(grad_final_state)
    for rows in scan.row_groups(chunk_size):
        d_state = d_initial[rows]
        for span in reversed(scan.spans(rows, chunk_size)):
            gradients, d_state = _span_backward(
                scan, span, grad_output, d_state, span_states[span.number, rows], d_skip
            )
            for result, gradient in zip(results, gradients, strict=True):
                span.chunks(result).copy_(gradient)
        d_initial[rows] = d_state
    d_query, d_key, d_value, d_log_decay, d_step_size = results
    d_skip = d_skip if scan.skip is None else d_skip.to(scan.skip.dtype)
    return d_query, d_key, d_value, d_log_decay, d_step_size, d_initial, d_skip


def _span_backward(
    scan: Scan, span: Span, grad_output: Tensor, d_state: Tensor, state: Tensor, d_skip: Tensor
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return the gradients of query, key, value, log_decay and step_size, and that of the state before the span.

    That of the skip connection is added to `d_skip`.

    With weights M[t, s] = (q[t] . k[s]) within[t, s] and u[s] = step_size[s] value[s]; S and dS' are the state before
    the chunk and the gradient of the one after it:

        du[s] = sum_t M[t, s] dy[t]  +  out[s] dS' k[s]
        dq[t] = sum_s within[t, s] (dy[t] . u[s]) k[s]  +  into[t] S^T dy[t]
        dk[s] = sum_t within[t, s] (dy[t] . u[s]) q[t]  +  out[s] dS'^T u[s]
        dS    = whole dS'  +  sum_t into[t] dy[t] q[t]^T
    """
    part = Part(scan, span)
    decays, query, key = part.decays, part.query, part.key
    d_output = span.chunks(grad_output).to(part.value.dtype)
    if scan.real is not None:
        d_output = d_output.masked_fill(~span.chunks(scan.real)[..., None, None], 0.0)
    into, out = decays.into.transpose(2, 3), decays.out.transpose(2, 3)

    # between the chunks
    states = part.states(state)[:-1]
    d_read = part.jointly(d_output, into)
    # of the state before each chunk, and of the one after the last
    d_states = part.d_states(d_state, d_read)
    incoming, outgoing = part.joint(states), part.joint(d_states[1:])
    by_past = part.apart(torch.bmm(query, incoming.transpose(1, 2)).mul_(d_read)).sum(-1).transpose(2, 3)
    by_both = (states.flatten(3) * d_states[1:].flatten(3)).sum(-1).mul_(decays.whole)
    d_query = torch.bmm(d_read, incoming)
    d_key = torch.bmm(part.stored, outgoing)
    d_stored = torch.bmm(key, outgoing.transpose(1, 2))
    d_input = part.apart(d_stored) * out[..., None]
    by_future = part.apart(d_stored.mul_(part.stored)).sum(-1).transpose(2, 3)

    # inside them
    inputs, d_outputs = part.per_head(part.value, part.step_size), part.per_head(d_output, None)
    within = part.per_group(decays.within)
    scores = torch.bmm(query, key.transpose(1, 2)).view(-1, part.groups, 1, span.length, span.length)
    d_weights = part.per_group(torch.bmm(d_outputs, inputs.transpose(1, 2))).mul_(within)
    d_scores = d_weights.sum(2).flatten(0, 1)
    weights = within.mul_(scores).flatten(0, 2)
    d_input += part.per_token(torch.bmm(weights.transpose(1, 2), d_outputs))
    d_query = torch.baddbmm(d_query, d_scores, key)
    d_key = torch.baddbmm(d_key, d_scores.transpose(1, 2), query)
    by_pairs = _sums_across(d_weights.mul_(scores).view(decays.within.shape))

    d_logs = by_pairs + by_past.flip(-1).cumsum(-1).flip(-1) + F.pad(by_future.cumsum(-1)[..., :-1], (1, 0))
    d_logs = (d_logs + by_both[..., None]).transpose(2, 3)
    if scan.real is not None:
        d_logs = d_logs.masked_fill(~span.chunks(scan.real)[..., None], 0.0)
    d_step_size = (d_input * part.value).sum(-1)
    d_value = d_input.mul_(part.step_size[..., None])
    if scan.skip is not None:
        d_value.addcmul_(d_output, scan.skip.to(d_value.dtype)[:, None])
        d_skip += (d_output * part.value).sum((0, 1, 2, 4))
    d_query, d_key = (x.view(*part.shape[:2], part.groups, span.length, -1).transpose(2, 3) for x in (d_query, d_key))
    return (d_query, d_key, d_value, d_logs, d_step_size), d_states[0]


def _sums_across(pairs: Tensor) -> Tensor:
    """Sum `[..., t, s]` over the pairs that a token stands between, s < u <= t, for every token u; in place.

    A logarithm is in the decay of those pairs and no others. Taking the difference of sums over rows and columns would
    be cheaper and lose the gradient of a strong decay in the rounding of the weak ones.
    """
    return F.pad(torch.cumsum(pairs, dim=-1, out=pairs).tril_(-1).sum(-2)[..., :-1], (1, 0))
