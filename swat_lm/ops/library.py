"""`window_attention` as `torch.library` sees it: one op, its backward as a second, their fake kernels and autograd.

The wrapper in `window_attention.py` has checked everything; here a call goes to a backend, `blocked` or `triton`. An op
has a fixed number of outputs: what a call does not have is empty.
"""

import torch
from torch import Tensor

from swat_lm.ops import blocked
from swat_lm.ops.head_bias import head_bias


@torch.library.custom_op("swat_lm::window_attention", mutates_args=())
def _window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor | None,
    score_bias: Tensor | None,
    first_visible: Tensor | None,
    last_visible: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    bias: float,
    window: int | None,
    score_function: str,
    scale: float,
    precision: str,
    backend: str,
    skip_saturated: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    head = head_bias(slopes, score_bias, bias, query)
    if backend == "triton":
        # not above: `import swat_lm` must work without triton
        from swat_lm.ops.triton import forward, geometry
        from swat_lm.ops.triton import precision as precisions

        rows = geometry.Rows.of(
            first_visible, last_visible, query.shape[0], query.shape[1], key.shape[1], window, query.device
        )
        fast = precisions.is_fast(precision, query.dtype, score_bias, bias)
        results = forward.forward(query, key, value, head, rows, score_function, scale, fast, cos, sin, skip_saturated)
        return results.output, results.lse, results.rotated_query, results.rotated_key
    nothing = query.new_empty(0), query.new_empty(0)
    return *blocked.forward(
        query, key, value, head, first_visible, last_visible, window, score_function, scale
    ), *nothing  # fmt: skip


@_window_attention.register_fake
def _(
    query, key, value, slopes, score_bias, first_visible, last_visible, cos, sin, bias, window, score_function, scale,
    precision, backend, skip_saturated,
):  # fmt: skip
    batch, num_queries, num_heads, _ = query.shape
    statistics = torch.float64 if query.dtype == torch.float64 else torch.float32
    shape = (batch, num_queries, num_heads) if score_function == "softmax" else (0,)
    return (
        query.new_empty(query.shape),
        query.new_empty(shape, dtype=statistics),
        query.new_empty(0 if cos is None else query.shape),
        query.new_empty(0 if cos is None else key.shape),
    )


@torch.library.custom_op("swat_lm::window_attention_backward", mutates_args=())
def _window_attention_backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor | None,
    score_bias: Tensor | None,
    first_visible: Tensor | None,
    last_visible: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    output: Tensor | None,
    lse: Tensor | None,
    bias: float,
    window: int | None,
    score_function: str,
    scale: float,
    precision: str,
    backend: str,
    skip_saturated: bool,
    needs_slopes: bool,
    needs_score_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    head = head_bias(slopes, score_bias, bias, query)
    needs_per_head = needs_slopes or needs_score_bias
    if backend == "triton":
        from swat_lm.ops.triton import backward, geometry
        from swat_lm.ops.triton import precision as precisions

        rows = geometry.Rows.of(
            first_visible, last_visible, query.shape[0], query.shape[1], key.shape[1], window, query.device
        )
        fast = precisions.is_fast(precision, query.dtype, score_bias, bias)
        grad_query, grad_key, grad_value, grad_head = backward.backward(
            grad_output, grad_lse, query, key, value, output, lse, head, rows, score_function, scale, fast,
            needs_per_head, cos, sin, skip_saturated,
        )  # fmt: skip
    else:
        grad_query, grad_key, grad_value, grad_head = blocked.backward(
            grad_output, grad_lse, query, key, value, head, first_visible, last_visible, window, score_function, scale,
            needs_per_head,
        )  # fmt: skip
    grad_slopes = grad_head.slopes.to(slopes.dtype) if slopes is not None and needs_slopes else query.new_empty(0)
    grad_bias = query.new_empty(0)
    if score_bias is not None and needs_score_bias:
        grad_bias = grad_head.constant.to(score_bias.dtype)
    return grad_query, grad_key, grad_value, grad_slopes, grad_bias


@_window_attention_backward.register_fake
def _(
    grad_output, grad_lse, query, key, value, slopes, score_bias, first_visible, last_visible, cos, sin, output, lse,
    bias, window, score_function, scale, precision, backend, skip_saturated,
    needs_slopes, needs_score_bias,
):  # fmt: skip
    return (
        query.new_empty(query.shape),
        key.new_empty(key.shape),
        value.new_empty(value.shape),
        torch.empty_like(slopes) if needs_slopes else query.new_empty(0),
        torch.empty_like(score_bias) if needs_score_bias else query.new_empty(0),
    )


def _setup_context(ctx, inputs, output):
    query, key, value, slopes, score_bias, first_visible, last_visible, cos, sin, *numbers = inputs
    attended, lse, rotated_query, rotated_key = output
    if cos is not None:
        query, key = rotated_query, rotated_key
    if numbers[2] != "softmax" or numbers[5] != "triton":
        # sigmoid needs neither, blocked recomputes them
        attended, lse = None, None
    ctx.save_for_backward(
        query, key, value, slopes, score_bias, first_visible, last_visible, cos, sin, attended, lse
    )  # fmt: skip
    ctx.numbers = numbers
    # outputs that stand for nothing have no gradient
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_output, grad_lse, grad_rotated_query, grad_rotated_key):
    saved = ctx.saved_tensors
    query, _, _, slopes, score_bias, *_ = saved
    if grad_output is None and grad_lse is None:
        return (None,) * 16
    if grad_output is None:
        grad_output = torch.zeros_like(query)
    if ctx.numbers[2] != "softmax":
        grad_lse = None
    needs_slopes = slopes is not None and ctx.needs_input_grad[3]
    needs_bias = score_bias is not None and ctx.needs_input_grad[4]
    grads = torch.ops.swat_lm.window_attention_backward(
        grad_output, grad_lse, *saved, *ctx.numbers, needs_slopes, needs_bias
    )
    return (*grads[:3], grads[3] if needs_slopes else None, grads[4] if needs_bias else None, *(None,) * 11)


_window_attention.register_autograd(_backward, setup_context=_setup_context)
