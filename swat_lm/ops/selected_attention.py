"""Attention over keys that were selected by their scores, and over a window (SPARSEK, arXiv 2406.16747), in PyTorch.

A key that leaves the window enters among the candidates; row i sees the k largest that have entered, each weighed by
`p = clip(score - tau_i, 0, 1)` (`swat_lm.ops.capped_simplex`), and the window whole, in one softmax over the union. C
rows that follow one another touch the k candidates from before them, the C that enter with them and the window: dense
products, no gathers of single rows. Time and memory are linear in T; the backward pass recomputes. Derivations:
docs/mathematics.md.

Legend: B sequences, T rows, P items before them, W window, K key/value heads, G query heads of each, D head size, k
selected, M candidates from before, C rows of a block, n = k + C + W columns of a block; l lanes and g blocks at once.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from swat_lm.ops.capped_simplex import NONE, capped_simplex
from swat_lm.ops.head_bias import score_dtype
from swat_lm.ops.selected_tables import LOWEST, Blocks, Laid, SelectedCall

MASKINGS = ("value", "both", "straight")
"""What p multiplies: the value; value and key; nothing, with the gradient as if it were the value."""


def weights_of(laid: Laid, part: Blocks) -> tuple[Tensor, Tensor | None]:
    """Attention's weights `[l, g, C, G, n]` before p, and the candidates' products where p multiplies them."""
    call, raw, block, count = laid.call, None, laid.call.block, part.num_candidates
    scores = over(part.rows, part.keys).view(*part.rows.shape[:2], block, laid.group, -1)
    if call.masking == "both":
        raw = scores[..., :count].clone()
        scores[..., :count] *= part.weight[..., None, :]
    if call.score_bias:
        scores += call.score_bias
    scores[..., :count] += part.unseen[..., None, :]
    # the last columns come after a row; the first have left its window, which `unseen` says
    scores[..., -block:] += laid.beyond[:, None]
    if part.hidden is not None:
        hidden = part.hidden[..., None, :].expand(*scores.shape[:3], 1, -1)
        if laid.num_kept + block != scores.shape[-1]:
            scores[..., count:].masked_fill_(hidden[..., block:], NONE)
        own = hidden[..., :block] & laid.later[:, None]
        scores[..., laid.num_kept : count].masked_fill_(own, NONE)
    if not call.softmax:
        return scores.sigmoid_(), raw
    if not laid.may_see_nothing:
        return torch.softmax(scores, dim=-1), raw
    nothing = scores.amax(-1, keepdim=True) < LOWEST / 4
    return torch.softmax(scores, dim=-1).masked_fill_(nothing, 0.0), raw


def over(rows: Tensor, columns: tuple[Tensor, Tensor]) -> Tensor:
    """Products `[l, g, R, n]` of rows `[l, g, R, D]` with all columns, those from before first."""
    before, items = (x.flatten(0, 1).transpose(1, 2) for x in columns)
    rows = rows.flatten(0, 1)
    found = rows.new_empty(*rows.shape[:2], before.shape[-1] + items.shape[-1])
    torch.bmm(rows, before, out=found[..., : before.shape[-1]])
    torch.bmm(rows, items, out=found[..., before.shape[-1] :])
    return found.view(*columns[0].shape[:2], *found.shape[1:])


def mixed_by(weights: Tensor, columns: tuple[Tensor, Tensor]) -> Tensor:
    """`[l, g, R, D]`: columns weighed by `[l, g, R, n]`."""
    before, items = (x.flatten(0, 1) for x in columns)
    flat, count = weights.flatten(0, 1), before.shape[1]
    found = torch.bmm(flat[..., count:], items)
    if count:
        found.baddbmm_(flat[..., :count], before)
    return found.view(*weights.shape[:3], -1)


def forward(call: SelectedCall) -> Tensor:
    """The output `[B, T, H, D]`."""
    laid = Laid(call)
    output = torch.empty_like(laid.query)
    for part in laid.parts():
        weights, _ = weights_of(laid, part)
        if call.masking != "straight":
            weights[..., : part.num_candidates] *= part.weight[..., None, :]
        output[part.lanes, part.blocks] = mixed_by(weights.flatten(2, 3), part.values).view(*weights.shape[:4], -1)
    return laid.from_lanes(output).to(call.query.dtype).contiguous()


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

    Where p multiplies the key too, dp has also dS * q.k. `p` is free between 0 and 1: dscore = dp, dtau = -dp.
    """
    laid = Laid(call)
    d_output, d_query = laid.in_lanes(grad_output), torch.empty_like(laid.query)
    kept, batch = laid.num_kept, len(call.query)
    # the last blocks' columns reach beyond the items
    d_key, d_value = (laid.key.new_zeros(len(x), x.shape[1] + call.block, x.shape[2]) for x in (laid.key, laid.value))
    d_scores = call.scores.new_zeros(laid.num_lanes, call.scores.shape[-1] + laid.missing)
    d_tau = call.tau.new_zeros(laid.num_lanes, laid.num_blocks, call.block)
    for part in laid.parts():
        some = part.lanes, part.blocks
        own = (x[part.lanes] for x in (d_key, d_value, d_scores))
        found, d_weight = _part_backward(laid, part, d_output[some].flatten(2, 3), *own)
        d_query[some] = found.view(d_query[some].shape)
        d_tau[some] = -d_weight.sum(-1)
    d_key, d_value = (x.unflatten(0, (batch, -1)) for x in (d_key, d_value))
    items = slice(kept + laid.absent, kept + laid.absent + call.key.shape[1])
    found = (
        laid.from_lanes(d_query.mul_(call.scale)),
        *(x[:, :, items].transpose(1, 2) for x in (d_key, d_value)),
        *(x[:, :, :kept] for x in (d_key, d_value)),
        d_scores.unflatten(0, (batch, -1))[..., : call.scores.shape[-1]],
        d_tau.flatten(1).unflatten(0, (batch, -1))[..., : laid.num_rows],
    )
    # an op's outputs may not share memory
    return Gradients(
        *(x.to(getattr(call, name).dtype).clone(memory_format=torch.contiguous_format)
          for name, x in zip(Gradients._fields, found, strict=True))
    )  # fmt: skip


