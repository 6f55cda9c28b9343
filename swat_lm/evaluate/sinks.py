"""A softmax model read behind a window with its first tokens kept: attention sinks, without training.

StreamingLLM (arXiv 2309.17453): of the past only n first tokens and the last W are seen, and positions count within
what is kept, so that no query is farther from a sink than n + W - 1. The two key sets are attended to apart and joined
by their log-sum-exp. Legend: B streams, T tokens of a chunk, M model width.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from swat_lm.evaluate.reader import HeadReader
from swat_lm.evaluate.windows import with_window
from swat_lm.mixers.attention import WindowAttention
from swat_lm.ops import window_attention
from swat_lm.ops.rotary import apply_rotary

__all__ = ["SinkReader", "SinkState"]


@dataclass
class SinkState:
    """Per layer, keys and values `[B, n, K, D]`: those of the window, rotated, and those of the sinks."""

    tokens_read: int = 0
    window: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    sinks: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


class SinkReader(HeadReader):
    """Reads streams with `num_sinks` first tokens kept beside a window; constant memory."""

    def __init__(self, model: PreTrainedModel, num_sinks: int, window: int) -> None:
        """Llama, Mistral and softmax models of ours; raises ValueError for any other, and for numbers below 1."""
        if num_sinks < 1 or window < 1:
            raise ValueError(f"expected at least 1 sink and a window of at least 1; got {num_sinks} and {window}")
        windowed = with_window(model, window)
        settings = [windowed.config.attention_settings(i) for i in range(windowed.config.num_hidden_layers)]
        if any(one.score_function != "softmax" or one.slopes != "none" for one in settings):
            raise ValueError(
                "sinks are kept for softmax attention without slopes only: sigmoid weights do not compete, and a slope "
                "has no distance to a token that left the window"
            )
        super().__init__(windowed, windowed.lm_head)
        self._model, self.num_sinks, self.window = windowed, num_sinks, window

    def start(self, batch_size: int) -> SinkState:
        """An empty past."""
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        return SinkState()

    @torch.inference_mode()
    def extend(self, tokens: Tensor, state: SinkState) -> Tensor:
        """Read `[B, T]` tokens, changing the state in place; returns hidden states `[B, T, M]`."""
        body, start = self._model.model, state.tokens_read
        places = torch.arange(start, start + tokens.shape[1], device=self.device).unsqueeze(0)
        hidden = body.embed_tokens(tokens.to(self.device))
        # what is kept holds at most n + W tokens, and the query is the last of them
        own = body.rotary.angles(places, hidden.dtype)
        kept = body.rotary.angles(places.clamp(max=self.num_sinks + self.window - 1), hidden.dtype)
        for index, layer in enumerate(body.stack):
            attention = layer.self_attn
            assert isinstance(attention, WindowAttention)
            mixed = self._attend(attention, layer.input_layernorm(hidden), index, (own[index], kept[index]), state)
            hidden = hidden + attention.o_proj(mixed)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        state.tokens_read += tokens.shape[1]
        return body.norm(hidden)

    def state_bytes(self, state: SinkState) -> int:
        """Bytes that one stream keeps of its past."""
        held = [one for part in (state.window, state.sinks) for pair in part.values() for one in pair]
        return sum(one[0].numel() * one.element_size() for one in held)

    def _attend(
        self,
        attention: WindowAttention,
        hidden: Tensor,
        index: int,
        angles: tuple[tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor] | None],
        state: SinkState,
    ) -> Tensor:
        query, key, value = attention._project(hidden)
        near, far = (query if one is None else apply_rotary(query, *one) for one in angles)
        key = key if angles[0] is None else apply_rotary(key, *angles[0])
        if index in state.window:
            key, value = (torch.cat(pair, dim=1) for pair in zip(state.window[index], (key, value), strict=True))
        num_tokens, start = hidden.shape[1], state.tokens_read
        self._keep_sinks(index, key[:, -num_tokens:], value[:, -num_tokens:], start, state)
        first, lse = window_attention(
            near, key, value, window=self.window, score_function="softmax", slopes=None, return_lse=True
        )
        sink_key, sink_value = state.sinks[index]
        # sinks that still stand in the window are seen there
        last = torch.arange(start, start + num_tokens, device=key.device) - self.window
        last = last.clamp(min=-1, max=sink_key.shape[1] - 1).to(torch.int32).expand(len(key), -1).contiguous()
        second, sink_lse = window_attention(
            far, sink_key, sink_value, window=None, score_function="softmax", slopes=None, last_visible=last,
            return_lse=True,
        )  # fmt: skip
        # rows that see no sink have a log-sum-exp of minus infinity
        share = torch.sigmoid(lse - sink_lse).unsqueeze(-1)
        joined = share.to(first.dtype) * first + (1 - share).to(first.dtype) * second
        past = slice(max(0, key.shape[1] - (self.window - 1)), None)
        state.window[index] = key[:, past], value[:, past]
        # a learned sink takes its share of all that is seen
        return attention.heads_output(joined if attention.sink is None else (joined, torch.logaddexp(lse, sink_lse)))

    def _keep_sinks(self, index: int, key: Tensor, value: Tensor, start: int, state: SinkState) -> None:
        if start >= self.num_sinks:
            return
        new = key[:, : self.num_sinks - start], value[:, : self.num_sinks - start]
        held = state.sinks.get(index)
        state.sinks[index] = new if held is None else (torch.cat((held[0], new[0]), 1), torch.cat((held[1], new[1]), 1))
