"""The contract of the short causal convolution before a recurrence: two public entries and what they refuse.

`short_convolution` serves training and prefill, `short_convolution_step` decodes in place over a pool of tails. The
sums themselves are one `torch.library` op in `taps.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from swat_lm.ops import taps as _taps  # noqa: F401  (registers the op)
from swat_lm.ops.precision import check_dtype, sum_dtype
from swat_lm.ops.segments import check_rows, documents_of

ACTIVATIONS = ("silu", None)


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    past: Tensor | None = None,
    segments: Tensor | None = None,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve every channel with its own few weights over its own past (the "conv1d" of Mamba and its kin).

        y[t, c] = activation(bias[c] + sum over j < kernel of  weight[c, j] * x[t - (kernel - 1) + j, c])

    so the last weight is the token's own, as in PyTorch's `conv1d`. What lies before the first token is `past`, and
    taps that reach into another document read 0.

    Args:
        x: `[B, T, C]`; float32, float64, bfloat16 or float16. Sums are float32 at least, under autocast too.
        weight: `[C, kernel]`; any floating dtype. A `nn.Conv1d`'s is `conv.weight[:, 0]`.
        bias: `[C]` or None.
        activation: "silu" or None.
        past: `[B, kernel - 1, C]` in the dtype of x, the last inputs before the first token, the latest last; zeros
            when None.
        segments: int32 or int64 `[B, T]`, the number of each token's document, non-decreasing. Segment 0 goes on from
            the past, a token with another number than the one before it begins anew.
        real: bool `[B, T]`. A token that is not real (padding on either side, a hole) is skipped: the taps of the
            others go over it, its output and its gradients are exactly 0, whatever it holds.

    Returns:
        `(output [B, T, C], tail [B, kernel - 1, C])` in the dtype of x. The tail is the last inputs of real tokens,
        0 where they would belong to another document than the last: the past of the next call.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range; the message names it.
    """
    _check_inputs(x, weight, bias, activation)
    batch, num_tokens, num_channels = x.shape
    reach = weight.shape[1] - 1
    if past is None:
        past = x.new_zeros(batch, reach, num_channels)
    else:
        _check_tail("past", past, x, reach, "batch", batch)
    check_rows(segments, real, batch, num_tokens, x.device)
    documents = documents_of(segments, real)
    place = None
    if real is not None:
        # real tokens first, in order: then skipping is no matter of the sums
        x, documents, order = _real_first(x, documents, real)
        place = order.argsort(dim=1)
    output = torch.ops.swat_lm.short_convolution(x, past, documents, weight, bias, activation == "silu")
    if real is None or place is None:
        return output, _tail(past, x, documents, None)
    return _take(output, place).masked_fill(~real[..., None], 0.0), _tail(past, x, documents, real.sum(dim=1))


def short_convolution_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor,
    slot: Tensor,
    *,
    activation: str | None = "silu",
) -> Tensor:
    """Convolve one token per sequence and move its tail on, in place; inference only. Equal to `short_convolution`.

    Args:
        x: `[B, 1, C]`.
        weight, bias, activation: as in `short_convolution`.
        tail: `[slots, kernel - 1, C]` in the dtype of x, the last inputs, the latest last; changed in place.
        slot: int64 `[B]`, the tail that each sequence owns, all different (the values are not checked here).

    Returns:
        `[B, 1, C]` in the dtype of x.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range, or one that requires a gradient.
    """
    _check_inputs(x, weight, bias, activation)
    if x.shape[1] != 1:
        raise ValueError(f"x: a step takes one token per sequence, got {x.shape[1]}; use short_convolution for chunks")
    _check_tail("tail", tail, x, weight.shape[1] - 1, "slots", None)
    if tuple(slot.shape) != (x.shape[0],) or slot.dtype != torch.int64:
        raise ValueError(f"slot: expected int64 [{x.shape[0]}], got {slot.dtype} {list(slot.shape)}")
    if slot.device != x.device:
        raise ValueError(f"slot: expected the device of x, {x.device}, got {slot.device}")
    if x.shape[0] > tail.shape[0]:
        raise ValueError(f"slot: {x.shape[0]} sequences cannot own {tail.shape[0]} tails, one each")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, tail)):
        raise ValueError("short_convolution_step is for inference: call it under torch.no_grad() or inference_mode()")
    dtype = sum_dtype(x)
    read = torch.cat((tail[slot], x), dim=1)
    tail[slot] = read[:, 1:]
    sums = (read.to(dtype) * weight.t().to(dtype)).sum(dim=1, keepdim=True)
    if bias is not None:
        sums = sums + bias.to(dtype)
    return (F.silu(sums) if activation == "silu" else sums).to(x.dtype)