def _part_backward(
    laid: Laid, part: Blocks, d_rows: Tensor, d_key: Tensor, d_value: Tensor, d_scores: Tensor
) -> tuple[Tensor, Tensor]:
    """Add to the gradients of these lanes; returns those of the rows `[l, g, C * G, D]` and of p `[l, g, C, k + C]`."""
    call, count = laid.call, part.num_candidates
    weights, raw = weights_of(laid, part)
    p = part.weight[..., None, :]
    d_weights = over(d_rows, part.values).view(weights.shape)
    d_p = (weights[..., :count] * d_weights[..., :count]).sum(3)
    if call.masking != "straight":
        d_weights[..., :count] *= p
    if call.softmax:
        d_products = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
    else:
        d_products = d_weights.mul_(weights * (1 - weights))
    if raw is not None:
        d_p += (d_products[..., :count] * raw).sum(3)
        d_products[..., :count] *= p
    if call.masking != "straight":
        weights[..., :count] *= p
    d_products, mixed = d_products.flatten(2, 3), weights.flatten(2, 3)
    _add(laid, part, d_value, mixed, d_rows)
    _add(laid, part, d_key, d_products, part.rows)
    d_p *= laid.is_free(part)
    d_score = d_p.sum(2)
    kept, block = laid.num_kept, call.block
    index = laid.index[part.lanes, part.blocks, :kept]
    d_scores.scatter_add_(1, index.flatten(1), d_score[..., :kept].flatten(1).double())
    first = laid.most + part.blocks.start * block
    d_scores[:, first : first + d_score.shape[1] * block] += d_score[..., kept:].flatten(1)
    return mixed_by(d_products, part.keys), d_p


def _add(laid: Laid, part: Blocks, total: Tensor, weights: Tensor, rows: Tensor) -> None:
    """Add `weights^T rows` `[l, g, n, D]` to `[l, k + items, D]`."""
    kept, block, size = laid.num_kept, laid.call.block, total.shape[-1]
    weights, rows = weights.flatten(0, 1).transpose(1, 2), rows.flatten(0, 1)
    num_lanes, num_blocks = len(total), part.blocks.stop - part.blocks.start
    if kept:
        # lanes lie one after the other
        index = laid.pool[part.lanes, part.blocks] - part.lanes.start * laid.key.shape[1]
        index = index + block * torch.arange(num_lanes, device=index.device)[:, None, None]
        total.view(-1, size).index_add_(0, index.flatten(), torch.bmm(weights[:, :kept], rows).flatten(0, 1))
    for at in range(0, weights.shape[1] - kept, block):
        # columns that lie a block apart belong to different items of all blocks
        some = weights[:, kept + at : kept + at + block]
        first = kept + part.blocks.start * block + at
        into = total[:, first : first + num_blocks * block].unflatten(1, (-1, block))[:, :, : some.shape[1]]
        if num_lanes == 1:
            into.squeeze(0).baddbmm_(some, rows)
        else:
            into += torch.bmm(some, rows).view(into.shape)


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
    row_by_row: bool = False,
) -> Tensor:
    """One row of every sequence, of which no result depends on the others; inference only.

    Args:
        query: `[B, 1, H, D]`.
        key, value: `[B, W, K, D]`, the window's, of which `visible`, bool `[B, W]`, are seen.
        scores: float64 `[B, K, M]`, the candidates', falling, that which enters with the row among them.
        kept_key, kept_value: `[B, K, k, D]`, of the first k.
        row_by_row: give a row the same to the bit wherever it stands in a batch: vectors of a processor end elsewhere.

    Returns:
        `[B, 1, H, D]`.
    """
    if row_by_row:
        how = {"scale": scale, "score_bias": score_bias, "softmax": softmax, "masking": masking}
        each = (x.split(1) for x in (query, key, value, visible, scores, kept_key, kept_value))
        return torch.cat([step(*row, **how) for row in zip(*each, strict=True)])
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
