"""Attention over keys that were selected by their scores, and over a window (SPARSEK, arXiv 2406.16747), in PyTorch.

A key that leaves the window enters among the candidates; row i sees the k largest that have entered, each weighed by
`p = clip(score - tau_i, 0, 1)` (`swat_lm.ops.capped_simplex`), and the window whole, in one softmax over the union. C
rows that follow one another touch the k candidates from before them, the C that enter with them and the window: one
dense product, no gathers of single rows. Time and memory are linear in T; the backward pass recomputes. Derivations:
docs/mathematics.md.

Legend: B sequences, T rows, P items before them, W window, K key/value heads, G query heads of each, D head size, k
selected, M candidates from before, C rows of a block, g blocks at once, n = k + C + W columns of a block.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from swat_lm.ops.capped_simplex import NONE, capped_simplex
from swat_lm.ops.head_bias import score_dtype

MASKINGS = ("value", "both", "straight")
"""What p multiplies: the value; value and key; nothing, with the gradient as if it were the value."""
ELEMENTS = 2**19
"""Scores that are held at once, about."""


class SelectedCall(NamedTuple):
    """The arguments of the op, in its order."""

    query: Tensor
    """`[B, T, H, D]`."""
    key: Tensor
    """`[B, P + T, K, D]`, P at most W."""
    value: Tensor
    kept_key: Tensor
    """`[B, K, k, D]`: of the k largest candidates from before, the largest first."""
    kept_value: Tensor
    scores: Tensor
    """float64 `[B, K, M + T]`: candidates from before, then what enters with each row; `-inf` for none."""
    tau: Tensor
    """float64 `[B, K, T]`."""
    chosen: Tensor
    """int64 `[B, K, M + T]`: rows in which a candidate is among the k largest, from the one it enters with."""
    held: Tensor
    """int64 `[B, K, blocks, k]`: the k largest candidates before each block."""
    first_visible: Tensor | None
    """int32 `[B, T]`, the first item that a row may see; None: all."""
    hidden: Tensor | None
    """bool `[B, P + T]`, items that nobody sees."""
    window: int
    block: int
    scale: float
    score_bias: float
    softmax: bool
    masking: str


@dataclass
class Blocks:
    """Some blocks of one head of one sequence, as tables `[g, C, ...]`."""

    rows: Tensor
    """`[g, C, G, D]`, queries."""
    keys: Tensor
    """`[g, n, D]`: of the candidates from before, then of items."""
    values: Tensor
    hidden: Tensor
    """bool `[g, C, n]`."""
    weight: Tensor
    """`[g, C, k + C]`, p of the candidates; 1 where a column is none."""
    unselected: Tensor
    """bool `[g, C, k + C]`."""
    index: Tensor
    """int64 `[g, k + C]`: which of all candidates."""
    pool: Tensor
    """int64 `[g, k]`: where those from before lie among kept ones followed by items."""
    first: int
    """The first block's number."""

    @property
    def num_candidates(self) -> int:
        """k + C."""
        return self.weight.shape[-1]


