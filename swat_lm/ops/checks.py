"""What the operator refuses: shapes, dtypes and devices, never values on a device (that would be a sync).

Every message names the argument, what was expected and what came.
"""

import math

import torch
from torch import Tensor

from swat_lm.words import counted

BACKENDS = ("auto", "reference", "blocked", "triton")
SCORE_FUNCTIONS = ("sigmoid", "softmax")
PRECISIONS = ("auto", "exact", "fast")


def checked_window(window: int | None) -> int | None:
    """Return the window, or raise ValueError where it is no positive integer and not None."""
    if window is None:
        return None
    if isinstance(window, bool) or not isinstance(window, int | torch.SymInt):
        raise ValueError(f"window: expected an integer (keys seen, the query included) or None, got {window!r}")
    if window < 1:
        raise ValueError(
            f"window: expected at least 1 (a query always counts itself), got {window}; "
            "pass window=None for full causal attention"
        )
    return window


def check_choices(score_function: str, precision: str, backend: str) -> None:
    """Refuse a name that is not on its list."""
    for name, got, allowed in (
        ("score_function", score_function, SCORE_FUNCTIONS),
        ("precision", precision, PRECISIONS),
        ("backend", backend, BACKENDS),
    ):
        if got not in allowed:
            raise ValueError(f"{name}: expected one of {', '.join(allowed)}; got {got!r}")


def check_inputs(
    query: Tensor, key: Tensor, value: Tensor, slopes: Tensor | None, score_bias: float | Tensor, precision: str
) -> None:
    """Refuse tensors that do not fit together, before any backend sees them."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ValueError(
                f"{name}: expected 4 dimensions [batch, tokens, heads, head size], got {list(tensor.shape)}"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name}: expected the query's dtype {query.dtype}, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name}: expected the query's device {query.device}, got {tensor.device}")
    if value.shape != key.shape:
        raise ValueError(f"value: expected the key's shape {list(key.shape)}, got {list(value.shape)}")
    if key.shape[0] != query.shape[0] or key.shape[3] != query.shape[3]:
        raise ValueError(
            f"key: expected the query's batch and head size, [{query.shape[0]}, S, K, {query.shape[3]}], "
            f"got {list(key.shape)}"
        )
    if key.shape[2] < 1 or query.shape[2] % key.shape[2]:
        raise ValueError(
            f"query: {query.shape[2]} query heads cannot be shared evenly by {key.shape[2]} key/value heads; "
            "the first must be a multiple of the second"
        )
    if precision == "fast" and query.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"precision: 'fast' serves bfloat16 and float16 inputs only, got {query.dtype}; use 'exact'")
    if not isinstance(score_bias, Tensor) and not -math.inf < score_bias < math.inf:
        raise ValueError(f"score_bias: expected a finite number or a tensor [heads], got {score_bias}")
    for name, tensor in (("slopes", slopes), ("score_bias", score_bias)):
        if not isinstance(tensor, Tensor):
            continue
        if tuple(tensor.shape) != (query.shape[2],):
            raise ValueError(
                f"{name}: expected one number per query head, shape [{query.shape[2]}], got {list(tensor.shape)}"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name}: expected the query's device {query.device}, got {tensor.device}")


def check_visibility(query: Tensor, key: Tensor, first_visible: Tensor | None, last_visible: Tensor | None) -> None:
    """Refuse visibility of the wrong shape or dtype; its values are `visibility.py`'s business."""
    expected = (query.shape[0], query.shape[1])
    for name, tensor in (("first_visible", first_visible), ("last_visible", last_visible)):
        if tensor is None:
            continue
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{name}: expected [batch, queries] = {list(expected)}, got {list(tensor.shape)}")
        if tensor.dtype != torch.int32:
            raise ValueError(f"{name}: expected int32 indices into the keys, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name}: expected the query's device {query.device}, got {tensor.device}")
    if last_visible is None and query.shape[1] > key.shape[1]:
        raise ValueError(
            f"query: {counted(query.shape[1], 'query')} over {counted(key.shape[1], 'key')}; the "
            "queries are the last of the keys unless "
            "last_visible says where each one stands"
        )


