"""The tables of selected attention: a call laid out in blocks of rows, with what each sees and how it is weighed.

Products over them are in selected_attention.py.

Legend: B sequences, T rows, P items before them, W window, K key/value heads, G query heads of each, D head size, k
selected, M candidates from before, C rows of a block, n = k + C + W columns of a block; N lanes, a head of a sequence
each, of which l, and g blocks, at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from swat_lm.ops.capped_simplex import NONE
from swat_lm.ops.head_bias import score_dtype

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
