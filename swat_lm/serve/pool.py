"""How large an engine's pool of slots is: rows that decode, rows that fill batches up, and copies to go back to."""

from bisect import bisect_right
from itertools import pairwise

import torch

from swat_lm.model.configuration import SwatConfig
from swat_lm.model.cost import layers_without_weights, state_bytes
from swat_lm.serve.generation import is_whole

__all__ = ["batch_sizes", "most_spare", "slot_bytes", "slots_in"]


def batch_sizes(num_slots: int) -> tuple[int, ...]:
    """Powers of two below the number of slots, and that number."""
    return (*(1 << power for power in range((num_slots - 1).bit_length())), num_slots)


def slots_in(
    config: SwatConfig,
    memory: int,
    capacity: int | None = None,
    dtype: torch.dtype | None = None,
    restorable: bool = False,
) -> int:
    """How many slots fit into `memory` bytes, with those that fill batches up.

    Args:
        capacity: tokens that a slot holds where a layer keeps everything.
        dtype: the model's; None: that of the configuration, where a checkpoint was loaded as it is.
        restorable: as the engine's, which takes two places for each slot.

    Raises:
        ValueError: not one fits, no dtype is known, or a layer keeps everything and no capacity is given.
    """
    if not is_whole(memory) or memory < 1:
        raise ValueError(f"memory: expected a whole number of at least 1, got {memory!r}")
    each = slot_bytes(config, capacity, dtype)
    fits = memory // each
    times = 2 if restorable else 1
    count = bisect_right(range(fits + 1), fits, lo=1, key=lambda count: times * count + most_spare(count)) - 1
    if count < 1:
        raise ValueError(
            f"memory: a slot takes {times * each:,} bytes, {memory:,} are too few; give more, or a smaller window"
        )
    return count


def slot_bytes(config: SwatConfig, capacity: int | None = None, dtype: torch.dtype | None = None) -> int:
    """Bytes of one slot; see `slots_in`."""
    known = config.dtype if dtype is None else dtype
    if not isinstance(known, torch.dtype):
        raise ValueError(f"dtype: expected the model's, which this configuration does not name, got {known!r}; give it")
    if capacity is not None and (not is_whole(capacity) or capacity < 1):
        raise ValueError(f"capacity: expected a whole number of at least 1, got {capacity!r}")
    if capacity is None and any(entry.kind == "growing" for layer in layers_without_weights(config)
                                for entry in layer.state_spec()):  # fmt: skip
        raise ValueError("capacity: a layer of the model keeps all it has seen; say how many tokens a slot holds")
    # and two numbers of 8 bytes that say where it stands
    return state_bytes(config, context=capacity, dtype_bytes=known.itemsize) + 16


def most_spare(num_slots: int) -> int:
    """Rows that fill up the batch which needs most of them."""
    sizes = batch_sizes(num_slots)
    return max((large - small - 1 for small, large in pairwise(sizes)), default=0)
