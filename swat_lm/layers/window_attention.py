"""Windowed attention as a mixer: projections, rotary, norms and sinks around `swat_lm.ops`, which attends.

Parameter names and shapes are Llama's. Equations: SWAT (arXiv 2502.18845), Eq. 5; docs/mathematics.md.
Legend: B rows, T tokens, P kept tokens, M width, H query heads, K key/value heads, D head size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from swat_lm.layers.attention_settings import AttentionSettings
from swat_lm.layers.base import InPlace, Output, Part, Past, Shared, StateTensor, lay_out
from swat_lm.layers.both_ways import REFUSAL, attend_both_ways, flops_both_ways
from swat_lm.layers.chunk import Chunk, Rotary
from swat_lm.layers.first_tokens import FirstTokens, Heads, join_heads
from swat_lm.layers.norm import RMSNorm
from swat_lm.layers.per_head import own_part, register_per_head, start_per_head
from swat_lm.layers.pre_norm import Mixer
from swat_lm.layers.relative_bias import BiasOfLayer
from swat_lm.ops import window_attention, window_attention_step
from swat_lm.ops.flops import attention_flops
from swat_lm.ops.hiding import hide_keys
from swat_lm.ops.rotary import apply_rotary, half_angles, rotate_paired
from swat_lm.ops.streamed import streamed_attention


class WindowAttention(Mixer):
    """Attention over the last `window` tokens (all of them when the window is None)."""

    sink: nn.Parameter | None
    slopes: nn.Parameter | None
    score_bias: nn.Parameter | None

    def __init__(
        self,
        settings: AttentionSettings,
        width: int,
        rotary: Rotary | None = None,
        index: int = 0,
        norm_eps: float = 1e-6,
        shared: Shared | None = None,
    ) -> None:
        """`index` is the layer's number, by which it finds its window where a step draws windows."""
        super().__init__()
        self.settings = settings
        self.rotary = rotary
        self.index = index
        given = settings.attention_multiplier
        self.scale = settings.head_dim**-0.5 if given is None else float(given)
        self.num_heads, self.num_kv_heads = settings.num_attention_heads, settings.num_key_value_heads
        query_width, bias = settings.num_attention_heads * settings.head_dim, settings.attention_bias
        output_bias = bias if settings.output_bias is None else settings.output_bias
        key_width = settings.num_key_value_heads * settings.head_dim
        self.q_proj = nn.Linear(width, query_width, bias=bias)
        self.k_proj = nn.Linear(width, key_width, bias=bias)
        self.v_proj = nn.Linear(width, key_width, bias=bias)
        self.o_proj = nn.Linear(query_width, width, bias=output_bias)
        # one weight per head channel, shared by the heads; or one per channel of the layer
        self.norms_heads = settings.qk_norm_over == "head"
        query_norm, key_norm = (settings.head_dim,) * 2 if self.norms_heads else (query_width, key_width)
        self.q_norm = RMSNorm(query_norm, norm_eps) if settings.qk_norm else None
        self.k_norm = RMSNorm(key_norm, norm_eps) if settings.qk_norm else None
        self.output_norm = RMSNorm(settings.head_dim, norm_eps) if settings.output_norm else None
        self.gate_proj = nn.Linear(width, settings.num_attention_heads, bias=False) if settings.output_gate else None
        register_per_head(self, settings)
        # not a buffer: `.to(bfloat16)` must not round the slopes, nor loading leave them uninitialised
        with torch.device("cpu"):
            self._slopes = settings.first_slopes()
        start_per_head(self)
        self.relative_bias = None
        if settings.relative_bias != "none":
            self.relative_bias = BiasOfLayer(
                settings.relative_bias, settings.num_attention_heads, Shared() if shared is None else shared
            )
        self.first_tokens = FirstTokens(self) if settings.sinks else None
        # what a sink takes, or first tokens, is a share of all weights
        self.asks_for_lse = settings.learned_sink or (settings.sinks > 0 and settings.score_function == "softmax")

    def take_heads(self, share: int, num_shares: int) -> None:
        """Be one of `num_shares` parts, each with as many heads in order; the projections are cut by whoever asks.

        Raises:
            ValueError: heads that cannot be shared equally, or that are normed together.
        """
        if self.relative_bias is not None:
            raise ValueError("relative_bias: is not shared out by heads; run the model without tensor parallelism")
        if self.q_norm is not None and not self.norms_heads:
            raise ValueError(
                "qk_norm_over: 'layer' norms all heads together, so they cannot be shared by processes; "
                "use qk_norm_over='head', or run the model without tensor parallelism"
            )
        for name, heads in (("num_attention_heads", self.num_heads), ("num_key_value_heads", self.num_kv_heads)):
            if heads % num_shares:
                raise ValueError(
                    f"{name}: {heads} heads cannot be shared by {num_shares} processes; take a number that divides them"
                )
        self.num_heads, self.num_kv_heads = self.num_heads // num_shares, self.num_kv_heads // num_shares
        if self._slopes is not None:
            self._slopes = self._slopes[share * self.num_heads : (share + 1) * self.num_heads].clone()

    def state_spec(self) -> tuple[StateTensor, ...]:
        """Rotated keys and values: `window` places, since a new key is written before it is attended to.

        And those of the first tokens, where they are kept.
        """
        if self.settings.bidirectional:
            return ()
        shape, window = (self.num_kv_heads, self.settings.head_dim), self.settings.sliding_window
        kind = "growing" if window is None else "window"
        spec = StateTensor("key", shape, kind, window), StateTensor("value", shape, kind, window)
        return spec if self.first_tokens is None else (*spec, *self.first_tokens.state_spec())

    def refuses_past(self) -> str | None:
        """Tokens that see what comes after them."""
        return REFUSAL if self.settings.bidirectional else None

    def refuses(self, chunk: Chunk) -> str | None:
        """A prefix that is read in both directions, where distances or a window count from the query."""
        if chunk.last is None or (self.settings.slopes == "none" and self.settings.sliding_window is None):
            return None
        return (
            "attention with slopes or a window counts distances back from the query, so it cannot read a prefix in "
            "both directions; use slopes='none' and no sliding_window for such rows"
        )

    def forward(self, hidden: Tensor, chunk: Chunk, past: Past | None = None) -> Output:
        """Mix a chunk `[B, T, M]`; the past, if any, is extended by the chunk's keys and values."""
        mixed = self.o_proj(self.gated(self.heads_output(self.mix(*self.project(hidden), chunk, past)), hidden))
        return Output(mixed, None if past is None else past.after())

    def forward_packed(self, hidden: Tensor, parts: Sequence[Part]) -> Tensor:
        """Mix parts of a row `[1, T, M]`: projections for all at once."""
        query, key, value = self.project(hidden)
        heads, lse = [], []
        for part in parts:
            own = query[:, part.tokens], key[:, part.tokens], value[:, part.tokens]
            mixed = self.mix(*own, part.chunk, part.past)
            heads.append(mixed if isinstance(mixed, Tensor) else mixed[0])
            lse += [] if isinstance(mixed, Tensor) else [mixed[1]]
        output = lay_out(parts, heads, hidden.shape[1])
        output = self.heads_output((output, lay_out(parts, lse, hidden.shape[1])) if lse else output)
        return self.o_proj(self.gated(output, hidden))

    def mix(self, query: Tensor, key: Tensor, value: Tensor, chunk: Chunk, past: Past | None) -> Heads:
        """What the heads give to queries `[B, T, H, D]`, with its lse for softmax where that is asked for.

        Queries, keys and values are not rotated; the past, if any, is extended.
        """
        if self.settings.bidirectional:
            if past is not None:
                raise ValueError(REFUSAL)
            return attend_both_ways(self, query, key, value, chunk)
        far = None if self.first_tokens is None else self.first_tokens.attend(query, key, value, chunk, past)
        rotary = None if self.rotary is None else chunk.angles(self.rotary, query.dtype)
        num_past = 0
        if past is not None:
            if rotary is not None:
                # what is kept is rotated; without a past the kernels rotate on the way
                query, key = apply_rotary(query, *rotary), apply_rotary(key, *rotary)
                rotary = None
            items, num_past = past.extend(key=key, value=value)
            key, value = items["key"], items["value"]
        return join_heads(self.attend(query, key, value, chunk, num_past, rotary), far)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        chunk: Chunk,
        num_past: int,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Heads:
        """What the operator gives for queries `[B, T, H, D]` over P + T keys; with its lse where that is asked for."""
        settings = self.settings
        scale, head_dim = self.scale, query.shape[-1]
        blind = chunk.hidden_items(num_past)
        if chunk.key_block is not None and self.window_in(chunk) is None and rotary is None:
            return self._attend_by_blocks(query, key, value, chunk, num_past, chunk.key_block)
        if rotary is not None and (blind is not None or chunk.last is not None):
            # the kernels rotate where tokens see what is before them, and all of it
            query, key = apply_rotary(query, *rotary), apply_rotary(key, *rotary)
            rotary = None
        softcap = settings.attn_logit_softcapping
        if blind is not None and softcap is None:
            query, key, value = hide_keys(query, key, value, blind, scale)
        window = self.window_in(chunk)
        result = window_attention(
            query,
            key,
            value,
            window=window,
            score_function=settings.score_function,
            slopes=self.slopes_on(query.device),
            score_bias=self.bias(),
            scale=scale,
            first_visible=chunk.first_visible(num_past),
            last_visible=chunk.last_visible(num_past),
            rotary=rotary,
            softcap=softcap,
            # no capped score is low enough to hide by
            hidden=None if softcap is None else blind,
            relative_bias=self.relative_bias_in(window, chunk),
            return_lse=self.asks_for_lse,
            backend=settings.attention_backend,
        )
        if blind is None:
            return result
        if isinstance(result, Tensor):
            return result[..., :head_dim]
        return result[0][..., :head_dim], result[1]

    def _attend_by_blocks(
        self, query: Tensor, key: Tensor, value: Tensor, chunk: Chunk, num_past: int, key_block: int
    ) -> Heads:
        assert chunk.last is None, "blocks of a row are read in one direction"
        output, lse = streamed_attention(
            query,
            key,
            value,
            key_block=key_block,
            score_function=self.settings.score_function,
            slopes=self.slopes_on(query.device),
            score_bias=self.bias(),
            scale=self.scale,
            first_visible=chunk.first_visible(num_past),
            softcap=self.settings.attn_logit_softcapping,
            hidden=chunk.hidden_items(num_past),
        )
        return (output, lse) if self.asks_for_lse else output

    def relative_bias_in(self, window: int | None, chunk: Chunk | None) -> Tensor | None:
        """`[H, window]`, or None where there is none."""
        if self.relative_bias is None:
            return None
        assert window is not None
        bias = self.relative_bias(window, self.settings.bidirectional, chunk)
        # a model may lie on several devices
        return bias if bias.device == self.q_proj.weight.device else bias.to(self.q_proj.weight.device)

    def window_in(self, chunk: Chunk) -> int | None:
        """The window for this chunk: the layer's own, or the one that was drawn for it. Raises ValueError."""
        own = self.settings.sliding_window
        if chunk.windows is None:
            return own
        drawn = chunk.windows[self.index]
        if own is not None and (drawn is None or drawn > own):
            raise ValueError(f"windows: layer {self.index} keeps the last {own} tokens, so it cannot see {drawn}")
        return drawn

    def step(self, hidden: Tensor, chunk: Chunk, past: InPlace) -> Tensor:
        """Mix one token per row, `[B, 1, M]`, in place over rings."""
        query, key, value = self.project(hidden)
        far = None if self.first_tokens is None else self.first_tokens.step(query, key, value, chunk, past)
        angles = None if self.rotary is None else chunk.step_angles(self.rotary, hidden.dtype)
        rotary = None
        if angles is not None and query.is_cuda:
            # the kernel rotates
            rotary = half_angles(*angles)
        elif angles is not None:
            query, key = rotate_paired(query, *angles), rotate_paired(key, *angles)
        output = self.attend_step(query, key, value, past, rotary, far, chunk.batch_invariant)
        return self.o_proj(self.gated(output, hidden))

    def attend_step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        past: InPlace,
        rotary: tuple[Tensor, Tensor] | None = None,
        far: Heads | None = None,
        batch_invariant: bool = False,
    ) -> Tensor:
        """Attend with one token per row, `[B, 1, heads, D]`; returns the heads' output `[B, 1, H * D]`.

        `rotary` is cosine and sine, `[B, 1, D / 2]`; None where query and key are rotated already. `far` is what the
        first tokens give.
        """
        settings, key_ring = self.settings, past.kept["key"]
        if key.dtype != key_ring.dtype:
            # under autocast
            query, key, value = (x.to(key_ring.dtype) for x in (query, key, value))
        near = window_attention_step(
            query,
            key,
            value,
            key_ring,
            past.kept["value"],
            past.slot,
            past.position,
            score_function=settings.score_function,
            slopes=self.slopes_on(query.device),
            score_bias=self.bias(),
            scale=self.scale,
            softcap=settings.attn_logit_softcapping,
            relative_bias=self.relative_bias_in(settings.sliding_window, None),
            rotary=rotary,
            return_lse=self.asks_for_lse,
            batch_invariant=batch_invariant,
            backend=settings.attention_backend,
        )
        return self.heads_output(join_heads(near, far))

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query `[B, T, H, D]`, key and value `[B, T, K, D]`, normed but not rotated."""
        query, heads = self.q_proj(hidden), (*hidden.shape[:2], self.num_heads, self.settings.head_dim)
        if self.norms_heads:
            query = query.view(heads)
        if self.q_norm is not None:
            query = self.q_norm(query)
        return query.view(heads), *self.project_items(hidden)

    def project_items(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value `[B, T, K, D]` alone, normed but not rotated."""
        key, heads = self.k_proj(hidden), (*hidden.shape[:2], self.num_kv_heads, self.settings.head_dim)
        if self.norms_heads:
            key = key.view(heads)
        if self.k_norm is not None:
            key = self.k_norm(key)
        return key.view(heads), self.v_proj(hidden).view(heads)

    def kept_items(self, hidden: Tensor, chunk: Chunk) -> dict[str, Tensor]:
        """What a past is extended by, `[B, T, K, D]` by name: rotated keys, and values."""
        key, value = self.project_items(hidden)
        if self.rotary is not None:
            key = apply_rotary(key, *chunk.angles(self.rotary, key.dtype))
        return {"key": key, "value": value}

    def heads_output(self, result: Heads) -> Tensor:
        """From the operator's `[B, T, H, D]`, with its lse where that is asked for, to `o_proj`'s `[B, T, H * D]`."""
        output = result if isinstance(result, Tensor) else result[0]
        if self.sink is not None:
            lse = result[1]
            # softmax with one more key, of score `sink` and value zero
            share = torch.sigmoid(lse - own_part(self.sink).to(lse.dtype))
            output = output * share.to(output.dtype).unsqueeze(-1)
        if self.output_norm is not None:
            output = self.output_norm(output)
        return output.flatten(2)

    def gated(self, output: Tensor, hidden: Tensor) -> Tensor:
        """The heads' output `[B, T, H * D]`, where there is a gate times its sigmoid, one number per head and token."""
        if self.gate_proj is None:
            return output
        gate = torch.sigmoid(self.gate_proj(hidden)).unsqueeze(-1)
        return (output.unflatten(2, (gate.shape[2], -1)) * gate).flatten(2)

    def bias(self) -> float | Tensor:
        """What is added to every score: a number, or one per query head `[H]`."""
        return self.settings.bias() if self.score_bias is None else own_part(self.score_bias)

    def slopes_on(self, device: torch.device) -> Tensor | None:
        """One slope per query head, `[H]`, or None where there are none."""
        if self.slopes is not None:
            return own_part(self.slopes)
        slopes = self._slopes
        if slopes is not None and slopes.device != device:
            # made outside inference mode, so that a later training step may save it for its backward
            with torch.inference_mode(False):
                slopes = self._slopes = slopes.to(device)
        return slopes

    def _apply(self, fn: Any, recurse: bool = True) -> "WindowAttention":
        super()._apply(fn, recurse)
        self.slopes_on(self.q_proj.weight.device) if self.q_proj.weight.device.type != "meta" else None
        return self

    def flops(self, num_tokens: int, num_past: int = 0) -> int:
        """Projections, and the two products over the pairs that the window leaves."""
        settings = self.settings
        # those of keys and values are alike, and those of queries and outputs
        matrices = 2 * (self.q_proj.weight.numel() + self.k_proj.weight.numel())
        heads, size, window = settings.num_attention_heads, settings.head_dim, settings.sliding_window
        matrices += 0 if self.gate_proj is None else self.gate_proj.weight.numel()
        if self.settings.bidirectional:
            assert window is not None
            return 2 * num_tokens * matrices + flops_both_ways(heads, size, num_tokens, window)
        found = 2 * num_tokens * matrices + attention_flops(heads, size, num_tokens, window, num_past)
        return found if self.first_tokens is None else found + self.first_tokens.flops(num_tokens, num_past)

    def reach(self) -> int | None:
        """The window, on both sides where it has two."""
        window = self.settings.sliding_window
        return 2 * window - 1 if self.settings.bidirectional and window is not None else window

    def first_kept(self) -> int:
        """The first tokens."""
        return self.settings.sinks

    def extra_repr(self) -> str:
        """The settings that are not visible in the submodules."""
        shown = self.settings
        return f"window={shown.sliding_window}, score_function={shown.score_function}, slopes={shown.slopes}"
