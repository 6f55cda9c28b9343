"""The definition: windowed attention as the equation says it, O(T * S), in plain PyTorch with autograd's gradients.

Every other backend is tested against this file. It is slow on purpose and has no options of its own.
"""

import torch
from torch import Tensor


def window_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor | None,
    score_bias: Tensor | float,
    first_visible: Tensor | None,
    last_visible: Tensor | None,
    window: int | None,
    score_function: str,
    scale: float,
    softcap: float | None = None,
    hidden: Tensor | None = None,
    relative_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return `(output [B, T, H, D], lse [B, T, H] or None)`; arguments as in `swat_lm.ops.window_attention`.

    SWAT (arXiv 2502.18845), Eq. 5: o[t] = sum_j sigmoid(scale * q[t].k[j] + slope * distance + bias) * v[j].
    """
    batch, num_queries, num_heads, head_dim = query.shape
    num_keys, num_kv_heads = key.shape[1], key.shape[2]
    statistics = torch.float64 if query.dtype == torch.float64 else torch.float32

    dtype = query.dtype
    query, key, value = (tensor.to(statistics) for tensor in (query, key, value))
    distance, visible = distances(batch, num_queries, num_keys, first_visible, last_visible, window, query.device)
    grouped = query.reshape(batch, num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = torch.einsum("btkgd,bskd->bkgts", grouped, key) * scale
    scores = scores.reshape(batch, num_heads, num_queries, num_keys)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        scores = scores + slopes.to(statistics)[:, None, None] * distance.to(statistics)[:, None]
    if relative_bias is not None:
        scores = scores + relative_bias.to(statistics)[:, distance.clamp(0, relative_bias.shape[1] - 1)].transpose(0, 1)
    if isinstance(score_bias, Tensor):
        score_bias = score_bias.to(statistics)[:, None, None]
    scores = scores + score_bias

    if hidden is not None:
        visible = visible & ~hidden[:, None]
    visible = visible[:, None]
    lse = None
    if score_function == "sigmoid":
        weights = torch.sigmoid(scores)
    else:
        seen = visible.any(dim=-1, keepdim=True)
        # a row that sees nothing keeps finite scores, so that neither it nor its gradient is NaN
        scores = scores.masked_fill(~visible & seen, float("-inf"))
        weights = torch.softmax(scores, dim=-1)
        lse = torch.logsumexp(scores, dim=-1).masked_fill(~seen.squeeze(-1), float("-inf")).transpose(1, 2)
    weights = weights.masked_fill(~visible, 0.0)
    weights = weights.reshape(batch, num_kv_heads, num_heads // num_kv_heads, num_queries, num_keys)
    output = torch.einsum("bkgts,bskd->btkgd", weights, value)
    return output.reshape(batch, num_queries, num_heads, head_dim).to(dtype), lse


def distances(
    batch: int,
    num_queries: int,
    num_keys: int,
    first_visible: Tensor | None,
    last_visible: Tensor | None,
    window: int | None,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Return the distance of every pair, int64 `[B, T, S]`, and which pairs are visible, bool `[B, T, S]`."""
    index = torch.arange(num_keys, device=device)
    own = torch.arange(num_keys - num_queries, num_keys, device=device).expand(batch, -1)
    last = own if last_visible is None else last_visible.long()
    first = torch.zeros_like(last) if first_visible is None else first_visible.long()
    if window is not None:
        first = torch.maximum(first, last - (window - 1))
    distance = last[:, :, None] - index
    visible = (distance >= 0) & (index >= first[:, :, None])
    return distance, visible
