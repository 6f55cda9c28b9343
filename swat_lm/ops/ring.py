"""Decoding over rings of keys and values, in place: the PyTorch backend of `window_attention_step`.

Place i of a ring holds the key at distance `(position - i) mod window`. The order of keys does not matter to a sum,
so nothing is ever shifted or concatenated.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
from torch import Tensor

from swat_lm.ops.calls import StepCall
from swat_lm.ops.head_bias import HeadBias, score_dtype
from swat_lm.ops.reference import window_attention_reference


def step(call: StepCall) -> tuple[Tensor, Tensor]:
    """Write the new key and value, attend; `(output [B, 1, H, D], lse [B, 1, H])`, the lse empty for sigmoid.

    Autocast would lower products whose place is there already, and rows otherwise by whom they stand with.
    """
    device = call.query.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return step(call)
    query, key, value, key_ring, value_ring, slot, position, _, scale, *_ = call
    softmax, softcap = call.softmax, call.softcap
    num_kv_heads, head_dim = key_ring.shape[2:]
    batch, _, num_heads, _ = query.shape
    if slot.device.type == "cpu":
        found = _step_on_cpu(call)
        if found is not None:
            output, lse = found
            return output, output.new_empty(0, dtype=score_dtype(query)) if lse is None else lse
    write(key, value, key_ring, value_ring, slot, position)
    grouped = query.to(score_dtype(query)).reshape(batch, num_kv_heads, num_heads // num_kv_heads, head_dim)
    output = torch.empty_like(grouped)
    highest, share = (grouped.new_empty(grouped.shape[:3] if softmax else 0) for _ in range(2))
    products = _products(key_ring, value_ring, slot, position, call.head_bias(), num_kv_heads)
    for take, keys, values, table in products:
        rows = take(grouped)
        keys = keys.to(rows.dtype).transpose(1, 2)
        if softcap is None:
            scores = torch.baddbmm(table, rows, keys, alpha=scale)
        else:
            scores = torch.add(table, torch.bmm(rows, keys).mul_(scale / softcap).tanh_(), alpha=softcap)
        if softmax:
            weights = scores.softmax(dim=-1)
            torch.amax(scores, dim=-1, out=take(highest))
            torch.amax(weights, dim=-1, out=take(share))
        else:
            weights = scores.sigmoid_()
        torch.bmm(weights, values.to(rows.dtype), out=take(output))
    shape = (batch, 1, num_heads)
    # the largest weight is exp(highest - lse): a third of what logsumexp takes for a row
    lse = highest.sub_(share.log_())
    return output.view(*shape, head_dim).to(query.dtype), lse.view(shape) if softmax else lse


def _step_on_cpu(call: StepCall) -> tuple[Tensor, Tensor | None] | None:
    """All sequences together where they stand at one place, or each by itself; None where one batch serves better."""
    query, key, value, key_ring, value_ring, slot, position, score_function, scale, *_ = call
    batch, num_kv_heads = query.shape[0], key_ring.shape[2]
    is_plain = call.slopes is None and call.score_bias is None and call.bias == 0 and call.relative_bias is None
    options = {"return_lse": call.softmax, "softcap": call.softcap}
    in_order = not call.batch_invariant and slot.tolist() == list(range(batch))
    if in_order:
        head_major = all(ring.transpose(1, 2).is_contiguous() for ring in (key_ring, value_ring))
        places = set(position.tolist())
        if head_major and len(places) == 1:
            table = periodic_table(key_ring.shape[1], num_kv_heads, call.head_bias())
            own = key_ring[:batch], value_ring[:batch]
            return step_together(query, key, value, *own, places.pop(), table, score_function, scale, **options)
        if head_major or batch > num_kv_heads:
            return None
    table = None if is_plain else periodic_table(key_ring.shape[1], num_kv_heads, call.head_bias())
    rows = query, key, value, key_ring, value_ring, slot, position
    return step_by_row(*rows, table, score_function, scale, **options)


def step_together(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_ring: Tensor,
    value_ring: Tensor,
    position: int,
    periodic: Tensor,
    score_function: str,
    scale: float,
    return_lse: bool = False,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Do what `step` does for sequences that stand at one position and own the rings in order, `[B, W, K, D]`.

    All of them then share one bias and one place to write to. Fast where the rings are head-major in memory.

    Args:
        periodic: from `periodic_table`.
    """
    batch, window, num_kv_heads, head_dim = key_ring.shape
    place, filled = position % window, min(position + 1, window)
    key_ring.narrow(1, place, 1).copy_(key)
    value_ring.narrow(1, place, 1).copy_(value)
    if filled < window:
        key_ring, value_ring = key_ring.narrow(1, 0, filled), value_ring.narrow(1, 0, filled)
    keys, values = key_ring.transpose(1, 2).flatten(0, 1), value_ring.transpose(1, 2).flatten(0, 1)
    rows, dtype = query.reshape(batch * num_kv_heads, -1, head_dim), periodic.dtype
    if keys.dtype != dtype:
        rows, keys, values = rows.to(dtype), keys.to(dtype), values.to(dtype)
    scores = torch.bmm(rows, keys.transpose(1, 2)).view(batch, num_kv_heads, -1, filled)
    if softcap is not None:
        scores, scale = scores.mul_(scale / softcap).tanh_(), softcap
    # an addition of its own: as the product's addend the bias would be copied for every sequence
    scores = torch.add(periodic.narrow(2, window - place, filled), scores, alpha=scale)
    lse = None
    if score_function == "softmax":
        lse = scores.logsumexp(dim=-1).view(batch, 1, -1) if return_lse else None
        weights = scores.softmax(dim=-1)
    else:
        weights = scores.sigmoid_()
    output = torch.bmm(weights.flatten(0, 1), values).view(batch, 1, -1, head_dim)
    return output if output.dtype == query.dtype else output.to(query.dtype), lse


