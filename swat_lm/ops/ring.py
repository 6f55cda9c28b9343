"""Decoding over rings of keys and values, in place: the PyTorch backend of `window_attention_step`.

Place i of a ring holds the key at distance `(position - i) mod window`. The order of keys does not matter to a sum,
so nothing is ever shifted or concatenated.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from swat_lm.ops.head_bias import HeadBias, score_dtype
from swat_lm.ops.reference import window_attention_reference


def step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_ring: Tensor,
    value_ring: Tensor,
    slot: Tensor,
    position: Tensor,
    bias: HeadBias,
    score_function: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Write the new key and value, attend; `(output [B, 1, H, D], lse [B, 1, H])`, the lse empty for sigmoid."""
    window, num_kv_heads, head_dim = key_ring.shape[1:]
    batch, _, num_heads, _ = query.shape
    dtype = score_dtype(query)
    write(key, value, key_ring, value_ring, slot, position)
    distance = (position[:, None] - torch.arange(window, device=position.device)).remainder(window)
    table = bias.at(distance).transpose(0, 1).masked_fill_((distance > position[:, None])[:, None], float("-inf"))
    table = table.reshape(batch, num_kv_heads, -1, window)
    grouped = query.to(dtype).reshape(batch, num_kv_heads, -1, head_dim)
    output = torch.empty_like(grouped)
    softmax = score_function == "softmax"
    lse = table.new_empty(table.shape[:3]) if softmax else table.new_empty(0)
    for take, keys, values in _views(key_ring, value_ring, slot, grouped.shape[0]):
        scores = torch.baddbmm(take(table), take(grouped), keys.to(dtype).transpose(1, 2), alpha=scale)
        if softmax:
            take(lse).copy_(scores.logsumexp(dim=-1))
            weights = scores.softmax(dim=-1)
        else:
            weights = scores.sigmoid_()
        take(output).copy_(torch.bmm(weights, values.to(dtype)))
    shape = (batch, 1, num_heads)
    return output.view(*shape, head_dim).to(query.dtype), lse.view(shape) if softmax else lse


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
) -> tuple[Tensor, Tensor | None]:
    """Do the same by the definition: put every ring in the order of the stream and attend over it."""
    window = key_ring.shape[1]
    write(key, value, key_ring, value_ring, slot, position)
    oldest = position + 1
    place = (oldest[:, None] + torch.arange(window, device=position.device)).remainder(window)
    keys, values = key_ring[slot[:, None], place], value_ring[slot[:, None], place]
    first = (window - 1 - position).clamp_min(0).to(torch.int32)[:, None]
    return window_attention_reference(
        query, keys, values, slopes, score_bias, first, None, window, score_function, scale
    )  # fmt: skip


def write(key: Tensor, value: Tensor, key_ring: Tensor, value_ring: Tensor, slot: Tensor, position: Tensor) -> None:
    """Put the new token's key and value at place `position mod window` of its sequence's ring."""
    place = position.remainder(key_ring.shape[1])
    key_ring[slot, place] = key[:, 0]
    value_ring[slot, place] = value[:, 0]


def _views(
    key_ring: Tensor, value_ring: Tensor, slot: Tensor, batch: int
) -> Iterator[tuple[Callable[[Tensor], Tensor], Tensor, Tensor]]:
    """Yield `(take, keys [N, W, D], values [N, W, D])`: batches over which a ring has a single stride.

    On a CPU that spares copying the rings, which is all the traffic there is; N runs over the key/value heads of one
    sequence, or over the sequences of one key/value head where the sequences are the first slots in order.
    """
    if key_ring.device.type != "cpu":
        keys, values = key_ring[slot].transpose(1, 2).flatten(0, 1), value_ring[slot].transpose(1, 2).flatten(0, 1)
        yield (lambda x: x.flatten(0, 1)), keys, values
        return
    slots = slot.tolist()
    if batch > key_ring.shape[2] and slots == list(range(batch)):
        for head in range(key_ring.shape[2]):
            yield (lambda x, h=head: x[:, h]), key_ring[:batch, :, head], value_ring[:batch, :, head]
        return
    for b, s in enumerate(slots):
        yield (lambda x, b=b: x[b]), key_ring[s].transpose(0, 1), value_ring[s].transpose(0, 1)
