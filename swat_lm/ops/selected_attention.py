"""Attention over keys that were selected by their scores, and over a window (SPARSEK, arXiv 2406.16747), in PyTorch.

A key that leaves the window enters among the candidates; row i sees the k largest that have entered, each weighed by
`p = clip(score - tau_i, 0, 1)` (`swat_lm.ops.capped_simplex`), and the window whole, in one softmax over the union. C
rows that follow one another touch the k candidates from before them, the C that enter with them and the window: one
dense product, no gathers of single rows. Time and memory are linear in T; the backward pass recomputes. Derivations:
docs/mathematics.md.

Legend: B sequences, T rows, P items before them, W window, K key/value heads, G query heads of each, D head size, k
selected, M candidates from before, C rows of a block, n = k + C + W columns of a block; l lanes and g blocks at once.
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
ELEMENTS = 2**18
"""Scores that are held at once, about: a table of so many stays in a core's cache."""
LOWEST = -1e30
"""Below every threshold that is one."""


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
    full: Tensor
    """int64 `[B, K, M + T]`: rows in which a candidate has p = 1, from the one it enters with."""
    free: Tensor
    """int64 `[B, K, M + T]`: rows after these in which it has 0 < p < 1."""
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
    """Some blocks of some lanes, as tables `[l, g, C, ...]`."""

    lanes: slice
    blocks: slice
    rows: Tensor
    """`[l, g, C * G, D]`, queries times the scale."""
    keys: tuple[Tensor, Tensor]
    """`[l, g, k, D]` of the candidates from before, and of items `[l, g, C + W, D]`: views that overlap."""
    values: tuple[Tensor, Tensor]
    unseen: Tensor
    """`[l, g, C, k + C]`, added to scores of candidates: 0, or below all scores where a row does not see one."""
    weight: Tensor
    """`[l, g, C, k + C]`, p of the candidates; 1 where a column is in a row's window; anything where it is unseen."""
    hidden: Tensor | None
    """bool `[l, g, C or 1, C + W]`: items that are not there, or must not be seen."""

    @property
    def num_candidates(self) -> int:
        """k + C."""
        return self.weight.shape[-1]


