"""The slots of an engine: how many fit into memory, and in which sizes of batches they decode."""

from bisect import bisect_right
from itertools import pairwise

import torch

from swat_lm.model.configuration import SwatConfig
from swat_lm.model.cost import layers_without_weights, state_bytes
from swat_lm.model.modeling import SwatForCausalLM
from swat_lm.model.slots import Slots
from swat_lm.serve.generation import is_whole
from swat_lm.serve.requests import Limits

__all__ = ["batch_sizes", "most_spare", "pool_of", "slot_bytes", "slots_in"]


def pool_of(model: SwatForCausalLM, limits: Limits, given: Slots | None = None, restorable: bool = False) -> Slots:
    """Slots for a pool of these limits, or those that are given.

    Raises ValueError for a model that grows without a capacity, and for given slots that are too few or many, or
    another model's.
    """
    # rows that only fill a batch up have slots too, which nobody reads; the places to go back to come last
    count = limits.num_slots + most_spare(limits.num_slots) + restorable * limits.num_slots
    if given is None:
        slots = model.init_state(count, capacity=limits.capacity)
        if slots.grows and limits.capacity is None:
            raise ValueError("capacity: a layer of the model keeps all it has seen; say how many tokens a slot holds")
    else:
        slots = given
        model.check_state(slots)
        if slots.num_slots != count:
            raise ValueError(f"slots: expected {count} for a pool of {limits.num_slots}, got {slots.num_slots}")
    # requests come and go at positions of their own, but one slot stands where it stands
    slots.ragged = slots.ragged or count > 1
    return slots


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
