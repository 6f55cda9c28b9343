"""Windowed attention as a mixer: projections, rotary, norms and sinks around `swat_lm.ops`, which attends.

Parameter names and shapes are Llama's. Equations: SWAT (arXiv 2502.18845), Eq. 5; docs/mathematics.md.
Legend: B rows, T tokens, P kept tokens, M width, H query heads, K key/value heads, D head size.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swat_lm.layers.base import InPlace, Output, Past, StateTensor
from swat_lm.layers.chunk import Chunk, Rotary
from swat_lm.layers.norm import NORMS, RMSNorm
from swat_lm.layers.pre_norm import ACTIVATIONS, FEED_FORWARDS, NORM_PLACEMENTS, Mixer
from swat_lm.ops import window_attention, window_attention_step
from swat_lm.ops.checks import BACKENDS
from swat_lm.ops.flops import attention_flops
from swat_lm.ops.hiding import hide_keys
from swat_lm.ops.rotary import apply_rotary, half_angles, rotate_paired
from swat_lm.ops.slopes import slopes_for

INVERSE_WINDOW = "-log(window)"
QK_NORMS = ("head", "layer")
# kernels count positions in 32 bits, and differences of two of them must fit as well
LARGEST_WINDOW = 2**30


@dataclass(frozen=True, kw_only=True)
class AttentionSettings:
    """What may be set of a layer of windowed attention; the fields of SwatConfig of the same names explain them."""

    sliding_window: int | None = 1024
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    head_dim: int = 64
    intermediate_size: int = 2816
    score_function: str = "sigmoid"
    slopes: str = "balanced"
    slope_schedule: str = "swat"
    score_bias: float | str = 0.0
    qk_norm: bool = False
    qk_norm_over: str = "head"
    """"head": each head by itself, with one weight for all of them; "layer": all heads together."""
    output_norm: bool = False
    learned_sink: bool = False
    attention_bias: bool = False
    output_bias: bool | None = None
    """Of `o_proj`; None: as `attention_bias` says."""
    mlp_bias: bool = False
    attention_multiplier: float | None = None
    attn_logit_softcapping: float | None = None
    residual_multiplier: float = 1.0
    norm: str = "rms"
    norm_placement: str = "pre"
    feed_forward: str = "gated"
    hidden_act: str = "silu"
    use_rotary: bool = True
    rope_theta: float | None = None
    """Rotary base; None: that of `rope_parameters`."""
    rope_parameters: dict[str, Any] | None = None
    attention_backend: str = "auto"

    def __post_init__(self) -> None:
        """Hold every setting to its range. Raises ValueError, which begins with the setting's name."""
        for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        heads, kv_heads, window = self.num_attention_heads, self.num_key_value_heads, self.sliding_window
        if heads % kv_heads:
            raise ValueError(
                f"num_key_value_heads: expected a divisor of num_attention_heads ({heads}), got {kv_heads}"
            )
        if window is not None and not 1 <= window <= LARGEST_WINDOW:
            limit = f"at most {LARGEST_WINDOW}" if window > LARGEST_WINDOW else "at least 1 (a query counts itself)"
            raise ValueError(f"sliding_window: expected {limit} or None for full attention, got {window}")
        if self.score_function not in ("sigmoid", "softmax"):
            raise ValueError(f"score_function: expected 'sigmoid' or 'softmax', got {self.score_function!r}")
        slopes_for(heads, self.slopes, self.slope_schedule)
        self.bias()
        if self.learned_sink and self.score_function != "softmax":
            raise ValueError("learned_sink: only softmax has a normaliser that a sink can join; use softmax or drop it")
        if self.use_rotary and self.head_dim % 2:
            raise ValueError(f"head_dim: rotary needs an even head size, got {self.head_dim}; or set use_rotary=False")
        for name, words in (
            ("qk_norm_over", QK_NORMS),
            ("norm", tuple(NORMS)),
            ("norm_placement", NORM_PLACEMENTS),
            ("feed_forward", FEED_FORWARDS),
            ("hidden_act", ACTIVATIONS),
        ):
            if getattr(self, name) not in words:
                raise ValueError(f"{name}: expected {' or '.join(map(repr, words))}, got {getattr(self, name)!r}")
        for name in ("attention_multiplier", "attn_logit_softcapping", "residual_multiplier"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        if self.attention_backend not in BACKENDS:
            raise ValueError(f"attention_backend: expected {', '.join(BACKENDS)}, got {self.attention_backend!r}")

    def bias(self) -> float:
        """The number that is added to every score. Raises ValueError where there is none."""
        bias = self.score_bias
        if isinstance(bias, str):
            if bias != INVERSE_WINDOW:
                raise ValueError(f"score_bias: expected a number or {INVERSE_WINDOW!r}, got {bias!r}")
            if self.sliding_window is None:
                raise ValueError(
                    f"score_bias: the layer has no window, so {INVERSE_WINDOW!r} has no meaning; "
                    "set score_bias=0 or another number, or a list with one entry per layer"
                )
            return -math.log(self.sliding_window)
        if not math.isfinite(bias):
            raise ValueError(f"score_bias: expected a finite number, got {bias}")
        return float(bias)


class WindowAttention(Mixer):
    """Attention over the last `window` tokens (all of them when the window is None)."""

    sink: nn.Parameter | None

    def __init__(
        self,
        settings: AttentionSettings,
        width: int,
        rotary: Rotary | None = None,
        index: int = 0,
        norm_eps: float = 1e-6,
    ) -> None:
        """`index` is the layer's number, by which it finds its window where a step draws windows."""
        super().__init__()
        self.settings = settings
        self.rotary = rotary
        self.index = index
        self.score_bias = settings.bias()
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
        self.register_parameter(
            "sink", nn.Parameter(torch.zeros(settings.num_attention_heads)) if settings.learned_sink else None
        )
        # not a buffer: `.to(bfloat16)` must not round the slopes, nor loading leave them uninitialised
        with torch.device("cpu"):
            self._slopes = slopes_for(settings.num_attention_heads, settings.slopes, settings.slope_schedule)

    def take_heads(self, share: int, num_shares: int) -> None:
        """Be one of `num_shares` parts, each with as many heads in order; the projections are cut by whoever asks.

        Raises:
            ValueError: heads that cannot be shared equally, or that are normed together.
        """
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
        """Rotated keys and values: `window` places, since a new key is written before it is attended to."""
        shape, window = (self.num_kv_heads, self.settings.head_dim), self.settings.sliding_window
        kind = "growing" if window is None else "window"
        return StateTensor("key", shape, kind, window), StateTensor("value", shape, kind, window)

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
        query, key, value = self.project(hidden)
        rotary = None if self.rotary is None else chunk.angles(self.rotary, hidden.dtype)
        num_past = 0
        if past is not None:
            if rotary is not None:
                # what is kept is rotated; without a past the kernels rotate on the way
                query, key = apply_rotary(query, *rotary), apply_rotary(key, *rotary)
                rotary = None
            items, num_past = past.extend(key=key, value=value)
            key, value = items["key"], items["value"]
        mixed = self.o_proj(self.heads_output(self.attend(query, key, value, chunk, num_past, rotary)))
        return Output(mixed, None if past is None else past.after())

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        chunk: Chunk,
        num_past: int,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """What the operator gives for queries `[B, T, H, D]` over P + T keys; with its lse where a sink is learned."""
        settings = self.settings
        scale, head_dim = self.scale, query.shape[-1]
        blind = chunk.hidden_items(num_past)
        if rotary is not None and (blind is not None or chunk.last is not None):
            # the kernels rotate where tokens see what is before them, and all of it
            query, key = apply_rotary(query, *rotary), apply_rotary(key, *rotary)
            rotary = None
        softcap = settings.attn_logit_softcapping
        if blind is not None and softcap is None:
            query, key, value = hide_keys(query, key, value, blind, scale)
        result = window_attention(
            query,
            key,
            value,
            window=self.window_in(chunk),
            score_function=settings.score_function,
            slopes=self.slopes_on(query.device),
            score_bias=self.score_bias,
            scale=scale,
            first_visible=chunk.first_visible(num_past),
            last_visible=chunk.last_visible(num_past),
            rotary=rotary,
            softcap=softcap,
            # no capped score is low enough to hide by
            hidden=None if softcap is None else blind,
            return_lse=settings.learned_sink,
            backend=settings.attention_backend,
        )
        if blind is None:
            return result
        if isinstance(result, Tensor):
            return result[..., :head_dim]
        return result[0][..., :head_dim], result[1]

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
        angles = None if self.rotary is None else chunk.step_angles(self.rotary, hidden.dtype)
        if angles is not None and query.is_cuda:
            # the kernel rotates
            return self.o_proj(self.attend_step(query, key, value, past, half_angles(*angles)))
        if angles is not None:
            query, key = rotate_paired(query, *angles), rotate_paired(key, *angles)
        return self.o_proj(self.attend_step(query, key, value, past))

    def attend_step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        past: InPlace,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attend with one token per row, `[B, 1, heads, D]`; returns the heads' output `[B, 1, H * D]`.

        `rotary` is cosine and sine, `[B, 1, D / 2]`; None where query and key are rotated already.
        """
        settings, key_ring = self.settings, past.kept["key"]
        if key.dtype != key_ring.dtype:
            # under autocast
            query, key, value = (x.to(key_ring.dtype) for x in (query, key, value))
        return self.heads_output(
            window_attention_step(
                query,
                key,
                value,
                key_ring,
                past.kept["value"],
                past.slot,
                past.position,
                score_function=settings.score_function,
                slopes=self.slopes_on(query.device),
                score_bias=self.score_bias,
                scale=self.scale,
                rotary=rotary,
                softcap=settings.attn_logit_softcapping,
                return_lse=settings.learned_sink,
                backend=settings.attention_backend,
            )
        )

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query `[B, T, H, D]`, key and value `[B, T, K, D]`, normed but not rotated."""
        batch, num_tokens, _ = hidden.shape
        queries = batch, num_tokens, self.num_heads, self.settings.head_dim
        keys = batch, num_tokens, self.num_kv_heads, self.settings.head_dim
        query, key = self.q_proj(hidden), self.k_proj(hidden)
        value = self.v_proj(hidden).view(keys)
        if self.norms_heads:
            query, key = query.view(queries), key.view(keys)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        return query.view(queries), key.view(keys), value

    def heads_output(self, result: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """From the operator's `[B, T, H, D]`, with its lse where a sink is learned, to `o_proj`'s `[B, T, H * D]`."""
        if self.sink is not None:
            output, lse = result
            # cut by tensor parallelism, it is this process's part of a whole
            sink: Tensor = self.sink.to_local() if hasattr(self.sink, "to_local") else self.sink  # type: ignore[operator]
            # softmax with one more key, of score `sink` and value zero
            share = torch.sigmoid(lse - sink.to(lse.dtype))
            output = output * share.to(output.dtype).unsqueeze(-1)
        else:
            assert isinstance(result, Tensor)
            output = result
        if self.output_norm is not None:
            output = self.output_norm(output)
        return output.flatten(2)

    def slopes_on(self, device: torch.device) -> Tensor | None:
        """One slope per query head, `[H]`, or None where there are none."""
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
        return 2 * num_tokens * matrices + attention_flops(
            settings.num_attention_heads, settings.head_dim, num_tokens, settings.sliding_window, num_past
        )

    def reach(self) -> int | None:
        """The window."""
        return self.settings.sliding_window

    def extra_repr(self) -> str:
        """The settings that are not visible in the submodules."""
        shown = self.settings
        return f"window={shown.sliding_window}, score_function={shown.score_function}, slopes={shown.slopes}"
