"""Full attention of a block of queries over blocks of keys: no score of more than one block of each ever exists.

Forward, the normaliser of a row is kept up to date as its keys come (online softmax, arXiv 1805.02867); backward, all
weights come again from the final one, and `rowsum(dO * O)` is of the whole output, never of one block's (blockwise
parallel transformers, arXiv 2305.19370). Sigmoid weights need neither. What PyTorch's fused kernel computes goes to it.
Legend: B sequences, T queries, S keys, H query heads, K key/value heads, D head size.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swat_lm.ops import full_softmax
from swat_lm.ops.calls import AttentionCall
from swat_lm.ops.head_bias import HeadBias, head_bias, score_dtype
from swat_lm.ops.window_attention import window_attention

__all__ = ["streamed_attention"]


def streamed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_block: int,
    score_function: str = "sigmoid",
    slopes: Tensor | None = None,
    score_bias: float | Tensor = 0.0,
    scale: float | None = None,
    first_visible: Tensor | None = None,
    softcap: float | None = None,
    hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `window_attention` with `window=None` of the last T of S places; biases get no gradient.

    Args:
        query: `[B, T, H, D]`, rotated.
        key, value: `[B, S, K, D]`, S at least T.
        key_block: keys whose scores exist at once.
        score_function, slopes, score_bias, scale, first_visible, softcap, hidden: as in `window_attention`.

    Returns:
        `[B, T, H, D]` in the query's dtype, and for softmax the lse `[B, T, H]`; for sigmoid it is empty.

    Raises:
        ValueError: fewer keys than queries, a block without keys, or a bias that wants a gradient.
    """
    if key.shape[1] < query.shape[1]:
        raise ValueError(f"key: expected at least the {query.shape[1]} places of the queries, got {key.shape[1]}")
    if key_block < 1:
        raise ValueError(f"key_block: expected at least 1, got {key_block}")
    if any(isinstance(each, Tensor) and each.requires_grad for each in (slopes, score_bias)):
        raise ValueError("score_bias: slopes and biases get no gradient here; use window_attention")
    tensor = score_bias if isinstance(score_bias, Tensor) else None
    number = 0.0 if isinstance(score_bias, Tensor) else float(score_bias)
    factor = query.shape[-1] ** -0.5 if scale is None else float(scale)
    whole = AttentionCall(
        query, key, value, None, score_function, factor, slopes, tensor, number, first_visible, softcap=softcap,
        hidden=hidden,
    )  # fmt: skip
    if slopes is None and full_softmax.serves(whole):
        # it holds smaller blocks still
        output, lse = window_attention(
            query, key, value, window=None, score_function=score_function, score_bias=score_bias, scale=factor,
            first_visible=first_visible, return_lse=True, backend="blocked",
        )  # fmt: skip
        return output, lse
    bias = head_bias(slopes, tensor, number, query)
    call = Call(bias, first_visible, hidden, score_function == "softmax", factor, softcap, key_block, query.shape[1])
    return _Streamed.apply(query, key, value, call)


class Call(NamedTuple):
    """What all blocks share."""

    bias: HeadBias
    first: Tensor | None
    hidden: Tensor | None
    softmax: bool
    scale: float
    softcap: float | None
    key_block: int
    num_queries: int

    def spans(self, num_keys: int) -> Iterator[slice]:
        """Blocks of keys that any query may see."""
        begin = 0 if self.first is None or not self.first.numel() else max(0, int(self.first.min()))
        for start in range(begin - begin % self.key_block, num_keys, self.key_block):
            yield slice(start, min(start + self.key_block, num_keys))

    def tile(self, query: Tensor, key: Tensor, span: slice, num_keys: int) -> tuple[Tensor, Tensor | None]:
        """Scores `[B, K, G, T, keys]`, -inf where nothing is seen, and where they are capped the cap's derivative."""
        scores, derivative = torch.einsum("btkgd,bskd->bkgts", query, key) * self.scale, None
        if self.softcap is not None:
            bounded = torch.tanh(scores / self.softcap)
            scores, derivative = bounded * self.softcap, 1 - bounded.square()
        index = torch.arange(span.start, span.stop, device=query.device)
        own = torch.arange(num_keys - self.num_queries, num_keys, device=query.device)
        distance = own[:, None] - index
        scores += self.bias.at(distance).unflatten(0, scores.shape[1:3])
        outside = (distance < 0).expand(len(scores), -1, -1)
        if self.first is not None:
            outside = outside | (index < self.first[:, :, None])
        if self.hidden is not None:
            outside = outside | self.hidden[:, None, span]
        return scores.masked_fill_(outside[:, None, None], float("-inf")), derivative


