"""One token per sequence over a pool of states, in place: the decoding form of the scan.

A state is as large as all that a token reads or writes together, so a step is bound by going over it once.
"""

import torch
from torch import Tensor

from swat_lm.ops.precision import sum_dtype


def step(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, step_size: Tensor, state: Tensor, slot: Tensor
) -> Tensor:
    """Move the states of `slot` on by one token, `[slots, H, P, N]`; return the output `[B, 1, H, P]`."""
    dtype = sum_dtype(value)
    batch, _, num_heads, head_dim = value.shape
    groups, state_size = key.shape[2:]
    grouped = (batch, groups, num_heads // groups, head_dim)
    decay = log_decay.to(dtype).exp().reshape(*grouped[:3], 1, 1)
    entering = (value.to(dtype) * step_size.to(dtype)[..., None]).reshape(*grouped, 1)
    keys = key.to(dtype).reshape(batch, groups, 1, 1, state_size)
    own = _slice_of(slot)
    states = state[slot] if own is None else state[own]
    # a view, whatever the strides of the pool are
    moved = states.unflatten(1, grouped[1:3]).mul_(decay).addcmul_(entering, keys)
    if own is None:
        state[slot] = states
    queries = query.to(dtype).reshape(batch, groups, state_size, 1)
    return torch.matmul(moved.flatten(2, 3), queries).view(value.shape).to(value.dtype)


def _slice_of(slot: Tensor) -> slice | None:
    """Return the slots as a slice where they are neighbours in order, which spares copying the states; CPU only."""
    if slot.device.type != "cpu" or slot.shape[0] == 0:
        return None
    slots = slot.tolist()
    if slots[0] < 0 or slots != list(range(slots[0], slots[0] + len(slots))):
        return None
    return slice(slots[0], slots[0] + len(slots))
