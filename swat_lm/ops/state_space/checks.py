"""What the scan and its step refuse: shapes, dtypes and devices, never values on a device (that would be a sync)."""

import torch
from torch import Tensor

from swat_lm.ops.precision import check_dtype, sum_dtype

BACKENDS = ("chunked", "reference")


def check_inputs(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, step_size: Tensor) -> None:
    """Refuse tensors that do not fit together."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            sizes = "[batch, tokens, heads, head size]" if name == "value" else "[batch, tokens, groups, state size]"
            raise ValueError(f"{name}: expected 4 dimensions {sizes}, got {list(tensor.shape)}")
        if tensor.dtype != value.dtype:
            raise ValueError(f"{name}: expected the value's dtype {value.dtype}, got {tensor.dtype}")
    batch, num_tokens, num_heads, head_dim = value.shape
    if num_tokens < 1:
        raise ValueError("value: expected at least 1 token, got none; without tokens the state stays as it is")
    if num_heads < 1 or head_dim < 1:
        raise ValueError(f"value: expected at least one head of at least size 1, got {list(value.shape)}")
    if key.shape[:2] != value.shape[:2] or key.shape[2] < 1 or key.shape[3] < 1:
        raise ValueError(f"key: expected [{batch}, {num_tokens}, groups, state size], got {list(key.shape)}")
    if num_heads % key.shape[2]:
        raise ValueError(
            f"key: {num_heads} heads cannot be shared evenly by {key.shape[2]} groups; "
            "the first must be a multiple of the second"
        )
    if query.shape != key.shape:
        raise ValueError(f"query: expected the key's shape {list(key.shape)}, got {list(query.shape)}")
    for name, tensor in (("log_decay", log_decay), ("step_size", step_size)):
        if tensor.shape != value.shape[:3]:
            raise ValueError(
                f"{name}: expected one number per token and head, {list(value.shape[:3])}, got {list(tensor.shape)}"
            )
    for name, tensor in zip(
        ("query", "key", "value", "log_decay", "step_size"), (query, key, value, log_decay, step_size), strict=True
    ):
        check_dtype(name, tensor)
        if tensor.device != value.device:
            raise ValueError(f"{name}: expected the value's device {value.device}, got {tensor.device}")


def check_scan(
    value: Tensor, key: Tensor, initial_state: Tensor | None, skip: Tensor | None, chunk_size: int, backend: str
) -> None:
    """Refuse an initial state or a skip connection that does not fit, and choices that there are not."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}; got {backend!r}")
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size: expected a whole number of tokens, at least 1, got {chunk_size!r}")
    if skip is not None:
        check_dtype("skip", skip)
        if tuple(skip.shape) != (value.shape[2],) or skip.device != value.device:
            raise ValueError(
                f"skip: expected one number per head, [{value.shape[2]}] on {value.device}, got {list(skip.shape)} on "
                f"{skip.device}"
            )
    if initial_state is not None:
        _check_state("initial_state", initial_state, value, key, "batch", value.shape[0])


def check_step(value: Tensor, key: Tensor, state: Tensor, slot: Tensor) -> None:
    """Refuse states and slots that do not fit one new token per sequence."""
    if value.shape[1] != 1:
        raise ValueError(
            f"value: a step takes one token per sequence, got {value.shape[1]}; use state_space_scan for chunks"
        )
    _check_state("state", state, value, key, "slots", None)
    if tuple(slot.shape) != (value.shape[0],) or slot.dtype != torch.int64:
        raise ValueError(f"slot: expected int64 [{value.shape[0]}], got {slot.dtype} {list(slot.shape)}")
    if slot.device != value.device:
        raise ValueError(f"slot: expected the value's device {value.device}, got {slot.device}")
    if value.shape[0] > state.shape[0]:
        raise ValueError(f"slot: {value.shape[0]} sequences cannot own {state.shape[0]} states, one each")


def _check_state(name: str, state: Tensor, value: Tensor, key: Tensor, first: str, size: int | None) -> None:
    shape = (*value.shape[2:], key.shape[3])
    if state.dim() != 4 or state.shape[1:] != shape or (size is not None and state.shape[0] != size):
        expected = ", ".join(map(str, (first if size is None else size, *shape)))
        raise ValueError(
            f"{name}: expected [{expected}] ({first}, heads, head size, state size), got {list(state.shape)}"
        )
    if state.dtype != sum_dtype(value):
        raise ValueError(
            f"{name}: expected {sum_dtype(value)}, the precision in which values of {value.dtype} are summed, "
            f"got {state.dtype}"
        )
    if state.device != value.device:
        raise ValueError(f"{name}: expected the value's device {value.device}, got {state.device}")