class _Streamed(torch.autograd.Function):
    """Saves queries, keys, values, the output and its lse."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        grouped, num_keys = grouped_query(query, key), key.shape[1]
        total = torch.zeros_like(grouped)
        largest = grouped.new_full((*grouped.shape[:-1], 1), float("-inf"))
        norm = torch.zeros_like(largest)
        for span in call.spans(num_keys):
            scores, _ = call.tile(grouped, key[:, span].to(grouped.dtype), span, num_keys)
            part = value[:, span].to(grouped.dtype)
            if not call.softmax:
                total += torch.einsum("bkgts,bskd->btkgd", scores.sigmoid_(), part)
                continue
            new = torch.maximum(largest, in_rows(scores.amax(dim=-1, keepdim=True)))
            # a row that has seen nothing yet
            safe = new.masked_fill(new == float("-inf"), 0.0)
            weights = scores.sub_(in_tiles(safe)).exp_()
            keep = (largest - safe).exp_()
            norm = norm * keep + in_rows(weights.sum(dim=-1, keepdim=True))
            total = total * keep + torch.einsum("bkgts,bskd->btkgd", weights, part)
            largest = new
        lse = grouped.new_empty(0)
        if call.softmax:
            total /= norm.masked_fill(norm == 0, 1.0)
            lse = (largest + norm.log()).squeeze(-1)
        output = total.to(query.dtype)
        ctx.call = call
        ctx.save_for_backward(query, key, value, output, lse)
        return output.flatten(2, 3), lse.flatten(2, 3) if call.softmax else lse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, output, lse = ctx.saved_tensors
        call: Call = ctx.call
        grouped, num_keys = grouped_query(query, key), key.shape[1]
        d_output = gradients[0].unflatten(2, grouped.shape[2:4]).to(grouped.dtype)
        shift = None
        if call.softmax:
            shift = (d_output * output.to(grouped.dtype)).sum(dim=-1, keepdim=True)
            # a row that sees nothing has no weights, and whatever its lse's gradient is must not reach anything
            shift -= (
                gradients[1].unflatten(2, grouped.shape[2:4]).unsqueeze(-1).masked_fill(lse[..., None] == -torch.inf, 0)
            )
            lse = in_tiles(lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1))
        d_query = torch.zeros_like(grouped)
        d_key, d_value = (torch.zeros(each.shape, dtype=grouped.dtype, device=each.device) for each in (key, value))
        for span in call.spans(num_keys):
            keys, values = key[:, span].to(grouped.dtype), value[:, span].to(grouped.dtype)
            scores, derivative = call.tile(grouped, keys, span, num_keys)
            weights = scores.sub_(lse).exp_() if call.softmax else scores.sigmoid_()
            d_value[:, span] = torch.einsum("bkgts,btkgd->bskd", weights, d_output)
            d_scores = torch.einsum("btkgd,bskd->bkgts", d_output, values)
            if shift is not None:
                d_scores = d_scores.sub_(in_tiles(shift)).mul_(weights)
            else:
                d_scores.mul_(weights).mul_(1 - weights)
            if derivative is not None:
                d_scores.mul_(derivative)
            d_query += torch.einsum("bkgts,bskd->btkgd", d_scores, keys) * call.scale
            d_key[:, span] = torch.einsum("bkgts,btkgd->bskd", d_scores, grouped) * call.scale
        return d_query.flatten(2, 3).to(query.dtype), d_key.to(key.dtype), d_value.to(value.dtype), None


def grouped_query(query: Tensor, key: Tensor) -> Tensor:
    """`[B, T, K, H / K, D]` in the precision of scores."""
    return query.unflatten(2, (key.shape[2], query.shape[2] // key.shape[2])).to(score_dtype(query))


def in_rows(tile: Tensor) -> Tensor:
    """`[B, K, G, T, X]` -> `[B, T, K, G, X]`."""
    return tile.permute(0, 3, 1, 2, 4)


def in_tiles(rows: Tensor) -> Tensor:
    """`[B, T, K, G, X]` -> `[B, K, G, T, X]`."""
    return rows.permute(0, 2, 3, 1, 4)
