"""Keys that nobody sees though they stand between others, for any backend: a hole in a mask.

The operator knows two integers per row, which cannot say so. One more channel can: the query holds 1 there and a
hidden key a number that makes its score so low that its weight is exactly 0, under sigmoid and softmax alike. Where
scores are capped no score is so low: there `window_attention` takes `hidden` itself.
"""

import torch
from torch import Tensor

# a head size that kernels take; one channel would do
EXTRA_CHANNELS = 8
# e to these is 0 in every precision; the lower one outweighs any slope, and float16 does not hold it
LOWEST_SCORE, LOWEST_IN_FLOAT16 = -1e9, -2e4


def hide_keys(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Make the hidden keys invisible; rows that see only hidden keys give 0.

    Args:
        query: `[B, T, H, D]`, rotated already.
        key, value: `[B, S, K, D]`.
        hidden: bool `[B, S]`.
        scale: what scores are multiplied with; hand the same one to the operator.

    Returns:
        query, key and value with `EXTRA_CHANNELS` more; the output's additional channels are 0.
    """
    lowest = LOWEST_IN_FLOAT16 if key.dtype == torch.float16 else LOWEST_SCORE
    score = key.new_full((EXTRA_CHANNELS,), lowest / scale / EXTRA_CHANNELS)
    ones = query.new_ones(()).expand(*query.shape[:-1], EXTRA_CHANNELS)
    lowered = torch.where(hidden[:, :, None, None], score, 0.0).expand(*key.shape[:-1], EXTRA_CHANNELS)
    nothing = value.new_zeros(()).expand(*value.shape[:-1], EXTRA_CHANNELS)
    # a softmax over hidden keys alone has weights all the same: of zeros
    visible = value.masked_fill(hidden[:, :, None, None], 0.0)
    return (
        torch.cat((query, ones), dim=-1),
        torch.cat((key, lowered.to(key.dtype)), dim=-1),
        torch.cat((visible, nothing), dim=-1),
    )