class Laid:
    """A call laid out in lanes and whole blocks: rows filled up behind, items filled up before to W.

    A lane is a key/value head of a sequence; there are N.
    """

    def __init__(self, call: SelectedCall) -> None:
        self.call, block, window = call, call.block, call.window
        batch, num_rows, heads, _ = call.query.shape
        self.kv_heads, self.num_kept = call.key.shape[2], call.kept_key.shape[2]
        self.num_rows, self.num_blocks = num_rows, -(-num_rows // block)
        self.missing, self.absent = self.num_blocks * block - num_rows, window - call.key.shape[1] + num_rows
        self.most, self.group = call.scores.shape[-1] - num_rows, heads // self.kv_heads
        self.dtype, device = score_dtype(call.query), call.query.device
        self.num_lanes = batch * self.kv_heads
        self.query = self.in_lanes(call.query).mul_(call.scale)
        self.key, self.value = (
            self.pooled(kept, items) for kept, items in ((call.kept_key, call.key), (call.kept_value, call.value))
        )
        first, hidden = call.first_visible, call.hidden
        # rows that fill up see nothing, where that is asked for
        self.first = None if first is None else F.pad(first.clamp(min=0) + self.absent, (0, self.missing), value=2**30)
        self.blind = None if hidden is None else F.pad(hidden, (self.absent, self.missing))
        self.own = torch.arange(block, device=device)
        # columns of a block's own items that enter with a later row, and what is added to those that come after a row
        self.later = self.own > self.own[:, None]
        self.entered = self.later.logical_not().to(self.dtype)
        self.beyond = torch.zeros(block, block, dtype=self.dtype, device=device).masked_fill_(self.later, NONE)
        self._lay_candidates()

    def _lay_candidates(self) -> None:
        """The candidates of each block `[N, blocks, k + C]`: which, their scores, and until which row they are seen."""
        call, block, most = self.call, self.call.block, self.most
        held, kept = call.held.flatten(0, 1), self.num_kept
        base = block * torch.arange(self.num_blocks, device=held.device)[:, None]
        entering = most + base + self.own
        self.index = torch.cat((held, entering.expand(self.num_lanes, -1, -1)), dim=2)
        # where those from before lie in `key` and `value`, all lanes one after the other
        lanes = torch.arange(self.num_lanes, device=held.device)[:, None, None] * self.key.shape[1]
        self.pool = lanes + torch.where(held < most, held.clamp(max=max(kept - 1, 0)), held - most + kept)
        # the row, of the block, with which a candidate enters
        self.entry = (self.index - most).clamp(min=0) - base
        self.until = self._rows_of(call.chosen) + self.entry
        # below 0 from the row on that sees it no more
        self.left = (self.until.clamp(0, block).to(self.dtype) - 0.5) * -LOWEST
        self.passed = self.own[:, None].to(self.dtype) * -LOWEST
        # filled up with the last row's, by which differences are taken
        tau = torch.cat((call.tau, call.tau[..., -1:].expand(*call.tau.shape[:2], self.missing)), dim=-1)
        tau, scores = tau.view(self.num_lanes, self.num_blocks, block), self._of_candidates(call.scores, NONE)
        # only differences near a threshold count: moved by one of them, float32 holds them as well as float64
        middle = tau[..., -1:].nan_to_num(neginf=0.0)
        self.scores, tau = ((x - middle).to(self.dtype) for x in (scores, tau))
        # a finite number below all, so that the difference of two that are none is not NaN
        self.tau = tau.clamp(min=LOWEST)

    def _of_candidates(self, values: Tensor, filling: float) -> Tensor:
        """Of values `[B, K, M + T]` those of each block's candidates, `[N, blocks, k + C]`."""
        values = F.pad(values, (0, self.missing), value=filling).flatten(0, 1)
        return values.gather(1, self.index.flatten(1)).view(self.index.shape)

    def _rows_of(self, number: Tensor) -> Tensor:
        return self._of_candidates(number, 0)

    @cached_property
    def free(self) -> tuple[Tensor, Tensor]:
        """Rows of each block in which a candidate is seen with 0 < p < 1: the first, and the one after the last.

        Both twice and less 1, so that no row's number, twice, is either.
        """
        first = self.entry + self._rows_of(self.call.full)
        last = torch.minimum(first + self._rows_of(self.call.free), self.until)
        return tuple(2 * x.clamp(0, self.call.block).to(self.dtype) - 1 for x in (first, last))  # type: ignore[return-value]

    def in_lanes(self, rows: Tensor) -> Tensor:
        """`[B, T, H, D]` as `[N, blocks, C, G, D]`, a copy."""
        rows = F.pad(rows.to(self.dtype), (0, 0, 0, 0, 0, self.missing))
        rows = rows.unflatten(2, (self.kv_heads, self.group)).permute(0, 2, 1, 3, 4)
        shape = self.num_lanes, self.num_blocks, self.call.block, self.group, rows.shape[-1]
        return rows.clone(memory_format=torch.contiguous_format).view(shape)

    def from_lanes(self, rows: Tensor) -> Tensor:
        """The way back, `[B, T, H, D]`."""
        rows = rows.view(-1, self.kv_heads, self.num_blocks * self.call.block, *rows.shape[-2:])
        return rows[:, :, : self.num_rows].permute(0, 2, 1, 3, 4).flatten(2, 3)

    def pooled(self, kept: Tensor, items: Tensor) -> Tensor:
        """`[N, k + items, D]`: of the candidates from before, then of the items, filled up to W before the rows."""
        count, length = kept.shape[2], self.call.window + self.num_blocks * self.call.block
        found = items.new_zeros(self.num_lanes, count + length, items.shape[-1], dtype=self.dtype)
        found[:, :count] = kept.flatten(0, 1)
        begin = count + self.absent
        found.unflatten(0, (-1, self.kv_heads))[:, :, begin : begin + items.shape[1]] = items.transpose(1, 2)
        return found

    @cached_property
    def steps(self) -> list[tuple[slice, slice]]:
        """Which lanes' blocks are processed together: whole lanes, or blocks of one."""
        columns = self.num_kept + self.call.block + self.call.window
        size = max(1, ELEMENTS // max(1, self.call.block * self.group * columns))
        lanes = max(1, size // max(1, self.num_blocks))
        return [
            (slice(lane, min(lane + lanes, self.num_lanes)), slice(at, min(at + size, self.num_blocks)))
            for lane in range(0, self.num_lanes, lanes)
            for at in range(0, self.num_blocks, size)
        ]

    @cached_property
    def may_see_nothing(self) -> bool:
        """Whether there may be rows without a single key; otherwise every row sees itself."""
        return not self.call.window or self.first is not None or self.blind is not None

    def parts(self) -> Iterator[Blocks]:
        """All blocks of all lanes."""
        block, kept = self.call.block, self.num_kept
        # the items of a block, [N, blocks, C + W, D]
        spans = [x[:, kept:].unfold(1, block + self.call.window, block).transpose(2, 3) for x in (self.key, self.value)]
        for some in self.steps:
            pool = self.pool[some]
            keys, values = (
                (x.flatten(0, 1).index_select(0, pool.flatten()).view(*pool.shape, x.shape[-1]), span[some])
                for x, span in zip((self.key, self.value), spans, strict=True)
            )
            unseen = (self.left[some][..., None, :] - self.passed).clamp_(max=0)
            weight = (self.scores[some][..., None, :] - self.tau[some][..., None]).clamp_(0, 1)
            # columns of the block are in the window of rows before they enter
            unseen[..., kept:] *= self.entered
            torch.maximum(weight[..., kept:], self.later.to(self.dtype), out=weight[..., kept:])
            yield Blocks(*some, self.query[some].flatten(2, 3), keys, values, unseen, weight, self._hidden(*some))

    def _hidden(self, lanes: slice, blocks: slice) -> Tensor | None:
        """bool `[l, g, C or 1, C + W]`: items that a row must not see, beside those outside the window."""
        call = self.call
        if self.first is None and self.blind is None and blocks.start * call.block >= self.absent:
            return None
        base = call.block * torch.arange(blocks.start, blocks.stop, device=self.own.device)[:, None]
        item = base + torch.arange(call.block + call.window, device=base.device)
        # of the sequences that these lanes belong to
        owner = torch.arange(lanes.start, lanes.stop, device=base.device) // self.kv_heads
        if self.first is None:
            hidden = (item < self.absent)[None, :, None]
        else:
            hidden = item[:, None] < self.first[owner][:, base + self.own][..., None]
        if self.blind is not None:
            hidden = hidden | self.blind[owner][:, item][:, :, None]
        return hidden

    def is_free(self, part: Blocks) -> Tensor:
        """`[l, g, C, k + C]`: 1 where a row sees a candidate with 0 < p < 1, else 0."""
        first, last = (x[part.lanes, part.blocks][..., None, :] for x in self.free)
        row = 2 * self.own[:, None].to(self.dtype)
        return torch.minimum(row - first, last - row).clamp_(0, 1)

    def weights(self, part: Blocks) -> tuple[Tensor, Tensor | None]:
        """Attention's weights `[l, g, C, G, n]` before p, and the candidates' products where p multiplies them."""
        call, raw, block, count = self.call, None, self.call.block, part.num_candidates
        scores = over(part.rows, part.keys).view(*part.rows.shape[:2], block, self.group, -1)
        if call.masking == "both":
            raw = scores[..., :count].clone()
            scores[..., :count] *= part.weight[..., None, :]
        if call.score_bias:
            scores += call.score_bias
        scores[..., :count] += part.unseen[..., None, :]
        # the last columns come after a row; the first have left its window, which `unseen` says
        scores[..., -block:] += self.beyond[:, None]
        if part.hidden is not None:
            hidden = part.hidden[..., None, :].expand(*scores.shape[:3], 1, -1)
            if self.num_kept + block != scores.shape[-1]:
                scores[..., count:].masked_fill_(hidden[..., block:], NONE)
            own = hidden[..., :block] & self.later[:, None]
            scores[..., self.num_kept : count].masked_fill_(own, NONE)
        if not call.softmax:
            return scores.sigmoid_(), raw
        if not self.may_see_nothing:
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
        weights, _ = laid.weights(part)
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
    weights, raw = laid.weights(part)
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
