"""A softmax model read behind a window with its first tokens kept: attention sinks, without training.

StreamingLLM (arXiv 2309.17453): of the past only n first tokens and the last W are seen, and positions count within
what is kept, so that no query is farther from a sink than n + W - 1. The two key sets are attended to apart and joined
by their log-sum-exp. Legend: B streams, T tokens of a chunk, n sinks, K key/value heads, D head size.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from swat_lm.evaluate.streaming_model import SwatStreamingModel
from swat_lm.evaluate.windows import with_window
from swat_lm.layers import AttentionLayer, WindowAttention
from swat_lm.layers.base import InPlace, Output, Past, StateTensor
from swat_lm.layers.chunk import Chunk
from swat_lm.ops import window_attention
from swat_lm.ops.rotary import apply_rotary

__all__ = ["SinkAttention", "SinkStreamingModel"]


class SinkAttention(WindowAttention):
    """Softmax attention over the window and the first n tokens of the stream."""

    def __init__(self, attention: WindowAttention, num_sinks: int) -> None:
        """Takes the modules of `attention` over, not copied."""
        with torch.device("meta"):
            super().__init__(attention.settings, attention.q_proj.in_features, attention.rotary, attention.index)
        for name, module in attention.named_children():
            setattr(self, name, module)
        self.sink, self.num_sinks = attention.sink, num_sinks

    def state_spec(self) -> tuple[StateTensor, ...]:
        """Beside the window, rotated keys and values of the sinks."""
        shape = (self.num_sinks, self.settings.num_key_value_heads, self.settings.head_dim)
        sinks = StateTensor("sink_key", shape, "summary"), StateTensor("sink_value", shape, "summary")
        return *super().state_spec(), *sinks

    def forward(self, hidden: Tensor, chunk: Chunk, past: Past | None = None) -> Output:
        """Mix a chunk of streams that stand together, `[B, T, M]`."""
        if past is None or chunk.first is not None or chunk.hidden is not None:
            raise ValueError("sinks are kept of streams that stand together, read by their state; without padding")
        assert self.settings.sliding_window is not None
        query, key, value = self.project(hidden)
        near = far = query
        if self.rotary is not None:
            # what is kept holds at most n + W tokens, and the query is the last of them
            kept = chunk.positions.clamp(max=self.num_sinks + self.settings.sliding_window - 1)
            own = chunk.angles(self.rotary, hidden.dtype)
            near, key = apply_rotary(query, *own), apply_rotary(key, *own)
            far = apply_rotary(query, *self.rotary.angles(kept, hidden.dtype))
        sink_key, sink_value = self._sinks(key, value, chunk, past)
        items, _ = past.extend(key=key, value=value)
        cap = self.settings.attn_logit_softcapping
        first, lse = window_attention(
            near, items["key"], items["value"], window=self.settings.sliding_window, score_function="softmax",
            slopes=None, scale=self.scale, softcap=cap, return_lse=True,
        )  # fmt: skip
        # sinks that still stand in the window are seen there
        last = chunk.positions - self.settings.sliding_window
        last = last.clamp(min=-1, max=self.num_sinks - 1).to(torch.int32).expand(len(key), -1).contiguous()
        second, sink_lse = window_attention(
            far, sink_key, sink_value, window=None, score_function="softmax", slopes=None, last_visible=last,
            scale=self.scale, softcap=cap, return_lse=True,
        )  # fmt: skip
        # rows that see no sink have a log-sum-exp of minus infinity
        share = torch.sigmoid(lse - sink_lse).unsqueeze(-1)
        joined = share.to(first.dtype) * first + (1 - share).to(first.dtype) * second
        # a learned sink takes its share of all that is seen
        result = joined if self.sink is None else (joined, torch.logaddexp(lse, sink_lse))
        return Output(self.o_proj(self.heads_output(result)), past.after())

    def step(self, hidden: Tensor, chunk: Chunk, past: InPlace) -> Tensor:
        """One token is a chunk too."""
        return self.forward(hidden, chunk, past).hidden

    def _sinks(self, key: Tensor, value: Tensor, chunk: Chunk, past: Past) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, n, K, D]` of the sinks after this chunk: its tokens of positions below n are some."""
        # [B or 1, T, n]: which token is which sink
        chosen = F.one_hot(chunk.positions.clamp(max=self.num_sinks), self.num_sinks + 1)[..., : self.num_sinks]
        chosen = chosen.to(key.dtype).expand(len(key), -1, -1)
        is_new = chosen.sum(dim=1)[:, :, None, None]
        found = []
        for name, tensor in (("sink_key", key), ("sink_value", value)):
            new = torch.einsum("btn,btkd->bnkd", chosen, tensor)
            found.append((1 - is_new) * past.fold(name, 1 - is_new, new) + new)
        return found[0], found[1]


class SinkStreamingModel(SwatStreamingModel):
    """Reads streams with `num_sinks` first tokens kept beside a window; constant memory."""

    def __init__(self, model: PreTrainedModel, num_sinks: int, window: int) -> None:
        """Llama, Mistral and softmax models of ours; raises ValueError for any other, and for numbers below 1."""
        if num_sinks < 1 or window < 1:
            raise ValueError(f"expected at least 1 sink and a window of at least 1; got {num_sinks} and {window}")
        windowed = with_window(model, window)
        settings = [entry.settings for entry in windowed.config.plan() if issubclass(entry.kind, AttentionLayer)]
        if any(layer.score_function != "softmax" or layer.slopes != "none" for layer in settings):
            raise ValueError(
                "sinks are kept for softmax attention without slopes only: sigmoid weights do not compete, and a slope "
                "has no distance to a token that left the window"
            )
        for layer in windowed.model.stack:
            # layers of other kinds keep what they keep
            if isinstance(layer, AttentionLayer):
                layer.self_attn = SinkAttention(cast(WindowAttention, layer.self_attn), num_sinks)
        super().__init__(windowed)
