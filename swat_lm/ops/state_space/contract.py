"""The contract of the state space layer's scan: two public entries and their checks.

`state_space_scan` serves training and prefill, `state_space_step` decodes in place over a pool of states. Both are one
`torch.library` op each; that of the first is in `library.py`.
"""

import torch
from torch import Tensor

from swat_lm.ops.segments import check_rows, documents_of
from swat_lm.ops.state_space import library as _library  # noqa: F401  (registers the op)
from swat_lm.ops.state_space.checks import check_inputs, check_scan, check_step
from swat_lm.ops.state_space.reference import state_space_scan_reference
from swat_lm.ops.state_space.step import step


def state_space_scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    step_size: Tensor,
    *,
    initial_state: Tensor | None = None,
    segments: Tensor | None = None,
    real: Tensor | None = None,
    skip: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "chunked",
) -> tuple[Tensor, Tensor]:
    """Run the recurrence of Mamba-2 (state space duality, arXiv 2405.21060, Eq. 2) over T tokens.

    Every head keeps a state S, a matrix `[P, N]`, which decays by a number per token and takes in an outer product:

        S[t] = exp(log_decay[t]) * S[t-1]  +  step_size[t] * value[t] key[t]^T
        y[t] = S[t] query[t]

    In the paper's letters query is C, key is B, value is X, step_size is the step Delta and
    `log_decay = step_size * A` with A < 0. The names are those of the layer's dual form, attention
    without softmax whose weights decay (section 5 of the paper),

        y[t] = sum over s <= t of  exp(log_decay[s+1] + ... + log_decay[t]) (query[t] . key[s]) step_size[s] value[s]

    Softplus, gates, norms and the convolution before are the caller's.

    Args:
        query, key: `[B, T, G, N]`: N is the state size; head h reads group `h // (H / G)`, H is a multiple of G.
        value: `[B, T, H, P]`; float32, float64, bfloat16 or float16, query and key alike. T is at least 1.
        log_decay: `[B, T, H]`, at most 0 (the values are not checked), `-inf` forgets everything; any floating dtype.
        step_size: `[B, T, H]`, scales what enters; any floating dtype.
        initial_state: `[B, H, P, N]`, the state before the first token; zeros when None. float32, or float64 for
            float64 values, which is also the precision of all sums, under autocast too.
        segments: int32 or int64 `[B, T]`, the number of each token's document, non-decreasing. Segment 0 goes on from
            the initial state, a token with another number than the one before it begins from zero. Documents are apart:
            outputs are those of separate calls, gradients from one to another exactly 0.
        real: bool `[B, T]`. A token that is not real (padding on either side, a hole) is skipped: the state passes it
            unchanged, its output and its gradients are exactly 0, whatever it holds and whatever its segment is.
        skip: `[H]`, the weights of a connection past the state (D): `skip * value[t]` is added to y[t]; any floating
            dtype. None: there is none.
        chunk_size: tokens of a chunk. Time and memory are linear in T with any; the result is the same up to rounding.
        backend: "chunked" (products of matrices, a backward that keeps the inputs and one state per 8 chunks) or
            "reference" (token by token, the definition).

    Returns:
        `(output [B, T, H, P] in the value's dtype, final_state [B, H, P, N])`, both differentiable. The final state is
        that after the last real token, in its document, and the initial state of the next call.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range; the message names it.
    """
    check_inputs(query, key, value, log_decay, step_size)
    check_scan(value, key, initial_state, skip, chunk_size, backend)
    check_rows(segments, real, value.shape[0], value.shape[1], value.device)
    documents = documents_of(segments, real)
    if backend == "reference":
        with torch.autocast(value.device.type, enabled=False):
            return state_space_scan_reference(
                query, key, value, log_decay, step_size, initial_state, documents, real, skip
            )  # fmt: skip
    output, final_state, _ = torch.ops.swat_lm.state_space_scan(
        query, key, value, log_decay, step_size, initial_state, documents, real, skip, chunk_size
    )
    return output, final_state


def state_space_step(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, step_size: Tensor, state: Tensor, slot: Tensor
) -> Tensor:
    """Run the recurrence over one token per sequence, in place; inference only. Equal to `state_space_scan`.

    Args:
        query, key, value, log_decay, step_size: as in `state_space_scan`, of one token: T = 1.
        state: `[slots, H, P, N]`, float32 (float64 for float64 values); changed in place.
        slot: int64 `[B]`, the state that each sequence owns, all different (the values are not checked here).

    Returns:
        `[B, 1, H, P]` in the value's dtype.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range, or one that requires a gradient.
    """
    check_inputs(query, key, value, log_decay, step_size)
    check_step(value, key, state, slot)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value, log_decay, step_size, state)):
        raise ValueError("state_space_step is for inference: call it under torch.no_grad() or inference_mode()")
    # the op exists for torch.compile; called eagerly, its dispatch would cost as much as a small step
    run = torch.ops.swat_lm.state_space_step if torch.compiler.is_compiling() else _step_in_place
    return run(query, key, value, log_decay, step_size, state, slot)


def _step_in_place(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, step_size: Tensor, state: Tensor, slot: Tensor
) -> Tensor:
    with torch.autocast(value.device.type, enabled=False):
        return step(query, key, value, log_decay, step_size, state, slot)


_state_space_step = torch.library.custom_op("swat_lm::state_space_step", _step_in_place, mutates_args=("state",))


@_state_space_step.register_fake
def _(query, key, value, log_decay, step_size, state, slot):
    return value.new_empty(value.shape)
