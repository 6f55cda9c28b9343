"""Softmax over everything before, on a CPU, by PyTorch's own fused kernel: what the blocked backend hands on.

The kernel (FlashAttention-2, arXiv 2307.08691, behind `scaled_dot_product_attention`) knows no windows, sigmoids or
biases; where a call has none of them it takes a fifth of the time of tiles. Slopes (ALiBi, arXiv 2108.12409) are put
into its products: `slope * (i - j)` is `slope * (r - j)`, which one more channel of queries and keys gives, and a
number that the scores of a row share; so forward takes a quarter of the time of tiles, and backward is left to them.
Its causal form wants as many keys as queries, so earlier keys are a second call without a mask, and the two are joined
by their lse.
Legend: B sequences, T queries, S keys, P = S - T earlier keys, H query heads, K key/value heads, D head size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swat_lm.ops.calls import AttentionCall
from swat_lm.ops.head_bias import score_dtype

__all__ = ["backward", "forward", "serves"]

_attend: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_attend_backward: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)

ROWS = 32
"""Rows of one r where there are slopes, in their middle: from one farther away near keys would have large numbers, and
what is left of their differences in float32 would be less."""


def serves(call: AttentionCall, needs_per_head: bool = False) -> bool:
    """Whether the kernel computes what is asked for: all that came before, with slopes forward alone."""
    num_queries, num_keys = call.query.shape[1], call.key.shape[1]
    return (
        call.query.device.type == "cpu"
        and _attend is not None
        and call.softmax
        and 0 < num_queries <= num_keys
        and (call.window is None or call.window >= num_keys)
        and (call.slopes is None or call.scale != 0)
        and call.relative_bias is None
        and call.softcap is None
        and call.hidden is None
        and call.last_visible is None
        and not needs_per_head
        and call.query.shape[-1] == call.value.shape[-1]
        and (call.first_visible is None or not bool((call.first_visible > 0).any()))
    )


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """As `blocked.forward`: `(output [B, T, H, D], lse [B, T, H])`."""
    query, key, value = in_heads(call)
    output, lse = (attended if call.slopes is None else attended_by_distance)(call, query, key, value)
    # the kernel makes zeros of rows whose scores are no numbers, and a broken model would look healthy
    # (asked of no number, so that the memory of a pass can be found from shapes)
    broken = query.isnan().any(dim=-1)
    output.masked_fill_(broken[..., None], torch.nan)
    lse.masked_fill_(broken, torch.nan)
    # one number for all scores of a head moves their lse and nothing else
    lse = lse + call.head_bias().constant[:, None]
    return output.transpose(1, 2).contiguous().to(call.query.dtype), lse.transpose(1, 2).contiguous()


def backward(call: AttentionCall, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value; output and lse are computed anew, as all backwards here do."""
    query, key, value = in_heads(call)
    output, lse = attended(call, query, key, value)
    gradient = grad_output.to(query.dtype).contiguous().transpose(1, 2)
    earlier = key.shape[2] - query.shape[2]
    d_key, d_value = torch.zeros_like(key), torch.zeros_like(value)
    # of the part itself, by heads; then of what came before, where a group's heads are rows
    own = (x[:, :, earlier:].repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    d_query, *d_own = _attend_backward(gradient, query, *own, output, lse, 0.0, True, scale=call.scale)
    for total, part in zip((d_key, d_value), d_own, strict=True):
        total[:, :, earlier:] = part.unflatten(1, (key.shape[1], -1)).sum(dim=2)
    if earlier:
        rows = [as_rows(x, key.shape[1]) for x in (gradient, query, output, lse[..., None])]
        before = (x[:, :, :earlier] for x in (key, value))
        found = _attend_backward(rows[0], rows[1], *before, rows[2], rows[3][..., 0], 0.0, False, scale=call.scale)
        d_query += found[0].unflatten(2, (-1, query.shape[2])).flatten(1, 2)
        d_key[:, :, :earlier], d_value[:, :, :earlier] = found[1:]
    query_type, key_type, value_type = call.query.dtype, call.key.dtype, call.value.dtype
    gradients = (d_query.to(query_type), d_key.to(key_type), d_value.to(value_type))
    return tuple(x.transpose(1, 2).contiguous() for x in gradients)  # type: ignore[return-value]


def in_heads(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """Query `[B, H, T, D]`, key and value `[B, K, S, D]`, in the precision of scores, channels side by side."""
    dtype = score_dtype(call.query)
    given = (x.to(dtype) for x in (call.query, call.key, call.value))
    # the kernel reads them as if they were, whatever the strides say
    together = (x if x.stride(-1) == 1 else x.contiguous() for x in given)
    return tuple(x.transpose(1, 2) for x in together)  # type: ignore[return-value]


def attended(call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Output `[B, H, T, D]` and lse `[B, H, T]` of scores without their constant."""
    (heads, count), (kv_heads, total) = query.shape[1:3], key.shape[1:3]
    earlier = total - count
    own = (x[:, :, earlier:].repeat_interleave(heads // kv_heads, dim=1) for x in (key, value))
    output, lse = _attend(query, *own, 0.0, True, scale=call.scale)
    if not earlier:
        return output, lse
    before = (x[:, :, :earlier] for x in (key, value))
    far, far_lse = _attend(as_rows(query, kv_heads), *before, 0.0, False, scale=call.scale)
    far = far.unflatten(2, (-1, count)).flatten(1, 2)
    far_lse = far_lse.unflatten(2, (-1, count)).flatten(1, 2)
    output = torch.lerp(output, far, torch.sigmoid(far_lse - lse).to(output.dtype)[..., None])
    return output, torch.logaddexp(lse, far_lse)


def attended_by_distance(call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """As `attended`, with slopes."""
    count, earlier = query.shape[2], key.shape[2] - query.shape[2]
    output, lse = torch.empty_like(query), query.new_empty(query.shape[:-1])
    slopes = call.head_bias().slopes
    # slope * (r - j) is the product of the last channels, in which values have nothing
    channel = (slopes / call.scale)[:, None, None].expand(*query.shape[:3], 1)
    query, key, value = torch.cat((query, channel), dim=-1), F.pad(key, (0, 1)), F.pad(value, (0, 1))
    place = torch.arange(earlier + count, dtype=key.dtype, device=key.device)
    for begin in range(0, count, ROWS):
        rows, seen = slice(begin, min(begin + ROWS, count)), slice(0, earlier + min(begin + ROWS, count))
        middle = earlier + begin + ROWS // 2
        key[:, :, seen, -1] = middle - place[seen]
        found, found_lse = attended(call, query[:, :, rows], key[:, :, seen], value[:, :, seen])
        output[:, :, rows] = found[..., :-1]
        lse[:, :, rows] = found_lse + slopes[:, None] * (place[earlier:][rows] - middle)
    return output, lse


def as_rows(x: Tensor, kv_heads: int) -> Tensor:
    """`[B, H, T, X]` -> `[B, K, H / K * T, X]`: the heads that share keys as rows of one, so that no key is copied."""
    return x.unflatten(1, (kv_heads, -1)).flatten(2, 3)
