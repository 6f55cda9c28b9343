"""Windowed attention that looks both ways: a token sees `window - 1` tokens before it and as many after it.

The operator's window counts back from a last key, so here the last key lies ahead of the query, and keys that nobody
sees stand behind the row's end. Legend: B rows, T tokens, H query heads, K key/value heads, D head size, W window.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from swat_lm.layers.chunk import Chunk
from swat_lm.layers.first_tokens import Heads
from swat_lm.ops import window_attention
from swat_lm.ops.flops import attention_flops
from swat_lm.ops.head_bias import score_dtype
from swat_lm.ops.rotary import apply_rotary
from swat_lm.ops.sequences import unpack

if TYPE_CHECKING:
    from swat_lm.layers.window_attention import WindowAttention

REFUSAL = (
    "it looks both ways (bidirectional), so what comes later changes what came before, and no stream, cache or carry "
    "can go on from it; pass whole rows with use_cache=False, or set bidirectional to false"
)


def attend_both_ways(attention: "WindowAttention", query: Tensor, key: Tensor, value: Tensor, chunk: Chunk) -> Heads:
    """What the heads give to queries `[B, T, H, D]`, not rotated; with the lse where that is asked for."""
    if attention.rotary is not None:
        angles = chunk.angles(attention.rotary, query.dtype)
        query, key = apply_rotary(query, *angles), apply_rotary(key, *angles)
    if chunk.first is None:
        return _attend(attention, query, key, value, chunk.hidden, chunk)
    seen, (batch, num_tokens) = chunk.first <= chunk.places, query.shape[:2]
    documents = chunk._once("documents", lambda: unpack(chunk.segments, seen, batch, num_tokens, query.device))
    output, lse = torch.zeros_like(query), query.new_zeros(query.shape[:3], dtype=score_dtype(query))
    for group in documents.groups:
        queries, keys, values = (group.take(x.flatten(2)).unflatten(2, x.shape[2:]) for x in (query, key, value))
        blind = ~group.is_token
        if chunk.hidden is not None:
            blind = blind | chunk.hidden.flatten()[group.place]
        found = _attend(attention, queries, keys, values, blind, chunk)
        heads = found if isinstance(found, Tensor) else found[0]
        output = group.put(heads.flatten(2), output.flatten(2)).view(output.shape)
        if not isinstance(found, Tensor):
            lse = group.put(found[1].to(lse.dtype), lse)
    return (output, lse) if attention.asks_for_lse else output


def _attend(
    attention: "WindowAttention", query: Tensor, key: Tensor, value: Tensor, blind: Tensor | None, chunk: Chunk
) -> Heads:
    batch, num_tokens = query.shape[:2]
    # a wider one sees no more
    window = min(attention.window_in(chunk) or num_tokens, num_tokens)
    if blind is None:
        blind = torch.zeros(batch, num_tokens, dtype=torch.bool, device=query.device)
    ahead = window - 1
    key, value = (F.pad(x, (0, 0, 0, 0, 0, ahead)) for x in (key, value))
    last = torch.arange(ahead, ahead + num_tokens, dtype=torch.int32, device=query.device)
    return window_attention(
        query,
        key,
        value,
        window=window + ahead,
        score_function=attention.settings.score_function,
        score_bias=attention.bias(),
        scale=attention.scale,
        last_visible=last.expand(batch, -1).contiguous(),
        softcap=attention.settings.attn_logit_softcapping,
        hidden=F.pad(blind, (0, ahead), value=True),
        relative_bias=attention.relative_bias_in(window, chunk),
        return_lse=attention.asks_for_lse,
        backend=attention.settings.attention_backend,
    )


def flops_both_ways(num_heads: int, head_dim: int, num_tokens: int, window: int) -> int:
    """FLOPs of both products, with those of the last queries and the keys that are not there."""
    window = min(window, num_tokens)
    return attention_flops(num_heads, head_dim, num_tokens, 2 * window - 1, window - 1)
