"""`state_space_scan` as `torch.library` sees it: one op, its backward as a second, their fake kernels and autograd.

The wrapper in `contract.py` has checked everything; here a call goes to the chunked form.
"""

import torch
from torch import Tensor

from swat_lm.ops.precision import sum_dtype
from swat_lm.ops.state_space import chunked
from swat_lm.ops.state_space.spans import Scan, count_spans


@torch.library.custom_op("swat_lm::state_space_scan", mutates_args=())
def _state_space_scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    step_size: Tensor,
    initial_state: Tensor | None,
    documents: Tensor | None,
    real: Tensor | None,
    skip: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    # a recurrence is summed in the state's precision, also where the products around it are autocast
    with torch.autocast(value.device.type, enabled=False):
        return chunked.forward(
            Scan(query, key, value, log_decay, step_size, documents, real, skip), initial_state, chunk_size
        )


@_state_space_scan.register_fake
def _(query, key, value, log_decay, step_size, initial_state, documents, real, skip, chunk_size):
    batch, num_tokens, num_heads, head_dim = value.shape
    state = value.new_empty((batch, num_heads, head_dim, key.shape[3]), dtype=sum_dtype(value))
    return value.new_empty(value.shape), state, state.new_empty((count_spans(num_tokens, chunk_size), *state.shape))


@torch.library.custom_op("swat_lm::state_space_scan_backward", mutates_args=())
def _state_space_scan_backward(
    grad_output: Tensor,
    grad_final_state: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    step_size: Tensor,
    documents: Tensor | None,
    real: Tensor | None,
    skip: Tensor | None,
    span_states: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(value.device.type, enabled=False):
        return chunked.backward(
            grad_output,
            grad_final_state,
            Scan(query, key, value, log_decay, step_size, documents, real, skip),
            span_states,
            chunk_size,
        )


@_state_space_scan_backward.register_fake
def _(
    grad_output, grad_final_state, query, key, value, log_decay, step_size, documents, real, skip, span_states,
    chunk_size,
):  # fmt: skip
    inputs = (query, key, value, log_decay, step_size)
    d_skip = (span_states if skip is None else skip).new_empty(value.shape[2:3])
    return *(x.new_empty(x.shape) for x in inputs), span_states.new_empty(span_states.shape[1:]), d_skip


def _setup_context(ctx, inputs, output):
    query, key, value, log_decay, step_size, initial_state, documents, real, skip, chunk_size = inputs
    ctx.save_for_backward(query, key, value, log_decay, step_size, documents, real, skip, output[2])
    ctx.chunk_size, ctx.has_initial_state, ctx.has_skip = chunk_size, initial_state is not None, skip is not None
    # the states before the spans are for the backward alone
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_output, grad_final_state, _):
    # asked for once: activation checkpointing recomputes them, and refuses to do so twice
    saved = ctx.saved_tensors
    gradients: dict[str, Tensor] = {}
    if grad_output is not None or grad_final_state is not None:
        if grad_output is None:
            grad_output = torch.zeros_like(Scan(*saved[:-1]).value)
        found = torch.ops.swat_lm.state_space_scan_backward(grad_output, grad_final_state, *saved, ctx.chunk_size)
        gradients = dict(zip(_DIFFERENTIABLE, found, strict=True))
    if not ctx.has_initial_state:
        gradients.pop("initial_state", None)
    if not ctx.has_skip:
        gradients.pop("skip", None)
    return tuple(gradients.get(argument.name) for argument in _state_space_scan._opoverload._schema.arguments)


# of which the backward returns gradients, in its order
_DIFFERENTIABLE = ("query", "key", "value", "log_decay", "step_size", "initial_state", "skip")
_state_space_scan.register_autograd(_backward, setup_context=_setup_context)
