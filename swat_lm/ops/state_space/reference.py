"""The definition: the recurrence token by token as the equation says it, in plain PyTorch with autograd's gradients.

The chunked form is tested against this file. It is slow on purpose and has no options of its own.
"""

import torch
from torch import Tensor

from swat_lm.ops.precision import sum_dtype


def state_space_scan_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    step_size: Tensor,
    initial_state: Tensor | None,
    documents: Tensor | None,
    real: Tensor | None,
    skip: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `(output [B, T, H, P], final_state [B, H, P, N])`; arguments as in the contract.

    `documents` are those of `swat_lm.ops.segments.documents_of`. Mamba-2 (arXiv 2405.21060), Eq. 2 with the inputs
    scaled by the step size: S[t] = exp(log_decay[t]) S[t-1] + step_size[t] value[t] key[t]^T,  y[t] = S[t] query[t].
    """
    dtype = sum_dtype(value)
    batch, num_tokens, num_heads, head_dim = value.shape
    repeats = num_heads // key.shape[2]
    if real is not None:
        # a token that is not real decays nothing and brings nothing in
        query, key, value = (x.masked_fill(~real[..., None, None], 0.0) for x in (query, key, value))
        log_decay, step_size = (x.masked_fill(~real[..., None], 0.0) for x in (log_decay, step_size))
    queries, keys = (x.to(dtype).repeat_interleave(repeats, dim=2) for x in (query, key))
    values = value.to(dtype) * step_size.to(dtype)[..., None]
    decays = log_decay.to(dtype).exp()
    if initial_state is None:
        state = values.new_zeros(batch, num_heads, head_dim, key.shape[3])
    else:
        state = initial_state
    document = torch.zeros(batch, dtype=torch.int64, device=value.device)
    outputs = []
    for t in range(num_tokens):
        if documents is not None:
            state = state.where((documents[:, t] == document)[:, None, None, None], 0.0)
            document = documents[:, t]
        state = decays[:, t, :, None, None] * state + values[:, t, :, :, None] * keys[:, t, :, None, :]
        outputs.append((state @ queries[:, t, :, :, None]).squeeze(-1))
    output = torch.stack(outputs, dim=1)
    if skip is not None:
        output = output + skip.to(dtype)[:, None] * value.to(dtype)
    return output.to(value.dtype), state