class Laid:
    """A call laid out in whole blocks: rows filled up behind, items filled up before to W."""

    def __init__(self, call: SelectedCall) -> None:
        self.call, block, window = call, call.block, call.window
        num_rows, device = call.query.shape[1], call.query.device
        self.num_rows, self.num_blocks = num_rows, -(-num_rows // block)
        self.missing, self.absent = self.num_blocks * block - num_rows, window - call.key.shape[1] + num_rows
        dtype = self.dtype = score_dtype(call.query)
        self.kv_heads = call.key.shape[2]
        self.query = F.pad(call.query.to(dtype), (0, 0, 0, 0, 0, self.missing)).unflatten(2, (self.kv_heads, -1))
        self.key, self.value = (
            F.pad(x.to(dtype), (0, 0, 0, 0, self.absent, self.missing)) for x in (call.key, call.value)
        )
        self.num_kept, self.most = call.kept_key.shape[2], call.scores.shape[-1] - num_rows
        first, hidden = call.first_visible, call.hidden
        # rows that fill up see nothing, where that is asked for
        self.first = None if first is None else F.pad(first.clamp(min=0) + self.absent, (0, self.missing), value=2**30)
        self.blind = None if hidden is None else F.pad(hidden, (self.absent, self.missing))
        self.scores = F.pad(call.scores, (0, self.missing), value=NONE)
        self.chosen = F.pad(call.chosen, (0, self.missing))
        # filled up with the last row's, by which differences are taken
        self.tau = torch.cat((call.tau, call.tau[..., -1:].expand(*call.tau.shape[:2], self.missing)), dim=-1)
        self.own = torch.arange(block, device=device)
        columns = torch.arange(block + window, device=device)
        # of a block's own items: those outside the window, and those that enter with a later row
        self.outside = (columns <= self.own[:, None]) | (columns > self.own[:, None] + window)
        self.later = self.own > self.own[:, None]

    @cached_property
    def steps(self) -> list[slice]:
        """Which blocks are processed together."""
        columns = self.num_kept + self.call.block + self.call.window
        size = max(1, ELEMENTS // (self.call.block * self.query.shape[3] * columns))
        return [slice(at, min(at + size, self.num_blocks)) for at in range(0, self.num_blocks, size)]

    @cached_property
    def may_see_nothing(self) -> bool:
        """Whether there may be rows without a single key; otherwise every row sees itself."""
        return not self.call.window or self.first is not None or self.blind is not None

    def parts(self, sequence: int, head: int) -> Iterator[Blocks]:
        """All blocks of one key/value head of one sequence."""
        call, block, kept = self.call, self.call.block, self.num_kept
        scores, chosen, tau = (x[sequence, head] for x in (self.scores, self.chosen, self.tau))
        # the row after the last in which a candidate is selected
        end = (torch.arange(len(chosen), device=chosen.device) - self.most).clamp(min=0) + chosen
        pools, spans = [], []
        for kept_items, items in ((call.kept_key, self.key), (call.kept_value, self.value)):
            pools.append(torch.cat((kept_items[sequence, head].to(self.dtype), items[sequence, :, head])))
            # the items of a block, [blocks, C + W, D]: they overlap
            spans.append(items[sequence, :, head].unfold(0, block + call.window, block).transpose(1, 2))
        for some in self.steps:
            base = block * torch.arange(some.start, some.stop, device=chosen.device)[:, None]
            candidates = call.held[sequence, head, some]
            pool = torch.where(
                candidates < self.most, candidates.clamp(max=max(kept - 1, 0)), candidates - self.most + kept
            )
            index = torch.cat((candidates, self.most + base + self.own), dim=1)
            # whether a row comes before the end, in few bits
            until = (end[index] - base).clamp(0, block).to(torch.int16)
            unselected = self.own.to(torch.int16)[:, None] >= until[:, None]
            unselected[..., kept:] |= self.later
            keys, values = (torch.cat((x[pool], span[some]), dim=1) for x, span in zip(pools, spans, strict=True))
            yield Blocks(
                self.query[sequence, :, head].unflatten(0, (-1, block))[some], keys, values,
                self._hidden(sequence, some, base, unselected),
                self._weight(scores[index], tau[base + self.own], unselected),
                unselected, index, pool, some.start,
            )  # fmt: skip

    def _hidden(self, sequence: int, some: slice, base: Tensor, unselected: Tensor) -> Tensor:
        """bool `[g, C, n]`: what a row does not see."""
        call, kept = self.call, self.num_kept
        outside = self.outside.expand(len(unselected), -1, -1)
        if self.first is not None or self.blind is not None or some.start * call.block < self.absent:
            item = base + torch.arange(call.block + call.window, device=base.device)
            if self.first is None:
                outside = outside | (item < self.absent)[:, None]
            else:
                outside = outside | (item[:, None] < self.first[sequence][base + self.own][..., None])
            if self.blind is not None:
                outside = outside | self.blind[sequence][item][:, None]
        hidden = torch.cat((unselected[..., :kept], outside), dim=-1)
        hidden[..., kept : kept + call.block] &= unselected[..., kept:]
        return hidden

    def _weight(self, scores: Tensor, tau: Tensor, unselected: Tensor) -> Tensor:
        """p `[g, C, k + C]` of scores `[g, k + C]` and thresholds `[g, C]`; 1 where a column is not selected."""
        # only differences near a threshold count: moved by one of them, float32 holds them as well as float64
        middle = tau[:, -1:].nan_to_num(neginf=0.0)
        scores, tau = ((x - middle).to(self.dtype) for x in (scores, tau))
        # some of these columns are of the window, for other rows
        return (scores[:, None] - tau[..., None]).clamp_(0, 1).masked_fill_(unselected, 1.0)

    def free(self, sequence: int, head: int, part: Blocks) -> Tensor:
        """bool `[g, C, k + C]`: selected, with 0 < p < 1; by the comparisons that counted them."""
        rows = self.call.block * torch.arange(part.first, part.first + len(part.rows), device=part.index.device)
        tau = self.tau[sequence, head][rows[:, None] + self.own][..., None]
        scores = self.scores[sequence, head][part.index][:, None]
        return (scores > tau).logical_and_(scores < tau + 1).logical_and_(~part.unselected)

    def weights(self, part: Blocks) -> tuple[Tensor, Tensor | None]:
        """Attention's weights `[g, C, G, n]` before p, and the candidates' products where p multiplies them."""
        call, raw = self.call, None
        scores = torch.matmul(part.rows.flatten(1, 2), part.keys.transpose(1, 2)).mul_(call.scale)
        scores = scores.view(*part.rows.shape[:3], -1)
        if call.masking == "both":
            raw = scores[..., : part.num_candidates].clone()
            scores[..., : part.num_candidates] *= part.weight[:, :, None]
        if call.score_bias:
            scores += call.score_bias
        scores.masked_fill_(part.hidden[:, :, None], NONE)
        if not call.softmax:
            return scores.sigmoid_(), raw
        weights = torch.softmax(scores, dim=-1)
        if self.may_see_nothing:
            weights.masked_fill_(part.hidden.all(-1)[:, :, None, None], 0.0)
        return weights, raw


def forward(call: SelectedCall) -> Tensor:
    """The output `[B, T, H, D]`."""
    laid = Laid(call)
    output = torch.empty_like(laid.query)
    for sequence in range(len(output)):
        for head in range(laid.kv_heads):
            into = output[sequence, :, head].unflatten(0, (-1, call.block))
            for part in laid.parts(sequence, head):
                weights, _ = laid.weights(part)
                if call.masking != "straight":
                    weights[..., : part.num_candidates] *= part.weight[:, :, None]
                mixed = torch.matmul(weights.flatten(1, 2), part.values)
                into[part.first : part.first + len(mixed)] = mixed.view(part.rows.shape)
    return output[:, : laid.num_rows].flatten(2, 3).to(call.query.dtype).contiguous()


class Gradients(NamedTuple):
    """Of the op's differentiable arguments, by name."""

    query: Tensor
    key: Tensor
    value: Tensor
    kept_key: Tensor
    kept_value: Tensor
    scores: Tensor
    tau: Tensor


def backward(call: SelectedCall, grad_output: Tensor) -> Gradients:
    """With weights A, w = A p and dW = dO V^T: dV = w^T dO; dp = A dW; dA = p dW; then as in attention.

    Where p multiplies the key too, dp has also dS * scale * q.k. `p` is free between 0 and 1: dscore = dp, dtau = -dp.
    """
    laid = Laid(call)
    d_output = F.pad(grad_output.to(laid.dtype), (0, 0, 0, 0, 0, laid.missing)).unflatten(2, (laid.kv_heads, -1))
    d_query = torch.empty_like(laid.query)
    kept, length = laid.num_kept, laid.key.shape[1] + call.block
    batch, _, kv_heads, size = call.key.shape
    d_key, d_value = (laid.key.new_zeros(batch, kv_heads, kept + length, size) for _ in range(2))
    d_scores, d_tau = torch.zeros_like(laid.scores), torch.zeros_like(laid.tau)
    for sequence in range(batch):
        for head in range(kv_heads):
            for part in laid.parts(sequence, head):
                some = slice(part.first, part.first + len(part.rows))
                d_mixed = d_output[sequence, :, head].unflatten(0, (-1, call.block))[some]
                own = (x[sequence, head] for x in (d_key, d_value, d_scores))
                free = laid.free(sequence, head, part)
                found, d_weight = _part_backward(laid, part, free, d_mixed, *own)
                d_query[sequence, :, head].unflatten(0, (-1, call.block))[some] = found
                d_tau[sequence, head].unflatten(0, (-1, call.block))[some] = -d_weight.sum(-1)
    rows, items = slice(0, laid.num_rows), slice(kept + laid.absent, kept + laid.absent + call.key.shape[1])
    found = (
        d_query[:, rows].flatten(2, 3),
        *(x[:, :, items].transpose(1, 2) for x in (d_key, d_value)),
        *(x[:, :, :kept] for x in (d_key, d_value)),
        d_scores[..., : call.scores.shape[-1]],
        d_tau[..., rows],
    )
    # an op's outputs may not share memory
    return Gradients(
        *(x.to(getattr(call, name).dtype).clone(memory_format=torch.contiguous_format)
          for name, x in zip(Gradients._fields, found, strict=True))
    )  # fmt: skip


def _part_backward(
    laid: Laid, part: Blocks, free: Tensor, d_mixed: Tensor, d_key: Tensor, d_value: Tensor, d_scores: Tensor
) -> tuple[Tensor, Tensor]:
    """Add to the gradients of one head; returns those of the rows `[g, C, G, D]` and of p `[g, C, k + C]`."""
    call, count = laid.call, part.num_candidates
    weights, raw = laid.weights(part)
    p = part.weight[:, :, None]
    d_rows = d_mixed.flatten(1, 2)
    d_weights = torch.matmul(d_rows, part.values.transpose(1, 2)).view(weights.shape)
    mixed = weights
    if call.masking != "straight":
        mixed = weights.clone()
        mixed[..., :count] *= p
    _add(laid, part, d_value, torch.matmul(mixed.flatten(1, 2).transpose(1, 2), d_rows))
    d_p = (weights[..., :count] * d_weights[..., :count]).sum(2)
    if call.masking != "straight":
        d_weights[..., :count] *= p
    if call.softmax:
        shift = (weights * d_weights).sum(-1, keepdim=True)
        d_products = d_weights.sub_(shift).mul_(weights)
    else:
        d_products = d_weights.mul_(weights * (1 - weights))
    if raw is not None:
        d_p += (d_products[..., :count] * raw).sum(2)
        d_products[..., :count] *= p
    d_products = d_products.flatten(1, 2)
    _add(laid, part, d_key, torch.matmul(d_products.transpose(1, 2), part.rows.flatten(1, 2)).mul_(call.scale))
    d_p.masked_fill_(free.logical_not_(), 0.0)
    d_score = d_p.sum(1)
    kept, block = laid.num_kept, call.block
    d_scores.index_add_(0, part.index[:, :kept].flatten(), d_score[:, :kept].flatten().double())
    first = laid.most + part.first * block
    d_scores[first : first + len(d_score) * block] += d_score[:, kept:].flatten()
    return torch.matmul(d_products, part.keys).mul_(call.scale).view(part.rows.shape), d_p


def _add(laid: Laid, part: Blocks, total: Tensor, found: Tensor) -> None:
    """Add `[g, n, D]` to `[k + items, D]`: columns that lie a block apart belong to different items of all blocks."""
    kept, block = laid.num_kept, laid.call.block
    if kept:
        total.index_add_(0, part.pool.flatten(), found[:, :kept].flatten(0, 1))
    items, found = total[kept:], found[:, kept:]
    for at in range(0, found.shape[1], block):
        some = found[:, at : at + block]
        first = part.first * block + at
        into = items[first : first + len(found) * block].unflatten(0, (-1, block))
        into[:, : some.shape[1]] += some


def step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    scores: Tensor,
    kept_key: Tensor,
    kept_value: Tensor,
    *,
    scale: float,
    score_bias: float,
    softmax: bool,
    masking: str,
) -> Tensor:
    """One row of every sequence, of which no result depends on the others; inference only.

    Args:
        query: `[B, 1, H, D]`.
        key, value: `[B, W, K, D]`, the window's, of which `visible`, bool `[B, W]`, are seen.
        scores: float64 `[B, K, M]`, the candidates', falling, that which enters with the row among them.
        kept_key, kept_value: `[B, K, k, D]`, of the first k.

    Returns:
        `[B, 1, H, D]`.
    """
    dtype, (batch, _, heads, size), count = score_dtype(query), query.shape, kept_key.shape[2]
    weight = capped_simplex(scores, count)[..., :count].to(dtype) if count else scores[..., :0].to(dtype)
    there = (scores[..., :count] > NONE)[:, :, None]
    keys, values = (
        torch.cat((kept.to(dtype), items.to(dtype).transpose(1, 2)), dim=2)
        for kept, items in ((kept_key, key), (kept_value, value))
    )
    rows = query.to(dtype).view(batch, keys.shape[1], -1, size)
    products = torch.matmul(rows, keys.transpose(2, 3)).mul_(scale)
    if masking == "both":
        products[..., :count] *= weight[:, :, None]
    seen = torch.cat((there, visible[:, None, None].expand(-1, keys.shape[1], -1, -1)), dim=-1)
    products = (products + score_bias).masked_fill_(~seen, NONE)
    weights = products.sigmoid_() if not softmax else products.softmax(-1).masked_fill_(~seen.any(-1, True), 0.0)
    if masking != "straight":
        weights[..., :count] *= weight[:, :, None]
    return torch.matmul(weights, values).view(batch, 1, heads, size).to(query.dtype)
