"""FLOPs of the operators: useful ones, of attention over the pairs that the window and causality leave.

A multiply-add is 2; recomputation in the backward pass does not count.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

# these define the ops that are counted here
import swat_lm.ops.library
import swat_lm.ops.quantised_attention
import swat_lm.ops.selected
import swat_lm.ops.state_space.library  # noqa: F401


def visible_pairs(num_queries: int, window: int | None, num_past: int = 0) -> int:
    """Query-key pairs that T causal queries see after `num_past` tokens: the sum of `min(past + t + 1, window)`.

    A negative `num_past` is that of queries over fewer keys, which stand before all of them.
    """
    if num_past < 0:
        return num_queries * (num_past + num_queries)
    if window is None:
        window = num_past + num_queries
    # queries that see less than a full window: positions num_past .. window - 2
    growing = max(0, min(num_queries, window - 1 - num_past))
    return growing * num_past + growing * (growing + 1) // 2 + (num_queries - growing) * window


def attention_flops(num_heads: int, head_dim: int, num_queries: int, window: int | None, num_past: int = 0) -> int:
    """FLOPs of the two products of attention, over the visible pairs of `num_heads` heads (of a batch: B * H)."""
    return 4 * num_heads * head_dim * visible_pairs(num_queries, window, num_past)


def selected_flops(
    num_heads: int, head_dim: int, num_queries: int, window: int, selected: int, num_past: int = 0
) -> int:
    """FLOPs of the two products of attention to a window and to at most so many tokens that have left it."""
    pairs = visible_pairs(num_queries, window, num_past) if window else 0
    before = max(0, num_past - window)
    queries = max(0, num_past + num_queries - window) - before
    if selected:
        pairs += visible_pairs(queries, selected, before)
    return 4 * num_heads * head_dim * pairs


def quantised_flops(
    key_size: int, value_size: int, num_queries: int, block: int, codes: int, num_past: int = 0,
    both_ways: bool = False,
) -> int:  # fmt: skip
    """FLOPs of the two products of attention to near keys and to codes, where there are keys farther away.

    The search for the nearest codes, which has no gradient, does not count.
    """
    if both_ways:
        return 2 * (key_size + value_size) * _pairs_both_ways(num_queries, block, codes)
    pairs = _pairs_by_code(num_past + num_queries, block, codes) - _pairs_by_code(num_past, block, codes)
    return 2 * (key_size + value_size) * pairs


def _pairs_by_code(num_tokens: int, block: int, codes: int) -> int:
    """What so many first tokens see: keys of their own block and the one before, and codes from the third block on."""
    whole, rest = divmod(num_tokens, block)
    near = whole * (block * (block + 1) // 2) + max(0, whole - 1) * block**2
    near += rest * (rest + 1) // 2 + (rest * block if whole else 0)
    return near + max(0, num_tokens - 2 * block) * codes


def _pairs_both_ways(num_tokens: int, block: int, codes: int) -> int:
    """The same where a token also sees the block after its own, and codes where there are blocks beyond these."""
    lengths = [min(block, num_tokens - at) for at in range(0, num_tokens, block)]
    found = 0
    for index, own in enumerate(lengths):
        found += own * sum(lengths[max(0, index - 1) : index + 2])
        found += own * codes * (index >= 2 or index + 2 < len(lengths))
    return found


def state_space_flops(num_channels: int, state_size: int, num_tokens: int) -> int:
    """FLOPs of the two products of a recurrence with a matrix as its state: what is written to it and read from it."""
    return 4 * num_channels * state_size * num_tokens


# `torch.utils.flop_counter` counts our operators by the same rules: useful pairs, the visibility of a plain batch


def _attended(query: Any, key: Any, window: int | None, **_: Any) -> int:
    batch, num_queries, num_heads, head_dim = query
    return attention_flops(batch * num_heads, head_dim, num_queries, window, key[1] - num_queries)


def _attended_step(query: Any, key_ring: Any, **_: Any) -> int:
    # counted as a full ring: the positions are values, which a formula of shapes does not see
    return attention_flops(query[0] * query[2], query[3], 1, None, key_ring[1] - 1)


def _scanned(key: Any, value: Any, **_: Any) -> int:
    batch, num_tokens, num_heads, head_dim = value
    return state_space_flops(batch * num_heads * head_dim, key[-1], num_tokens)


def _selected(query: Any, key: Any, kept_key: Any, window: int, **_: Any) -> int:
    # more items before the rows than the window are not kept: then as many are counted as can be selected
    batch, num_queries, num_heads, head_dim = query
    num_past = key[1] - num_queries
    before = num_past + (kept_key[2] if num_past and num_past == window else 0)
    return selected_flops(batch * num_heads, head_dim, num_queries, window, kept_key[2], before)


def _quantised(query: Any, key: Any, value: Any, codes: Any, block: int, both_ways: bool, **_: Any) -> int:
    batch, num_queries, key_size = query
    num_past = key[1] - num_queries
    each = quantised_flops(key_size, value[-1], num_queries, block, codes[0], num_past, both_ways)
    return batch * each


def _register(operation: Any, count: Callable[..., int], times: int = 1) -> None:
    @register_flop_formula(operation)
    def formula(*args: Any, **kwargs: Any) -> int:
        # tensors come as their shapes; the places of the arguments are the op's own affair
        names = [argument.name for argument in operation.default._schema.arguments]
        return times * count(**dict(zip(names, args, strict=False)))


_register(torch.ops.swat_lm.window_attention, _attended)
_register(torch.ops.swat_lm.window_attention_backward, _attended, times=2)
_register(torch.ops.swat_lm.window_attention_step, _attended_step)
_register(torch.ops.swat_lm.state_space_scan, _scanned)
_register(torch.ops.swat_lm.state_space_scan_backward, _scanned, times=2)
_register(torch.ops.swat_lm.selected_attention, _selected)
_register(torch.ops.swat_lm.selected_attention_backward, _selected, times=2)
_register(torch.ops.swat_lm.quantised_attention, _quantised)
_register(torch.ops.swat_lm.quantised_attention_backward, _quantised, times=2)
