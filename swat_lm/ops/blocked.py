"""Windowed attention in plain PyTorch, O(T * window) time and memory, forward and recomputing backward; any device.

The band of visible pairs is cut into tiles; a tile's bias, -inf where a pair is not visible, enters the product as its
addend, and one scratch of scores serves all tiles: fresh large temporaries fault in their pages, which on a CPU costs
40 % on top of products and sigmoids. The backward saves query, key and value only. Mathematics: docs/mathematics.md.
"""

from itertools import chain

import torch
from torch import Tensor

from swat_lm.ops import full_softmax
from swat_lm.ops.bands import Band
from swat_lm.ops.calls import AttentionCall
from swat_lm.ops.head_bias import HeadBias, score_dtype
from swat_lm.ops.key_gradients import ApartTiles, KeySums, SkewedTiles
from swat_lm.ops.tile_batches import Scratch, TileBatch, TilesOfHead, key_groups


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Return `(output [B, T, H, D], lse [B, T, H])`; the lse is empty for sigmoid."""
    if full_softmax.serves(call):
        return full_softmax.forward(call)
    dtype = score_dtype(call.query)
    q, k, v = call.query.to(dtype), call.key.to(dtype), call.value.to(dtype)
    output = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[:3] if call.softmax else (0,))
    band = Band.of(q.shape[1], k.shape[1], call.window, q.device)
    scratch = Scratch(q)
    groups = key_groups(band, call.head_bias(), q.shape[0], k.shape[2], call.first_visible, call.last_visible)
    for batch in chain.from_iterable(group.batches for group in groups):
        rows = batch.rows(q)
        scores, _ = _scores(batch, rows, batch.keys(k), call, scratch)
        if call.softmax:
            weights = _softmax(scores, scratch.take("weights", *scores.shape), batch.rows(lse))
        else:
            weights = torch.sigmoid(scores, out=scores)
        batch.rows(output).copy_(torch.bmm(weights, batch.keys(v), out=scratch.take("result", *rows.shape)))
    return output.to(call.query.dtype), lse


def backward(
    call: AttentionCall, grad_output: Tensor, grad_lse: Tensor | None, needs_per_head: bool
) -> tuple[Tensor, Tensor, Tensor, HeadBias]:
    """Return the gradients of query, key, value and of the bias (zeros unless `needs_per_head`).

    With weights P and dP = dO V^T: dV = P^T dO; dS = dP * P * (1 - P) for sigmoid and
    dS = P * (dP - rowsum(P * dP) + dlse) for softmax; d slope = sum(dS * distance); d constant = sum(dS);
    dQ = scale * dS K; dK = scale * dS^T Q, where a softcap c has multiplied dS by 1 - tanh(scale * q.k / c)^2.
    """
    dtype, bias, softmax, scale = score_dtype(call.query), call.head_bias(), call.softmax, call.scale
    if grad_lse is None and call.slopes is None and full_softmax.serves(call, needs_per_head):
        # a call with a number for each distance is not the kernel's
        nothing = HeadBias(torch.zeros_like(bias.slopes), torch.zeros_like(bias.constant))
        return *full_softmax.backward(call, grad_output), nothing
    q, k, v, d_output = (t.to(dtype) for t in (call.query, call.key, call.value, grad_output))
    d_lse = None if grad_lse is None else grad_lse.to(dtype)
    d_query = torch.empty_like(q, memory_format=torch.contiguous_format)
    scratch = Scratch(q)
    d_key, d_value = (
        KeySums(torch.empty_like(x, memory_format=torch.contiguous_format), name, scratch)
        for x, name in ((k, "d_key"), (v, "d_value"))
    )
    # one number per head out of a whole call's pairs, whose signs cancel: summed in float64
    d_bias = HeadBias(*(None if t is None else torch.zeros_like(t, dtype=torch.float64) for t in bias))  # type: ignore[arg-type]
    band = Band.of(q.shape[1], k.shape[1], call.window, q.device)
    disjoint = not band.is_narrow
    for group in key_groups(band, bias, q.shape[0], k.shape[2], call.first_visible, call.last_visible, disjoint):
        d_key.begin(group)
        d_value.begin(group)
        for batch in group.batches:
            layout = (
                SkewedTiles(batch, scratch)
                if isinstance(batch, TilesOfHead) and not disjoint
                else ApartTiles(batch, scratch)
            )
            rows, d_rows = layout.rows(q, "rows"), layout.rows(d_output, "d_rows")
            columns = batch.keys(k)
            # two buffers serve four matrices: scores, then dP; weights, then dS
            scores, derivative = _scores(batch, rows, columns, call, scratch)
            weights = layout.weights(scores.shape)
            if softmax:
                _softmax(scores, weights, None)
            else:
                torch.sigmoid(scores, out=weights)
            layout.add(d_value, weights, d_rows, 1.0)
            torch.bmm(d_rows, batch.keys(v).transpose(1, 2), out=scores)
            if softmax:
                _softmax_backward(scores, weights, None if d_lse is None else batch.rows(d_lse))
            else:
                torch.ops.aten.sigmoid_backward.grad_input(scores, weights, grad_input=weights)
            if needs_per_head:
                batch.add_per_head(weights, d_bias)
            if derivative is not None:
                weights.mul_(derivative)
            result = scratch.take("result", *rows.shape)
            torch.baddbmm(result, weights, columns, beta=0, alpha=scale, out=result)
            batch.rows(d_query).copy_(result)
            layout.add(d_key, weights, rows, scale)
        d_key.end()
        d_value.end()
    return (
        d_query.to(call.query.dtype),
        d_key.total.to(call.key.dtype),
        d_value.total.to(call.value.dtype),
        d_bias,
    )


def _scores(
    batch: TileBatch, rows: Tensor, columns: Tensor, call: AttentionCall, scratch: Scratch
) -> tuple[Tensor, Tensor | None]:
    """The scores `[N, rows, keys]`, and where there is a softcap their derivative by the products that it caps."""
    derivative = None
    scores = scratch.take("scores", rows.shape[0], rows.shape[1], columns.shape[1])
    if call.softcap is None:
        torch.baddbmm(batch.bias.expand(scores.shape), rows, columns.transpose(1, 2), alpha=call.scale, out=scores)
    else:
        torch.bmm(rows, columns.transpose(1, 2), out=scores).mul_(call.scale / call.softcap).tanh_()
        derivative = torch.mul(scores, scores, out=scratch.take("derivative", *scores.shape)).neg_().add_(1)
        scores.mul_(call.softcap).add_(batch.bias)
    if batch.tiles.hidden is not None:
        scores.masked_fill_(batch.tiles.hidden, float("-inf"))
    if call.hidden is not None:
        scores.masked_fill_(_hidden_keys(batch, call.hidden, call.key), float("-inf"))
    return scores, derivative


def _hidden_keys(batch: TileBatch, hidden: Tensor, key: Tensor) -> Tensor:
    """`[B, S]` as the batch's keys, bool `[N, 1, keys]`."""
    return batch.keys(hidden[:, :, None, None].expand(*key.shape[:3], 1)).transpose(1, 2)


def _softmax(scores: Tensor, weights: Tensor, lse: Tensor | None) -> Tensor:
    if scores.shape[-1] == 0:
        if lse is not None:
            lse.fill_(float("-inf"))
        return weights
    largest = scores.amax(dim=-1)
    torch.softmax(scores, dim=-1, out=weights)
    empty = largest == float("-inf")
    if bool(empty.any()):
        weights.masked_fill_(empty[..., None], 0.0)
    if lse is not None:
        # the largest weight is exp(largest - lse), and never below 1 / keys: no sum over the row is needed
        lse.copy_(torch.where(empty, largest, largest - weights.amax(dim=-1).log()))
    return weights


def _softmax_backward(d_weights: Tensor, weights: Tensor, d_lse: Tensor | None) -> None:
    """Turn the weights into the gradient of the scores, in place."""
    shift = (d_weights * weights).sum(dim=-1, keepdim=True)
    if d_lse is not None:
        # a row that sees nothing has weights of zero, and whatever its lse's gradient is must not reach anything
        shift -= d_lse[..., None].where(weights.sum(dim=-1, keepdim=True) > 0, 0.0)
    weights.mul_(d_weights.sub_(shift))
