"""`window_attention` as `torch.library` sees it: one op, its backward as a second, their fake kernels and autograd.

The wrapper in `window_attention.py` has checked everything; here a call goes to a backend, `blocked` or `triton`. An op
has a fixed number of outputs: what a call does not have is empty.
"""

from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from swat_lm.ops import blocked
from swat_lm.ops.calls import Attended, AttentionCall, schema
from swat_lm.ops.head_bias import score_dtype


class Cotangents(NamedTuple):
    """What the backward op is given before the call."""

    grad_output: Tensor
    grad_lse: Tensor | None
    output: Tensor | None
    lse: Tensor | None
    needs_slopes: bool
    needs_score_bias: bool
    needs_relative_bias: bool


class Gradients(NamedTuple):
    """What the backward op returns, by the names of the call's arguments."""

    query: Tensor
    key: Tensor
    value: Tensor
    slopes: Tensor
    score_bias: Tensor
    relative_bias: Tensor


def _window_attention(*arguments: Any) -> Attended:
    call = AttentionCall(*arguments)
    if call.backend == "triton":
        # not above: `import swat_lm` must work without triton
        from swat_lm.ops.triton import forward

        return forward.forward(call)
    return Attended(*blocked.forward(call), call.query.new_empty(0), call.query.new_empty(0))


def _window_attention_backward(*arguments: Any) -> Gradients:
    given, call = _split(arguments)
    needs_per_head = given.needs_slopes or given.needs_score_bias or given.needs_relative_bias
    if call.backend == "triton":
        from swat_lm.ops.triton import backward

        *gradients, per_head = backward.backward(
            call, given.grad_output, given.grad_lse, given.output, given.lse, needs_per_head
        )
    else:
        *gradients, per_head = blocked.backward(call, given.grad_output, given.grad_lse, needs_per_head)
    # three of them: outputs of an op may not be one tensor
    slopes, bias, relative = (call.query.new_empty(0) for _ in range(3))
    if call.slopes is not None and given.needs_slopes:
        slopes = per_head.slopes.to(call.slopes.dtype)
    if call.score_bias is not None and given.needs_score_bias:
        bias = per_head.constant.to(call.score_bias.dtype)
    if call.relative_bias is not None and given.needs_relative_bias:
        assert per_head.relative is not None
        relative = per_head.relative.to(call.relative_bias.dtype)
    query, key, value = gradients
    return Gradients(query, key, value, slopes, bias, relative)


def _fake(*arguments: Any) -> Attended:
    call = AttentionCall(*arguments)
    query, rotates = call.query, call.cos is not None
    return Attended(
        query.new_empty(query.shape),
        query.new_empty(query.shape[:3] if call.softmax else (0,), dtype=score_dtype(query)),
        query.new_empty(query.shape if rotates else 0),
        query.new_empty(call.key.shape if rotates else 0),
    )


def _fake_backward(*arguments: Any) -> Gradients:
    given, call = _split(arguments)
    query, key, value = (tensor.new_empty(tensor.shape) for tensor in call[:3])
    slopes, bias, relative = (query.new_empty(0) for _ in range(3))
    if call.slopes is not None and given.needs_slopes:
        slopes = torch.empty_like(call.slopes)
    if call.score_bias is not None and given.needs_score_bias:
        bias = torch.empty_like(call.score_bias)
    if call.relative_bias is not None and given.needs_relative_bias:
        relative = torch.empty_like(call.relative_bias)
    return Gradients(query, key, value, slopes, bias, relative)


def _split(arguments: tuple[Any, ...]) -> tuple[Cotangents, AttentionCall]:
    count = len(Cotangents._fields)
    return Cotangents(*arguments[:count]), AttentionCall(*arguments[count:])


PER_HEAD = ("slopes", "score_bias", "relative_bias")
_TENSORS = tuple(name for name, kind in get_type_hints(AttentionCall).items() if kind in (Tensor, Tensor | None))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call, attended = AttentionCall(*inputs), Attended(*output)
    if call.cos is not None:
        call = call._replace(query=attended.rotated_query, key=attended.rotated_key)
    # sigmoid needs neither, blocked recomputes them
    results = (attended.output, attended.lse) if call.softmax and call.backend == "triton" else (None, None)
    ctx.save_for_backward(*(getattr(call, name) for name in _TENSORS), *results)
    ctx.call = call._replace(**dict.fromkeys(_TENSORS))
    # outputs that stand for nothing have no gradient
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    # asked for once: activation checkpointing recomputes them, and refuses to do so twice
    *tensors, output, lse = ctx.saved_tensors
    call = ctx.call._replace(**dict(zip(_TENSORS, tensors, strict=True)))
    gradients: dict[str, Tensor] = {}
    if grad_output is not None or grad_lse is not None:
        needed = dict(zip(call._fields, ctx.needs_input_grad, strict=True))
        needs = {name: getattr(call, name) is not None and needed[name] for name in PER_HEAD}
        given = Cotangents(
            torch.zeros_like(call.query) if grad_output is None else grad_output,
            grad_lse if call.softmax else None,
            output,
            lse,
            *needs.values(),
        )
        found = torch.ops.swat_lm.window_attention_backward(*given, *call)
        gradients = {
            name: gradient for name, gradient in zip(Gradients._fields, found, strict=True) if needs.get(name, True)
        }
    return tuple(gradients.get(name) for name in call._fields)


_op = torch.library.custom_op(
    "swat_lm::window_attention",
    _window_attention,
    mutates_args=(),
    schema=schema(AttentionCall, num_results=len(Attended._fields)),
)
_op.register_fake(_fake)
_op.register_autograd(_backward, setup_context=_setup_context)
_backward_op = torch.library.custom_op(
    "swat_lm::window_attention_backward",
    _window_attention_backward,
    mutates_args=(),
    schema=schema(Cotangents, AttentionCall, num_results=len(Gradients._fields)),
)
_backward_op.register_fake(_fake_backward)
