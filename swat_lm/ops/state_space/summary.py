"""What a stretch of tokens does to a state that is not known yet: decays it, and adds to it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from swat_lm.ops.precision import sum_dtype
from swat_lm.ops.segments import check_rows, documents_of
from swat_lm.ops.state_space.checks import check_inputs


def state_space_summary(
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    step_size: Tensor,
    *,
    segments: Tensor | None = None,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum the recurrence of `state_space_scan` up: the final state is `decay * initial_state + added`.

    Who holds the state may then be asked once for it, and stretches on several processes join by a scan.

    Args:
        key, value, log_decay, step_size, segments, real: as in `state_space_scan`.

    Returns:
        `(decay [B, H, 1, 1], added [B, H, P, N])` in the precision of the state; both differentiable. The decay is
        exactly 0 where the last document begins within the stretch.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range; the message names it.
    """
    check_inputs(key, key, value, log_decay, step_size)
    check_rows(segments, real, value.shape[0], value.shape[1], value.device)
    documents, dtype = documents_of(segments, real), sum_dtype(value)
    with torch.autocast(value.device.type, enabled=False):
        logs, weights = log_decay.to(dtype), step_size.to(dtype)
        if real is not None:
            logs, weights = (x.masked_fill(~real[..., None], 0.0) for x in (logs, weights))
            key, value = (x.masked_fill(~real[..., None, None], 0.0) for x in (key, value))
        # sums from the end, so that what is left of a late token is not the difference of two large numbers
        left = logs.flip(1).cumsum(dim=1).flip(1)
        weights = weights * F.pad(left[:, 1:], (0, 0, 0, 1)).exp()
        decay = left[:, 0].exp()
        if documents is not None:
            weights = weights * (documents == documents[:, -1:])[..., None]
            decay = decay * (documents[:, -1:] == 0)
        entering = (value.to(dtype) * weights[..., None]).unflatten(2, (key.shape[2], -1))
        added = torch.einsum("btgrp,btgn->bgrpn", entering, key.to(dtype))
    return decay[..., None, None], added.flatten(1, 2)