def check_relative_bias(query: Tensor, relative_bias: Tensor | None, window: int | None) -> None:
    """Refuse a bias that does not say one number for every head and distance."""
    if relative_bias is None:
        return
    if window is None:
        raise ValueError("relative_bias: holds a number for every distance, so it needs a window; give one")
    if relative_bias.dim() != 2 or relative_bias.shape[0] != query.shape[2] or relative_bias.shape[1] < window:
        raise ValueError(
            f"relative_bias: expected a number for every head and distance, [{query.shape[2]}, {window}], "
            f"got {list(relative_bias.shape)}"
        )
    if not relative_bias.is_floating_point() or relative_bias.device != query.device:
        raise ValueError(
            f"relative_bias: expected a floating-point tensor on {query.device}, got {relative_bias.dtype} on "
            f"{relative_bias.device}"
        )


def check_softcap(softcap: float | None) -> None:
    """Refuse a cap that caps nothing or everything."""
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap: expected a positive number, or None to cap no scores; got {softcap}")


def check_hidden(key: Tensor, hidden: Tensor | None) -> None:
    """Refuse what does not say of each key whether it is hidden."""
    if hidden is None:
        return
    if hidden.shape != key.shape[:2] or hidden.dtype != torch.bool or hidden.device != key.device:
        raise ValueError(
            f"hidden: expected bool [batch, keys] = {list(key.shape[:2])} on {key.device}, "
            f"got {hidden.dtype} {list(hidden.shape)} on {hidden.device}"
        )


def check_rotary(query: Tensor, key: Tensor, last_visible: Tensor | None, rotary: tuple[Tensor, Tensor] | None) -> None:
    """Refuse angles that do not fit, and calls whose queries and keys are not the same tokens."""
    if rotary is None:
        return
    if query.shape[1] != key.shape[1] or last_visible is not None:
        raise ValueError(
            f"rotary: serves queries and keys of the same tokens, got {counted(query.shape[1], 'query')} "
            f"over {counted(key.shape[1], 'key')}"
            f"{'' if last_visible is None else ' and last_visible'}; rotate both with apply_rotary before the call"
        )
    if query.shape[3] % 2:
        raise ValueError(f"rotary: needs an even head size, got {query.shape[3]}")
    angles = (query.shape[1], query.shape[3] // 2)
    shapes = [angles, (1, *angles), (query.shape[0], *angles)]
    for name, tensor in zip(("cosine", "sine"), rotary, strict=True):
        if tuple(tensor.shape) not in shapes:
            raise ValueError(f"rotary: expected the {name} [T, D/2] or [B, T, D/2], got {list(tensor.shape)}")
        if not tensor.is_floating_point() or tensor.device != query.device:
            raise ValueError(
                f"rotary: expected the {name} as a floating-point tensor on {query.device}, "
                f"got {tensor.dtype} on {tensor.device}"
            )
        if tensor.requires_grad:
            raise ValueError(f"rotary: angles get no gradient; pass the {name} detached, or use apply_rotary")


def check_rings(
    query: Tensor, key: Tensor, key_ring: Tensor, value_ring: Tensor, slot: Tensor, position: Tensor
) -> None:
    """Refuse rings, slots and positions that do not fit one new token per sequence."""
    if query.shape[1] != 1 or key.shape[1] != 1:
        raise ValueError(
            f"query: a step takes one token per sequence, got {counted(query.shape[1], 'query')} and "
            f"{counted(key.shape[1], 'key')}; use window_attention for chunks"
        )
    for name, ring in (("key_ring", key_ring), ("value_ring", value_ring)):
        if ring.dim() != 4 or ring.shape[2:] != key.shape[2:] or ring.shape[1] < 1:
            raise ValueError(
                f"{name}: expected [slots, window, {key.shape[2]}, {key.shape[3]}] to hold the keys, "
                f"got {list(ring.shape)}"
            )
        if ring.dtype != key.dtype or ring.device != key.device:
            raise ValueError(f"{name}: expected {key.dtype} on {key.device}, got {ring.dtype} on {ring.device}")
    if key_ring.shape != value_ring.shape:
        raise ValueError(
            f"value_ring: expected the key ring's shape {list(key_ring.shape)}, got {list(value_ring.shape)}"
        )
    for name, tensor in (("slot", slot), ("position", position)):
        if tuple(tensor.shape) != (query.shape[0],) or tensor.dtype != torch.int64:
            raise ValueError(f"{name}: expected int64 [{query.shape[0]}], got {tensor.dtype} {list(tensor.shape)}")
        if tensor.device != query.device:
            raise ValueError(f"{name}: expected the query's device {query.device}, got {tensor.device}")
    if query.shape[0] > key_ring.shape[0]:
        raise ValueError(
            f"slot: {counted(query.shape[0], 'sequence')} cannot own {counted(key_ring.shape[0], 'ring')}, one each"
        )