def step_by_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_ring: Tensor,
    value_ring: Tensor,
    slot: Tensor,
    position: Tensor,
    periodic: Tensor | None,
    score_function: str,
    scale: float,
    return_lse: bool = False,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Do what `step` does on a CPU for one sequence after the other, whose shapes and bits then depend on no other.

    What is read of a ring has been read by nobody for a whole step, so it is memory that is waited for. One batch for
    all sequences, padded or in bands of keys, was slower (docs/experiments.md).

    Args:
        periodic: from `periodic_table`; None where nothing is added to scores.
    """
    write(key, value, key_ring, value_ring, slot, position)
    batch, _, num_heads, head_dim = query.shape
    window, num_kv_heads = key_ring.shape[1:3]
    precise, softmax = score_dtype(query), score_function == "softmax"
    # [N, K, D, W] and [N, K, W, D]
    all_keys, all_values = key_ring.permute(0, 2, 3, 1), value_ring.transpose(1, 2)
    rows = query.to(precise).view(batch, num_kv_heads, num_heads // num_kv_heads, head_dim)
    rows = rows.mul(scale if softcap is None else scale / softcap)
    output = torch.empty_like(rows)
    # the largest weight is exp(highest - lse): a third of what logsumexp takes for a row
    highest, share = (rows.new_empty(rows.shape[:3] if return_lse else (batch, 0)) for _ in range(2))
    each = zip(slot.tolist(), position.tolist(), rows.unbind(), output.unbind(), highest.unbind(), share.unbind(),
               strict=True)  # fmt: skip
    for own, place, row, found, most, part in each:
        filled = min(place + 1, window)
        keys, values = all_keys.select(0, own).narrow(2, 0, filled), all_values.select(0, own).narrow(1, 0, filled)
        if keys.dtype != precise:
            keys, values = keys.to(precise), values.to(precise)
        table = None if periodic is None else periodic.narrow(2, window - place % window, filled)
        if softcap is not None:
            scores = torch.bmm(row, keys).tanh_().mul_(softcap)
            scores = scores if table is None else scores.add_(table)
        else:
            scores = torch.bmm(row, keys) if table is None else torch.baddbmm(table, row, keys)
        weights = scores.softmax(dim=-1) if softmax else scores.sigmoid_()
        if return_lse:
            torch.amax(scores, dim=-1, out=most)
            torch.amax(weights, dim=-1, out=part)
        torch.bmm(weights, values, out=found)
    lse = highest.sub_(share.log_()).view(batch, 1, num_heads) if return_lse else None
    return output.view(batch, 1, num_heads, head_dim).to(query.dtype), lse


def periodic_table(window: int, num_kv_heads: int, bias: HeadBias) -> Tensor:
    """Two periods of the bias of a ring's places, `[K, G, 2 W]`; made once for equal numbers.

    The bias of all places at a position p is the run of W columns that begins at `W - p mod W`.
    """
    return _periodic(window, bias).unflatten(0, (num_kv_heads, -1))


def empty_ring(slots: int, window: int, num_kv_heads: int, head_dim: int, like: Tensor) -> Tensor:
    """Zeros `[slots, window, K, D]`, head-major in memory, which lets a CPU decode all sequences in one product."""
    return like.new_zeros(slots, num_kv_heads, window, head_dim).transpose(1, 2)


def like_ring(tensor: Tensor) -> Tensor:
    """The same numbers head-major in memory, as `empty_ring` lays them out."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2) if tensor.dim() == 4 else tensor


