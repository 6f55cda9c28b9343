"""Selected attention as one operator: thresholds of all prefixes, then attention over what they select.

Both are `torch.library` ops with backwards of their own, of time and memory linear in the rows.
Legend: B sequences, T rows, P items before them, K key/value heads, H query heads, D head size, W window, k selected, M
candidates from before.
"""

from typing import Any, NamedTuple, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor

from swat_lm.ops import selected_attention as dense
from swat_lm.ops.calls import schema
from swat_lm.ops.capped_simplex import NONE, prefix_thresholds
from swat_lm.ops.selected_attention import MASKINGS, Gradients
from swat_lm.ops.selected_tables import SelectedCall

BLOCK = 64
"""Rows that are processed as one dense product."""


def selected_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    kept_key: Tensor,
    kept_value: Tensor,
    *,
    window: int,
    segments: Tensor | None = None,
    first_visible: Tensor | None = None,
    hidden: Tensor | None = None,
    scale: float,
    score_function: str = "softmax",
    score_bias: float = 0.0,
    masking: str = "value",
    block: int = BLOCK,
    return_free: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend to a window and to the k candidates with the largest scores, weighed by the capped simplex.

    Row i sees items `i - W + 1 .. i` of its window, and of the candidates that have entered by row i, those before all
    rows among them, the k largest with the weight `p = clip(score - tau_i, 0, 1)`; tau_i is that of the M largest.

    Args:
        query: `[B, T, H, D]`.
        key, value: `[B, P + T, K, D]`, P at most W.
        scores: float64 `[B, K, M + T]`: of the candidates from before, falling, then of the item that enters with each
            row, which is the one W before it; `-inf` for none.
        kept_key, kept_value: `[B, K, k, D]`, of the first k candidates from before.
        segments: int64 `[B, T]`: rows of one document, 0 for that of the candidates from before; None: all are 0.
        first_visible: int32 `[B, T]`, the first item that a row may see; None: all.
        hidden: bool `[B, P + T]`, items that nobody sees.
        score_bias: added to products, for sigmoid.
        masking: "value" (p multiplies the value), "both" (and the key), "straight" (nothing; its gradient is kept).
        block: rows of a dense product; the result does not depend on it.
        return_free: also count.

    Returns:
        `[B, T, H, D]` in the query's dtype; and if asked for, int64 `[B, K, T]`, how many candidates have 0 < p < 1:
        those alone give scores a gradient.

    Raises:
        ValueError: a masking that does not exist, more items before the rows than the window has, fewer candidates than
            are selected.
    """
    if masking not in MASKINGS:
        raise ValueError(f"masking: expected one of {', '.join(MASKINGS)}; got {masking!r}")
    num_rows, num_kept = query.shape[1], kept_key.shape[2]
    most = scores.shape[-1] - num_rows
    if key.shape[1] - num_rows > window:
        raise ValueError(f"key: expected at most {window} items before the rows, got {key.shape[1] - num_rows}")
    if num_kept > most:
        raise ValueError(f"scores: expected at least {num_kept} candidates from before, got {most}")
    num_free = torch.zeros_like(scores[..., most:], dtype=torch.int64)
    if not num_rows:
        return (query, num_free) if return_free else query
    if num_kept:
        tau, num_free, full, free, chosen, held = torch.ops.swat_lm.capped_simplex_prefixes(
            scores, segments, most, num_kept, block
        )
    else:
        tau = scores.new_full(scores[..., most:].shape, NONE)
        full, free, chosen = (torch.zeros_like(scores, dtype=torch.int64) for _ in range(3))
        held = chosen.new_zeros(*scores.shape[:2], -(-num_rows // block), 0)
    call = SelectedCall(
        query, key, value, kept_key, kept_value, scores, tau, chosen, held, full, free, first_visible, hidden, window,
        block, float(scale), float(score_bias), score_function == "softmax", masking,
    )  # fmt: skip
    output = torch.ops.swat_lm.selected_attention(*call)
    return (output, num_free) if return_free else output


@torch.library.custom_op("swat_lm::capped_simplex_prefixes", mutates_args=())
def _prefixes(
    scores: Tensor, segments: Tensor | None, most: int, total: int, block: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    found = prefix_thresholds(scores[..., most:], scores[..., :most], segments, total, block)
    return tuple(x.contiguous() for x in found)  # type: ignore[return-value]


@_prefixes.register_fake
def _(scores, segments, most, total, block):
    rows = scores[..., most:]
    whole = {"dtype": torch.int64}
    blocks = -(-rows.shape[-1] // block)
    return (
        rows.new_empty(rows.shape), rows.new_empty(rows.shape, **whole),
        *(scores.new_empty(scores.shape, **whole) for _ in range(3)),
        scores.new_empty((*scores.shape[:2], blocks, total), **whole),
    )  # fmt: skip


def _save_prefixes(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, num_free, full, free, *others = output
    ctx.save_for_backward(num_free, full, free)
    ctx.most = inputs[2]
    ctx.mark_non_differentiable(num_free, full, free, *others)


def _prefixes_backward(ctx: Any, grad_tau: Tensor, *_: Tensor) -> tuple[Any, ...]:
    """Dtau_i / dscore_j = 1 / |F_i| in the rows in which j is free, which follow one another: differences of a sum."""
    num_free, full, free = ctx.saved_tensors
    shares = torch.where(num_free > 0, grad_tau / num_free.clamp(min=1), 0.0)
    before = F.pad(shares.cumsum(-1), (1, 0))
    entered = (torch.arange(full.shape[-1], device=full.device) - ctx.most).clamp(min=0)
    begin = entered + full
    return before.gather(-1, begin + free) - before.gather(-1, begin), None, None, None, None


_prefixes.register_autograd(_prefixes_backward, setup_context=_save_prefixes)


def _forward(*arguments: Any) -> Tensor:
    call = SelectedCall(*arguments)
    # products are written in place, in the dtype of scores
    with torch.autocast(call.query.device.type, enabled=False):
        return dense.forward(call)


def _backward(grad_output: Tensor, *arguments: Any) -> Gradients:
    # sums are added up in place; a backward pass may stand under autocast
    with torch.autocast(grad_output.device.type, enabled=False):
        return dense.backward(SelectedCall(*arguments), grad_output)


_op = torch.library.custom_op(
    "swat_lm::selected_attention", _forward, mutates_args=(), schema=schema(SelectedCall, num_results=1)
)
_op.register_fake(lambda query, *_: query.new_empty(query.shape))


class _Cotangent(NamedTuple):
    """What the backward op is given before the call."""

    grad_output: Tensor


def _fake_backward(grad_output: Tensor, *arguments: Any) -> Gradients:
    call = SelectedCall(*arguments)
    return Gradients(*(x.new_empty(x.shape) for x in (getattr(call, name) for name in Gradients._fields)))


_backward_op = torch.library.custom_op(
    "swat_lm::selected_attention_backward",
    _backward,
    mutates_args=(),
    schema=schema(_Cotangent, SelectedCall, num_results=len(Gradients._fields)),
)
_backward_op.register_fake(_fake_backward)

_TENSORS = tuple(name for name, kind in get_type_hints(SelectedCall).items() if kind in (Tensor, Tensor | None))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    call = SelectedCall(*inputs)
    ctx.save_for_backward(*(getattr(call, name) for name in _TENSORS))
    ctx.call = call._replace(**dict.fromkeys(_TENSORS))


def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    call = ctx.call._replace(**dict(zip(_TENSORS, ctx.saved_tensors, strict=True)))
    found = Gradients(*torch.ops.swat_lm.selected_attention_backward(grad_output, *call))
    return tuple(getattr(found, name, None) for name in call._fields)


_op.register_autograd(_gradients, setup_context=_save)
