"""Attention over quantised keys in linear time: near keys one by one, far ones by code, as counts and sums of values.

Row t of block b sees the keys of blocks b - 1 and b themselves, with a bias by distance below a block's length, and of
all blocks before them, per code s, the count n_s and the sum U_s of their values, which stand in one softmax:

    out_t = (sum_near e^(q_t k_j + b(t - j)) v_j + sum_s e^(q_t C_s) U_s) / (sum_near e^(...) + sum_s e^(q_t C_s) n_s)

That is dense softmax attention over quantised keys, with the bias 0 from a block's length on. Gradients are of this
form: far keys have none, their values do (Transformer-VQ, arXiv 2309.16354; docs/mathematics.md). Both ways, blocks
b - 1 to b + 1 are near. The backward pass recomputes.

Legend: R sequences, A items before the rows (none, or two blocks), T rows, B tokens of a block, D key size, E value
size, S codes, g blocks at once.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor

from swat_lm.ops.calls import schema
from swat_lm.ops.precision import sum_dtype

# numbers of sums and scores that are held at once, about
ELEMENTS = 2**20
LEAD = 2
"""Blocks before the rows' first, where there are items before them."""


class QuantisedCall(NamedTuple):
    """The arguments of the op, in its order."""

    query: Tensor
    """`[R, T, D]`; the first row begins a block."""
    key: Tensor
    """`[R, A + T, D]`, quantised."""
    value: Tensor
    """`[R, A + T, E]`"""
    code: Tensor
    """int64 `[R, A + T]`"""
    codes: Tensor
    """`[S, D]`; no gradient."""
    bias: Tensor
    """`[B]` by distance; both ways `[2 B - 1]`, from B - 1 tokens after the query on."""
    seen: Tensor | None
    """bool `[R, A + T]`: items that count; None: all."""
    counts: Tensor | None
    """int64 `[R, S]`: of each code, what stood before the items; None: nothing did."""
    totals: Tensor | None
    """`[R, S, E]`: their values' sum."""
    block: int
    both_ways: bool


class Gradients(NamedTuple):
    """What the backward op gives."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor
    totals: Tensor
    """Of no elements where there is none."""


def quantised_attention(
    query: Tensor, key: Tensor, value: Tensor, code: Tensor, codes: Tensor, bias: Tensor, *, block: int,
    seen: Tensor | None = None, counts: Tensor | None = None, totals: Tensor | None = None, both_ways: bool = False,
) -> Tensor:  # fmt: skip
    """Attend as the module says; the arguments are those of `QuantisedCall`.

    Returns:
        `[R, T, E]` in the dtype of the values; rows that see nothing give 0. Differentiable in query, key, value, bias
        and totals.

    Raises:
        ValueError: shapes that do not fit; the message names the argument.
    """
    num_rows, items = query.shape[1], key.shape[1]
    if items - num_rows not in (0, LEAD * block):
        raise ValueError(f"key: expected {num_rows} items, or {LEAD * block} (two blocks) before them, got {items}")
    if value.shape[:2] != key.shape[:2] or code.shape != key.shape[:2]:
        raise ValueError(
            f"value: expected values and codes of {list(key.shape[:2])} items, got {list(value.shape[:2])} and "
            f"{list(code.shape)}"
        )
    if len(bias) != (2 * block - 1 if both_ways else block):
        raise ValueError(f"bias: expected {2 * block - 1 if both_ways else block} distances, got {len(bias)}")
    if (counts is None) != (totals is None):
        raise ValueError("totals: expected counts and sums together, or neither")
    call = QuantisedCall(query, key, value, code, codes, bias, seen, counts, totals, block, both_ways)
    return torch.ops.swat_lm.quantised_attention(*call)[0]


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, visible: Tensor, distance: Tensor,
    both_ways: bool = False, far_key: Tensor | None = None, near: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The same as one dense softmax, of whatever keys; O(T P) memory. What the op is compared with.

    Args:
        query: `[R, T, D]`.
        key, value: `[R, P, D]` and `[R, P, E]`.
        bias: by distance, as in `QuantisedCall`.
        visible: bool `[R or 1, T, P]`.
        distance: int64 `[R or 1, T, P]`, from each key to the query; below 0: the key comes later.
        far_key: `[R, P, D]`, what stands in the place of keys that are not `near` (bool `[R or 1, T, P]`): equal
            numbers without a gradient make the linear form's gradients.
    """
    scores = torch.matmul(query, key.transpose(1, 2))
    if far_key is not None and near is not None:
        scores = torch.where(near, scores, torch.matmul(query, far_key.transpose(1, 2)))
    block = (len(bias) + 1) // 2 if both_ways else len(bias)
    biased = visible & (distance.abs() < block)
    place = torch.where(biased, distance, 0) + (block - 1 if both_ways else 0)
    scores = scores + torch.where(biased, bias.to(scores.dtype)[place], 0.0)
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1).masked_fill(~visible, 0.0)
    return torch.matmul(weights, value.to(weights.dtype))