Product = tuple[Callable[[Tensor], Tensor], Tensor, Tensor, Tensor]


def _products(
    key_ring: Tensor,
    value_ring: Tensor,
    slot: Tensor,
    position: Tensor,
    bias: HeadBias,
    num_kv_heads: int,
) -> Iterator[Product]:
    """Yield `(take, keys [N, W, D], values [N, W, D], table [N, G, W])`: batches over which a ring has one stride.

    On a CPU, where the sequences have their first slots in order, that spares copying the rings, which is all the
    traffic there is: N runs over everything at once where the rings are head-major in memory (`empty_ring`), else over
    the sequences of one head. `take` picks a batch's part of `[B, K, G, ...]`.
    """
    batch, window = slot.shape[0], key_ring.shape[1]
    table = _tables(position, bias, window).unflatten(1, (num_kv_heads, -1))
    is_cpu = key_ring.device.type == "cpu"
    keys, values = (ring[:batch] if is_cpu else ring[slot] for ring in (key_ring, value_ring))
    if is_cpu and not all(ring.transpose(1, 2).is_contiguous() for ring in (key_ring, value_ring)):
        for head in range(num_kv_heads):
            yield (lambda x, head=head: x[:, head]), keys[:, :, head], values[:, :, head], table[:, head]
        return
    keys, values = keys.transpose(1, 2).flatten(0, 1), values.transpose(1, 2).flatten(0, 1)
    yield (lambda x: x.flatten(0, 1)), keys, values, table.flatten(0, 1)


def _periodic(window: int, bias: HeadBias) -> Tensor:
    if bias.relative is None:
        return _periodic_table(window, *_numbers(bias))
    # too many numbers to know them again by
    return bias.at((-torch.arange(2 * window, device=bias.relative.device)).remainder(window))


def _numbers(bias: HeadBias) -> tuple[tuple[float, ...], tuple[float, ...], torch.dtype]:
    return tuple(bias.slopes.tolist()), tuple(bias.constant.tolist()), bias.slopes.dtype


def _tables(position: Tensor, bias: HeadBias, window: int) -> Tensor:
    """The bias of every place of a ring, `[B, H, W]`, -inf where nothing was written yet."""
    distance = (position[:, None] - torch.arange(window, device=position.device)).remainder(window)
    return bias.at(distance).transpose(0, 1).masked_fill_((distance > position[:, None])[:, None], float("-inf"))


@lru_cache(maxsize=256)
def _periodic_table(window: int, slopes: tuple[float, ...], constant: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """Two periods of `bias(-place mod W)`, `[H, 2 W]`: a ring's table at any position is a run of W columns of it."""
    # a plain tensor, also where it is first needed under inference_mode
    with torch.inference_mode(False):
        distance = (-torch.arange(2 * window)).remainder(window)
        return HeadBias(torch.tensor(slopes, dtype=dtype), torch.tensor(constant, dtype=dtype)).at(distance)


def step_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_ring: Tensor,
    value_ring: Tensor,
    slot: Tensor,
    position: Tensor,
    slopes: Tensor | None,
    score_bias: Tensor | float,
    score_function: str,
    scale: float,
    softcap: float | None = None,
    relative_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Do the same by the definition: put every ring in the order of the stream and attend over it."""
    window = key_ring.shape[1]
    write(key, value, key_ring, value_ring, slot, position)
    place = ((position + 1)[:, None] + torch.arange(window, device=position.device)).remainder(window)
    keys, values = key_ring[slot[:, None], place], value_ring[slot[:, None], place]
    first = (window - 1 - position).clamp_min(0).to(torch.int32)[:, None]
    return window_attention_reference(
        query, keys, values, slopes, score_bias, first, None, window, score_function, scale, softcap, None,
        relative_bias,
    )  # fmt: skip


def write(key: Tensor, value: Tensor, key_ring: Tensor, value_ring: Tensor, slot: Tensor, position: Tensor) -> None:
    """Put the new token's key and value at place `position mod window` of its sequence's ring."""
    window = key_ring.shape[1]
    slots, positions = (slot.tolist(), position.tolist()) if slot.device.type == "cpu" else ([], [])
    if len(set(positions)) == 1 and slots == list(range(slots[0], slots[0] + len(slots))):
        # a slice costs a third of an index
        own, place = slice(slots[0], slots[0] + len(slots)), positions[0] % window
    else:
        own, place = slot, position.remainder(window)
    key_ring[own, place] = key[:, 0]
    value_ring[own, place] = value[:, 0]
