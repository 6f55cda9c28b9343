"""Which token is to be predicted at which place.

Legend: B rows, T tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from swat_lm.model.loss import IGNORE

__all__ = ["next_tokens", "of_those_handed_on"]


def next_tokens(labels: Tensor, document_ids: Tensor | None = None) -> Tensor:
    """Labels `[B, T]` moved one place to the left; -100 at the end and where the next token begins another document."""
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    if document_ids is not None:
        ends = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (0, 1), value=True)
        targets = targets.masked_fill(ends.to(targets.device), IGNORE)
    return targets


def of_those_handed_on(targets: Tensor, count: int, has_divisor: bool) -> Tensor:
    """The targets `[B, count]` of the last tokens, where layers hand on no others.

    Raises:
        ValueError: others are targets too, and the sum is to be divided by a number (`has_divisor`) that counts them.
    """
    left = targets.shape[1] - count
    if not left:
        return targets
    if has_divisor and not torch.compiler.is_compiling() and bool((targets[:, :left] != IGNORE).any()):
        raise ValueError(
            f"labels: the layers hand on the last {count} tokens alone, and others are to be predicted; leave "
            f"num_items_in_batch out, or train with objective: last_tokens and objective_settings: {{count: {count}}}"
        )
    return targets[:, left:]
