"""FLOPs of the operators: useful ones, of attention over the pairs that the window and causality leave.

A multiply-add is 2; recomputation in the backward pass does not count.
"""

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

# these define the ops that are counted here
import swat_lm.ops.library
import swat_lm.ops.state_space.library  # noqa: F401


def visible_pairs(num_queries: int, window: int | None, num_past: int = 0) -> int:
    """Query-key pairs that T causal queries see after `num_past` tokens: the sum of `min(past + t + 1, window)`."""
    if window is None:
        window = num_past + num_queries
    # queries that see less than a full window: positions num_past .. window - 2
    growing = max(0, min(num_queries, window - 1 - num_past))
    return growing * num_past + growing * (growing + 1) // 2 + (num_queries - growing) * window


def attention_flops(num_heads: int, head_dim: int, num_queries: int, window: int | None, num_past: int = 0) -> int:
    """FLOPs of the two products of attention, over the visible pairs of `num_heads` heads (of a batch: B * H)."""
    return 4 * num_heads * head_dim * visible_pairs(num_queries, window, num_past)


def state_space_flops(num_channels: int, state_size: int, num_tokens: int) -> int:
    """FLOPs of the two products of a recurrence with a matrix as its state: what is written to it and read from it."""
    return 4 * num_channels * state_size * num_tokens


# `torch.utils.flop_counter` counts our operators by the same rules: useful pairs, the visibility of a plain batch


@register_flop_formula(torch.ops.swat_lm.window_attention)
def _window_attention_flops(*args: Any, **kwargs: Any) -> int:
    return _attended_flops(torch.ops.swat_lm.window_attention, args)


@register_flop_formula(torch.ops.swat_lm.window_attention_backward)
def _window_attention_backward_flops(*args: Any, **kwargs: Any) -> int:
    return 2 * _attended_flops(torch.ops.swat_lm.window_attention_backward, args)


@register_flop_formula(torch.ops.swat_lm.state_space_scan)
def _state_space_scan_flops(*args: Any, **kwargs: Any) -> int:
    return _scanned_flops(torch.ops.swat_lm.state_space_scan, args)


@register_flop_formula(torch.ops.swat_lm.state_space_scan_backward)
def _state_space_scan_backward_flops(*args: Any, **kwargs: Any) -> int:
    return 2 * _scanned_flops(torch.ops.swat_lm.state_space_scan_backward, args)


def _scanned_flops(operation: Any, args: tuple[Any, ...]) -> int:
    named = _by_name(operation, args)
    batch, num_tokens, num_heads, head_dim = named["value"]
    return state_space_flops(batch * num_heads * head_dim, named["key"][-1], num_tokens)


def _by_name(operation: Any, args: tuple[Any, ...]) -> dict[str, Any]:
    # tensors come as their shapes; the places of the arguments are the op's own affair
    return {argument.name: value for argument, value in zip(operation.default._schema.arguments, args, strict=False)}


def _attended_flops(operation: Any, args: tuple[Any, ...]) -> int:
    named = _by_name(operation, args)
    batch, num_queries, num_heads, head_dim = named["query"]
    num_past = named["key"][1] - num_queries
    return attention_flops(batch * num_heads, head_dim, num_queries, named["window"], num_past)


@register_flop_formula(torch.ops.swat_lm.window_attention_step)
def _window_attention_step_flops(
    query: tuple[int, ...],
    key: tuple[int, ...],
    value: tuple[int, ...],
    key_ring: tuple[int, ...],
    *args: Any,
    **kwargs: Any,
) -> int:
    # counted as a full ring: the positions are values, which a formula of shapes does not see
    batch, _, num_heads, head_dim = query
    return 4 * batch * num_heads * head_dim * key_ring[1]