def tail_after(past: Tensor, x: Tensor, segments: Tensor | None = None, real: Tensor | None = None) -> Tensor:
    """Return the tail that `short_convolution` returns for these inputs, without convolving: `[B, kernel - 1, C]`.

    Args:
        past, x, segments, real: as there.
    """
    check_rows(segments, real, x.shape[0], x.shape[1], x.device)
    documents = documents_of(segments, real)
    if real is None:
        return _tail(past, x, documents, None)
    x, documents, _ = _real_first(x, documents, real)
    return _tail(past, x, documents, real.sum(dim=1))


def _real_first(x: Tensor, documents: Tensor | None, real: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Order every row's real tokens first, the others as zeros; also by which index `[B, T]`."""
    order = (~real).to(torch.uint8).argsort(dim=1, stable=True)
    x = _take(x, order).masked_fill(~real.gather(1, order)[..., None], 0.0)
    # the others may have stood before all documents, and numbers never decrease
    return x, None if documents is None else documents.gather(1, order).cummax(dim=1).values, order


def _tail(past: Tensor, x: Tensor, documents: Tensor | None, num_real: Tensor | None) -> Tensor:
    """Return the last inputs of the last document, `[B, reach, C]`, from rows whose real tokens come first."""
    reach, num_tokens = past.shape[1], x.shape[1]
    if num_real is None:
        if documents is None and num_tokens >= reach:
            return x[:, num_tokens - reach :].clone()
        num_real = torch.full_like(x[:, 0, 0], num_tokens, dtype=torch.int64)
    index = num_real[:, None] + torch.arange(reach, device=x.device)
    tail = _take(torch.cat((past, x), dim=1), index)
    if documents is None or reach == 0:
        return tail
    own = F.pad(documents, (reach, 0)).gather(1, index)
    return tail.masked_fill((own != own[:, -1:])[..., None], 0.0)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Pick the tokens `[B, I]` of every row, `[B, I, C]`."""
    return x.gather(1, index[..., None].expand(*index.shape, x.shape[2]))


def _check_inputs(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    if x.dim() != 3:
        raise ValueError(f"x: expected 3 dimensions [batch, tokens, channels], got {list(x.shape)}")
    if x.shape[1] < 1:
        raise ValueError("x: expected at least 1 token, got none; without tokens the tail stays as it is")
    if weight.dim() != 2 or weight.shape[0] != x.shape[2] or weight.shape[1] < 1:
        raise ValueError(
            f"weight: expected [channels, kernel] = [{x.shape[2]}, at least 1], got {list(weight.shape)}; "
            "of a torch.nn.Conv1d pass weight[:, 0]"
        )
    if bias is not None and tuple(bias.shape) != (x.shape[2],):
        raise ValueError(f"bias: expected one number per channel, [{x.shape[2]}], got {list(bias.shape)}")
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        check_dtype(name, tensor)
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected the device of x, {x.device}, got {tensor.device}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected 'silu' or None, got {activation!r}")


def _check_tail(name: str, tail: Tensor, x: Tensor, reach: int, first: str, size: int | None) -> None:
    if tail.dim() != 3 or tail.shape[1:] != (reach, x.shape[2]) or (size is not None and tail.shape[0] != size):
        raise ValueError(
            f"{name}: expected [{first if size is None else size}, {reach}, {x.shape[2]}] "
            f"({first}, kernel - 1, channels), got {list(tail.shape)}"
        )
    if tail.dtype != x.dtype or tail.device != x.device:
        raise ValueError(f"{name}: expected {x.dtype} on {x.device} like x, got {tail.dtype} on {tail.device}")
