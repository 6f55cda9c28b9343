"""The contract of windowed attention: two public entries, their checks, and the dispatch to a backend.

`window_attention` serves training and prefill, `window_attention_step` decodes in place over rings. Both are one
`torch.library` op each (positional tensors, a fixed number of outputs), so `torch.compile` sees a single node; that of
the first is in `library.py`.
"""

from typing import Any

import torch
from torch import Tensor

from swat_lm.ops import library as _library  # noqa: F401  (registers the op)
from swat_lm.ops import ring
from swat_lm.ops.calls import AttentionCall, StepCall, schema
from swat_lm.ops.checks import (
    check_choices,
    check_hidden,
    check_inputs,
    check_relative_bias,
    check_rings,
    check_rotary,
    check_softcap,
    check_visibility,
    checked_window,
)
from swat_lm.ops.dispatch import choose_backend
from swat_lm.ops.head_bias import score_dtype
from swat_lm.ops.reference import window_attention_reference
from swat_lm.ops.rotary import apply_rotary


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int | None,
    score_function: str = "sigmoid",
    slopes: Tensor | None = None,
    score_bias: float | Tensor = 0.0,
    scale: float | None = None,
    first_visible: Tensor | None = None,
    last_visible: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    softcap: float | None = None,
    hidden: Tensor | None = None,
    relative_bias: Tensor | None = None,
    precision: str = "auto",
    skip_saturated: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend over a causal sliding window (SWAT, arXiv 2502.18845, Eq. 5).

    Row t of a sequence sees the keys `max(first, last - window + 1) .. last` and nothing else:

        z[t, j]  = scale * query[t] . key[j]  +  slope * (last[t] - j)  +  score_bias
        out[t]   = sum_j f(z[t, j]) * value[j]          f = sigmoid, or softmax over the visible keys

    With T = S = 5 and window = 3, the keys seen (1) and their distances are:

        1 0 0 0 0        0 . . . .
        1 1 0 0 0        1 0 . . .
        1 1 1 0 0        2 1 0 . .
        0 1 1 1 0        . 2 1 0 .
        0 0 1 1 1        . . 2 1 0

    With T = 2 queries over S = 5 keys the queries are the last two rows of this picture. The window counts the query's
    own key: flash-attn's `window_size=(window - 1, 0)`, Hugging Face's `sliding_window=window`.

    Args:
        query: `[B, T, H, D]`, already rotated unless `rotary` is given; float32, float64, bfloat16 or float16.
        key, value: `[B, S, K, D]`; H is a multiple of K (query head h reads key/value head `h // (H / K)`).
        window: keys a row may see, itself included, at least 1; None is full causal attention.
        score_function: "sigmoid" (weights are independent and do not sum to 1) or "softmax".
        slopes: `[H]`, added as `slope * distance`; negative favours recent keys, positive old ones. None is no bias.
            Gets a gradient when it requires one.
        score_bias: a number or `[H]`, added to every score; `-log(window)` keeps sigmoid sums near 1 at the start.
            A tensor gets a gradient when it requires one.
        scale: of the product; `D ** -0.5` when None.
        first_visible, last_visible: int32 `[B, T]`, indices into the keys, non-decreasing in t (the values are not
            checked here); defaults 0 and `S - T + t`. `first > last`: the row sees nothing, its output and all its
            gradients are exactly 0. `swat_lm.ops.visibility` makes them from masks, documents and lengths.
        rotary: cosine and sine `[B, T, D/2]` or `[T, D/2]` of `swat_lm.ops.rotary.rotary_angles`: query and key are
            rotated as `apply_rotary` does, and gradients are those of the unrotated. Queries and keys must be the same
            tokens (T = S, no `last_visible`); the angles get no gradient.
        softcap: c caps products softly: `c * tanh(scale * query . key / c)` stands in the place of the product, before
            slope and bias are added (Gemma 2, arXiv 2408.00118). The triton backend does not have it.
        hidden: bool `[B, S]`, keys that nobody sees, wherever they stand; distances stay. The triton backend does not
            have it; `swat_lm.ops.hiding.hide_keys` does the same for every backend, where nothing is capped.
        relative_bias: `[H, window]`, added to the score by distance, as T5 has it (`swat_lm.ops.relative_position`).
            Gets a gradient when it requires one. The triton backend does not have it.
        precision: "exact"; "fast" permits the hardware's approximate tanh for bfloat16 and float16 inputs; "auto"
            leaves the choice to the backend. float32 and float64 are always exact.
        skip_saturated: sigmoid only: permit the triton backend to take weights as 0 or 1 where a head's slope makes
            them so to within 4.2e-8 whatever the product is (docs/kernels.md); an output's absolute error is at most
            4.2e-8 times the sum of |value| over the keys treated so. The other backends compute every weight.
        return_lse: softmax only: also return the logarithm of the sum of exponentials, float32 (float64 for float64)
            `[B, T, H]`, differentiable, `-inf` where a row sees nothing; it joins attention over disjoint key sets.
        backend: "reference" (the equation, O(T * S)), "blocked" (PyTorch, O(T * window)), "triton" (kernels for NVIDIA
            GPUs; on a CPU under Triton's interpreter only), or "auto".

    Returns:
        `[B, T, H, D]` in the query's dtype; with `return_lse`, the pair `(output, lse)`.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range; the message names it.
    """
    window = checked_window(window)
    check_choices(score_function, precision, backend)
    query, key, value = _under_autocast(query, key, value)
    check_inputs(query, key, value, slopes, score_bias, precision)
    check_visibility(query, key, first_visible, last_visible)
    check_softcap(softcap)
    check_hidden(key, hidden)
    check_relative_bias(query, relative_bias, window)
    if return_lse and score_function != "softmax":
        raise ValueError("return_lse: only softmax has a normaliser; sigmoid parts over disjoint keys simply add")
    if skip_saturated and score_function != "sigmoid":
        raise ValueError("skip_saturated: only sigmoid weights saturate one by one; softmax weights share their sum")
    check_rotary(query, key, last_visible, rotary)
    factor = float(query.shape[-1]) ** -0.5 if scale is None else float(scale)
    lacks = {"softcap": softcap, "hidden": hidden, "relative_bias": relative_bias}
    backend = choose_backend(backend, query, next((name for name, given in lacks.items() if given is not None), None))
    cos = sin = None
    if rotary is not None and backend == "triton":
        # one row of angles serves all sequences
        cos, sin = (x.contiguous().view(-1, *x.shape[-2:]) for x in rotary)
    elif rotary is not None:
        query, key = apply_rotary(query, *rotary), apply_rotary(key, *rotary)

    if backend == "reference":
        output, lse = window_attention_reference(
            query, key, value, slopes, score_bias, first_visible, last_visible, window, score_function, factor,
            softcap, hidden, relative_bias,
        )  # fmt: skip
    else:
        call = AttentionCall(
            query, key, value, window, score_function, factor, slopes, *_tensor_and_number(score_bias), first_visible,
            last_visible, cos, sin, precision, backend, skip_saturated, None if softcap is None else float(softcap),
            hidden, relative_bias,
        )  # fmt: skip
        output, lse, *_ = torch.ops.swat_lm.window_attention(*call)
    if return_lse:
        assert lse is not None
        return output, lse
    return output


def window_attention_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_ring: Tensor,
    value_ring: Tensor,
    slot: Tensor,
    position: Tensor,
    *,
    score_function: str = "sigmoid",
    slopes: Tensor | None = None,
    score_bias: float | Tensor = 0.0,
    scale: float | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    softcap: float | None = None,
    relative_bias: Tensor | None = None,
    precision: str = "auto",
    return_lse: bool = False,
    batch_invariant: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Decode one token per sequence in place over rings of keys and values; inference only.

    Sequence b owns the ring `slot[b]`. Its new key and value are written at place `position % window`, then the query
    attends over the ring, where place i holds the key at distance `(position - i) mod window` and
    `min(position + 1, window)` places are valid. Equal to `window_attention` over the whole stream.

        window = 4, position = 5:   place      0 1 2 3
                                    holds      4 5 2 3      (positions)
                                    distance   1 0 3 2

    Args:
        query: `[B, 1, H, D]`, rotated unless `rotary` is given.
        key, value: `[B, 1, K, D]`, the new token's; the key rotated unless `rotary` is given.
        key_ring, value_ring: `[slots, window, K, D]`; changed in place.
        slot: int64 `[B]`, all different (the values are not checked here).
        position: int64 `[B]`, the new token's place in its stream, from 0.
        rotary: cosine and sine of the new tokens' angles, `[B, 1, D/2]`, or `[1, D/2]` for all: rotate query and key
            before anything else, in the same kernel where there is one.
        relative_bias: `[H, window]` at least, as in `window_attention`.
        precision: as in `window_attention`; kernels are exact with every one, since a step waits for memory.
        batch_invariant: give a sequence bit for bit the same whatever the others of a batch of this size hold, and
            wherever they stand; on a CPU that takes one sequence at a time.
        score_function, slopes, score_bias, scale, softcap, return_lse, backend: as in `window_attention`.

    Returns:
        `[B, 1, H, D]` in the query's dtype; with `return_lse`, also the lse `[B, 1, H]`.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range, or one that requires a gradient.
    """
    check_choices(score_function, precision, backend)
    check_inputs(query, key, value, slopes, score_bias, precision)
    check_rings(query, key, key_ring, value_ring, slot, position)
    check_softcap(softcap)
    check_relative_bias(query, relative_bias, key_ring.shape[1])
    if return_lse and score_function != "softmax":
        raise ValueError("return_lse: only softmax has a normaliser; sigmoid parts over disjoint keys simply add")
    check_rotary(query, key, None, rotary)
    tensors = [t for t in (query, key, value, slopes, score_bias, relative_bias) if isinstance(t, Tensor)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise ValueError("window_attention_step is for inference: call it under torch.no_grad() or inference_mode()")
    factor = float(query.shape[-1]) ** -0.5 if scale is None else float(scale)
    lacks = "softcap" if softcap is not None else None if relative_bias is None else "relative_bias"
    backend = choose_backend(backend, query, lacks)
    cos = sin = None
    if rotary is not None and backend == "triton":
        cos, sin = (x.reshape(-1, 1, x.shape[-1]).expand(query.shape[0], -1, -1) for x in rotary)
    elif rotary is not None:
        query, key = apply_rotary(query, *rotary), apply_rotary(key, *rotary)
    if backend == "reference":
        output, lse = ring.step_reference(
            query, key, value, key_ring, value_ring, slot, position, slopes, score_bias, score_function, factor,
            softcap, relative_bias,
        )  # fmt: skip
        return (output, lse) if return_lse and lse is not None else output
    call = StepCall(
        query, key, value, key_ring, value_ring, slot, position, score_function, factor, slopes,
        *_tensor_and_number(score_bias), cos, sin, backend, None if softcap is None else float(softcap),
        batch_invariant, relative_bias,
    )  # fmt: skip
    # the op exists for torch.compile; called eagerly, its dispatch would cost as much as a small step
    if torch.compiler.is_compiling():
        output, lse = torch.ops.swat_lm.window_attention_step(*call)
    else:
        output, lse = _step(call)
    return (output, lse) if return_lse else output


def _step(call: StepCall) -> tuple[Tensor, Tensor]:
    if call.backend == "triton":
        # not above: `import swat_lm` must work without triton
        from swat_lm.ops.triton import decode

        return decode.step(call)
    return ring.step(call)


def _fake_step(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = StepCall(*arguments)
    query, shape = call.query, call.query.shape[:3] if call.softmax else (0,)
    return query.new_empty(query.shape), query.new_empty(shape, dtype=score_dtype(query))


_step_op = torch.library.custom_op(
    "swat_lm::window_attention_step",
    lambda *arguments: _step(StepCall(*arguments)),
    mutates_args=("key_ring", "value_ring"),
    schema=schema(StepCall, num_results=2, mutates=("key_ring", "value_ring")),
)
_step_op.register_fake(_fake_step)


def _tensor_and_number(score_bias: float | Tensor) -> tuple[Tensor | None, float]:
    return (score_bias, 0.0) if isinstance(score_bias, Tensor) else (None, float(score_bias))


def _under_autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    device_type = query.device.type
    if not torch.is_autocast_enabled(device_type):
        return query, key, value
    dtype = torch.get_autocast_dtype(device_type)
    return query.to(dtype), key.to(dtype), value.to(dtype)