def code_sums(code: Tensor, value: Tensor, seen: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Counts int64 `[..., S]` and sums `[..., S, E]` per code of items `[..., n]` that are seen; differentiable."""
    lead, place = code.shape[:-1], flat_places(code, num_codes)
    size, counted = num_codes * lead.numel(), seen.flatten()
    values = torch.where(counted[:, None], value.flatten(0, -2), 0.0)
    totals = values.new_zeros(size, value.shape[-1]).index_add(0, place, values)
    counts = place.new_zeros(size).index_add(0, place, counted.long())
    return counts.view(*lead, num_codes), totals.view(*lead, num_codes, value.shape[-1])


def flat_places(code: Tensor, num_codes: int) -> Tensor:
    """Where each item `[..., n]` counts in a flattened table `[..., S]`, int64."""
    tables = torch.arange(code.shape[:-1].numel(), device=code.device).view(*code.shape[:-1], 1)
    return (tables * num_codes + code).flatten()


def near_distances(block: int, both_ways: bool, device: torch.device) -> Tensor:
    """How far before each row of a block the keys of its near blocks stand, int64 `[B, 2 B or 3 B]`; below 0: after."""
    own = torch.arange(block, device=device)
    return block + own[:, None] - torch.arange((3 if both_ways else 2) * block, device=device)


class Laid:
    """A call in whole blocks, two before the rows; both ways one more behind them."""

    def __init__(self, call: QuantisedCall) -> None:
        self.num_rows = call.query.shape[1]
        self.before = call.key.shape[1] - self.num_rows
        # one short block needs no more than its own length
        block = call.block if self.before else min(call.block, max(1, self.num_rows))
        self.block, self.both_ways, self.num_codes = block, call.both_ways, len(call.codes)
        self.num_blocks = max(1, -(-self.num_rows // block))
        self.wide = sum_dtype(call.query)
        self.missing = self.num_blocks * block - self.num_rows
        behind = self.missing + (block if call.both_ways else 0)
        self.pad = LEAD * block - self.before, behind
        self.query = self._rows(call.query)
        self.key, self.value = self.items(call.key), self.items(call.value)
        self.code = F.pad(call.code, self.pad).unflatten(1, (-1, block))
        seen = torch.ones_like(call.code, dtype=torch.bool) if call.seen is None else call.seen
        self.seen = F.pad(seen, self.pad).unflatten(1, (-1, block))
        self.codes = call.codes.to(self.wide)
        self.counts, self.totals = call.counts, None if call.totals is None else call.totals.to(self.wide)
        distance = near_distances(block, call.both_ways, call.key.device)
        self.later = None if call.both_ways else distance < 0
        self.biased = distance.abs() < block
        if self.later is not None:
            self.biased &= ~self.later
        self.bias_place = (distance + (call.block - 1 if call.both_ways else 0))[self.biased]
        self.bias = torch.zeros(distance.shape, dtype=self.wide, device=distance.device)
        self.bias[self.biased] = call.bias.to(self.wide)[self.bias_place]

    def _rows(self, x: Tensor) -> Tensor:
        return F.pad(x.to(self.wide), (0, 0, 0, self.missing)).unflatten(1, (self.num_blocks, self.block))

    def items(self, x: Tensor) -> Tensor:
        """`[R, A + T, n]` as `[R, blocks, B, n]`."""
        return F.pad(x.to(self.wide), (0, 0, *self.pad)).unflatten(1, (-1, self.block))

    def near(self, x: Tensor, group: slice) -> Tensor:
        """The near items of some blocks of rows, `[R, g, 2 B or 3 B, ...]`."""
        parts = [x[:, group.start + at : group.stop + at] for at in range(1, 4 if self.both_ways else 3)]
        return torch.cat(parts, dim=2)

    def groups(self) -> list[slice]:
        """Which blocks are processed together: all of them where rows also see what comes after them."""
        if self.both_ways:
            return [slice(0, self.num_blocks)]
        sequences, _, block, size = self.value.shape[0], *self.value.shape[1:]
        each = sequences * (self.num_codes * size + block * (self.num_codes + 2 * block))
        step = max(1, ELEMENTS // max(1, each))
        return [slice(at, min(at + step, self.num_blocks)) for at in range(0, self.num_blocks, step)]

    def own_sums(self, group: slice) -> tuple[Tensor, Tensor]:
        """Counts and sums of single blocks of items."""
        return code_sums(self.code[:, group], self.value[:, group], self.seen[:, group], self.num_codes)

    def begun(self) -> tuple[Tensor, Tensor]:
        """Counts `[R, S]` and sums `[R, S, E]` of what stood before all items."""
        if self.counts is not None and self.totals is not None:
            return self.counts, self.totals
        sequences, size = len(self.value), self.value.shape[-1]
        count = self.code.new_zeros(sequences, self.num_codes)
        return count, self.value.new_zeros(sequences, self.num_codes, size)

    def far(self, group: slice, before: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What is far of some blocks of rows, `[R, g, S]` and `[R, g, S, E]`, given what is of the block before."""
        # row block i stands two blocks of items further on: items up to block i are far
        count, total = (own.cumsum(1) + held[:, None] for own, held in zip(self.own_sums(group), before, strict=True))
        if self.both_ways and self.num_blocks > LEAD:
            ahead = self.own_sums(slice(2 * LEAD, self.num_blocks + LEAD))
            more = (x.flip(1).cumsum(1).flip(1) for x in ahead)
            count, total = (
                torch.cat((held[:, :-LEAD] + x, held[:, -LEAD:]), dim=1)
                for held, x in zip((count, total), more, strict=True)
            )
        return count, total

    def scores(self, group: slice, count: Tensor) -> tuple[Tensor, Tensor]:
        """Of codes `[R, g, B, S]` and of near keys `[R, g, B, n]`; `-inf` for what a row does not see."""
        query = self.query[:, group]
        far = torch.matmul(query, self.codes.t()).masked_fill_((count == 0)[:, :, None], -torch.inf)
        near = torch.matmul(query, self.near(self.key, group).transpose(2, 3)).add_(self.bias)
        blind = ~self.near(self.seen, group)[:, :, None]
        return far, near.masked_fill_(blind if self.later is None else blind | self.later, -torch.inf)

    def starts(
        self, groups: Sequence[slice], before: tuple[Tensor, Tensor]
    ) -> Iterator[tuple[slice, tuple[Tensor, Tensor]]]:
        """Groups of blocks in order, with what is far of the block before each; `before`: of that before the first."""
        for at, group in enumerate(groups):
            if at:
                counts, totals = self.own_sums(groups[at - 1])
                before = before[0] + counts.sum(1), before[1] + totals.sum(1)
            yield group, before

    def starts_backwards(self) -> Iterator[tuple[slice, tuple[Tensor, Tensor]]]:
        """The same from the last group to the first: of n it holds some 2 sqrt(n) sums, and forms each twice."""
        groups = self.groups()
        each = math.isqrt(len(groups) - 1) + 1
        kept = [before for at, (_, before) in enumerate(self.starts(groups, self.begun())) if at % each == 0]
        for first in reversed(range(0, len(groups), each)):
            part = list(self.starts(groups[first : first + each], kept.pop()))
            while part:
                yield part.pop()


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = QuantisedCall(*arguments)
    laid = Laid(call)
    outputs, sums = [], []
    with torch.autocast(call.query.device.type, enabled=False):
        before = laid.begun()
        for group in laid.groups():
            count, total = laid.far(group, before)
            before = count[:, -1], total[:, -1]
            far, near = laid.scores(group, count)
            most = torch.maximum(far.amax(-1), near.amax(-1)).clamp(min=torch.finfo(laid.wide).min)
            far, near = far.sub_(most[..., None]).exp_(), near.sub_(most[..., None]).exp_()
            weight = torch.matmul(far, count.to(laid.wide)[..., None])[..., 0] + near.sum(-1)
            found = torch.matmul(far, total) + torch.matmul(near, laid.near(laid.value, group))
            outputs.append(torch.where(weight > 0, 1 / weight, 0.0)[..., None] * found)
            sums.append(torch.where(weight > 0, most + weight.log(), 0.0))
    output, lse = (torch.cat(x, dim=1).flatten(1, 2)[:, : laid.num_rows] for x in (outputs, sums))
    return output.to(call.value.dtype).contiguous(), lse.contiguous()


class _Cotangent(NamedTuple):
    """What the backward op is given before the call."""

    grad_output: Tensor
    output: Tensor
    lse: Tensor


def _backward(grad_output: Tensor, output: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    with torch.autocast(grad_output.device.type, enabled=False):
        return _gradients(QuantisedCall(*arguments), grad_output, output, lse)


def _gradients(call: QuantisedCall, grad_output: Tensor, output: Tensor, lse: Tensor) -> Gradients:
    laid = Laid(call)
    grad = laid._rows(grad_output)
    inner = (grad * laid._rows(output)).sum(-1)
    lse = laid._rows(lse[..., None])
    d_query, d_key, d_value = (torch.zeros_like(x) for x in (laid.query, laid.key, laid.value))
    d_bias = torch.zeros_like(laid.bias)
    # later blocks of rows see what earlier ones do: from the last group to the first
    later = torch.zeros_like(laid.begun()[1])
    for group, before in laid.starts_backwards():
        count, total = laid.far(group, before)
        far, near = (x.sub_(lse[:, group]).exp_() for x in laid.scores(group, count))
        own, value, query = grad[:, group], laid.near(laid.value, group), laid.query[:, group]
        d_total = torch.matmul(far.transpose(2, 3), own)
        _to_near(d_value, torch.matmul(near.transpose(2, 3), own), group, laid.block)
        minus = inner[:, group, :, None]
        d_far = far.mul_(torch.matmul(own, total.transpose(2, 3)).sub_(minus * count.to(laid.wide)[:, :, None]))
        d_near = near.mul_(torch.matmul(own, value.transpose(2, 3)).sub_(minus))
        d_query[:, group] = torch.matmul(d_far, laid.codes) + torch.matmul(d_near, laid.near(laid.key, group))
        _to_near(d_key, torch.matmul(d_near.transpose(2, 3), query), group, laid.block)
        d_bias += d_near.sum((0, 1))
        seen_by = d_total.flip(1).cumsum(1).flip(1) + later[:, None]
        _to_codes(laid, d_value, seen_by, group)
        later = seen_by[:, 0]
        if laid.both_ways and laid.num_blocks > LEAD:
            _to_codes(laid, d_value, d_total[:, :-LEAD].cumsum(1), slice(2 * LEAD, laid.num_blocks + LEAD))
    d_value.masked_fill_(~laid.seen[..., None], 0.0)
    places = laid.bias_place
    bias = torch.zeros_like(call.bias, dtype=laid.wide).index_add_(0, places, d_bias[laid.biased])
    first = LEAD * laid.block - laid.before
    kept = slice(first, first + call.key.shape[1])
    d_key, d_value = d_key.flatten(1, 2)[:, kept], d_value.flatten(1, 2)[:, kept]
    of_total = later if call.totals is None else later.to(call.totals.dtype)
    return Gradients(
        d_query.flatten(1, 2)[:, : laid.num_rows].to(call.query.dtype).contiguous(),
        d_key.to(call.key.dtype).contiguous(), d_value.to(call.value.dtype).contiguous(), bias.to(call.bias.dtype),
        call.bias.new_empty(0) if call.totals is None else of_total.contiguous(),
    )  # fmt: skip


def _to_near(into: Tensor, gradient: Tensor, group: slice, block: int) -> None:
    """Add what near items of some blocks of rows get to their blocks."""
    for at, part in enumerate(gradient.split(block, dim=2), start=1):
        into[:, group.start + at : group.stop + at] += part


def _to_codes(laid: Laid, into: Tensor, gradient: Tensor, group: slice) -> None:
    """Add to some blocks of items what the sums `[R, g, S, E]` they stand in get."""
    code = laid.code[:, group]
    found = gradient.flatten(0, 2)[flat_places(code, laid.num_codes)]
    into[:, group] += found.view(*code.shape, -1)


_op = torch.library.custom_op(
    "swat_lm::quantised_attention", _forward, mutates_args=(), schema=schema(QuantisedCall, num_results=2)
)
_backward_op = torch.library.custom_op(
    "swat_lm::quantised_attention_backward", _backward, mutates_args=(),
    schema=schema(_Cotangent, QuantisedCall, num_results=len(Gradients._fields)),
)  # fmt: skip


@_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = QuantisedCall(*arguments)
    rows = call.query.shape[:2]
    return call.value.new_empty(*rows, call.value.shape[-1]), call.query.new_empty(rows, dtype=sum_dtype(call.query))


@_backward_op.register_fake
def _(grad_output: Tensor, output: Tensor, lse: Tensor, *arguments: Any) -> Gradients:
    call = QuantisedCall(*arguments)
    totals = call.bias.new_empty(0) if call.totals is None else call.totals.new_empty(call.totals.shape)
    query, key, value, bias = (x.new_empty(x.shape) for x in (call.query, call.key, call.value, call.bias))
    return Gradients(query, key, value, bias, totals)


_TENSORS = tuple(name for name, kind in get_type_hints(QuantisedCall).items() if kind in (Tensor, Tensor | None))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    call = QuantisedCall(*inputs)
    ctx.save_for_backward(*(getattr(call, name) for name in _TENSORS), *output)
    ctx.call = call._replace(**dict.fromkeys(_TENSORS))
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_output: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    *tensors, output, lse = ctx.saved_tensors
    call = ctx.call._replace(**dict(zip(_TENSORS, tensors, strict=True)))
    if grad_output is None:
        return (None,) * len(call)
    found = Gradients(*torch.ops.swat_lm.quantised_attention_backward(grad_output, output, lse, *call))
    if call.totals is None:
        found = found._replace(totals=None)  # type: ignore[arg-type]
    return tuple(getattr(found, name, None) for name in QuantisedCall._fields)


_op.register_autograd(_differentiate, setup_context=_save)
