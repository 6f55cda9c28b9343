"""Which tokens of a row a recurrence runs through, and where it begins anew: for scans and short convolutions.

Attention has `visibility.py`. A recurrence sees its whole past, so it needs no more than the document of each token and
which tokens it skips.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def check_rows(segments: Tensor | None, real: Tensor | None, batch: int, num_tokens: int, device: torch.device) -> None:
    """Refuse segments and marks of real tokens of the wrong shape, dtype or device; values are not looked at.

    Raises:
        ValueError: the message names the argument, what was expected and what came.
    """
    for name, tensor in (("segments", segments), ("real", real)):
        if tensor is None:
            continue
        if tuple(tensor.shape) != (batch, num_tokens):
            raise ValueError(f"{name}: expected [batch, tokens] = {[batch, num_tokens]}, got {list(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"{name}: expected the device {device} of the other tensors, got {tensor.device}")
    if segments is not None and segments.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"segments: expected int32 or int64 numbers of documents, got {segments.dtype}")
    if real is not None and real.dtype != torch.bool:
        raise ValueError(f"real: expected bool (False: the token is skipped), got {real.dtype}; pass `mask != 0`")


def documents_of(segments: Tensor | None, real: Tensor | None) -> Tensor | None:
    """Number the documents of each row, int64 `[B, T]`: 0 is the past's, and every new document is one more.

    A document begins where the segment of a real token differs from that of the real token before it; before the first
    there is segment 0. A token that is not real belongs to the document it stands in, whatever its segment says: a row
    is numbered like the row without such tokens.

        segments  0 0 7 7 9      0 0 4 4 4      2 2 2
        real      1 1 1 1 1      1 0 0 1 1      1 1 1
        document  0 0 1 1 2      0 0 0 1 1      1 1 1
    """
    if segments is None:
        return None
    if real is not None:
        latest = torch.where(real, torch.arange(segments.shape[1], device=segments.device), -1).cummax(dim=1).values
        segments = segments.gather(1, latest.clamp_min(0)).where(latest >= 0, 0)
    return (segments != F.pad(segments[:, :-1], (1, 0))).cumsum(dim=1)
