"""Windowed attention as a mixer: projections, rotary, norms and sinks around `swat_lm.ops`, which does the attention.

Parameter names and shapes are Llama's. Equations: SWAT (arXiv 2502.18845), Eq. 5; docs/mathematics.md.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swat_lm.mixers.norm import RMSNorm
from swat_lm.mixers.protocol import Memory, Mixer, RingMemory, StateTensor, Visible
from swat_lm.ops import window_attention, window_attention_step
from swat_lm.ops.rotary import apply_rotary
from swat_lm.ops.slopes import slopes_for


@dataclass(frozen=True)
class AttentionSettings:
    """Everything that defines the attention of one layer."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    score_function: str = "sigmoid"
    slopes: str = "balanced"
    slope_schedule: str = "swat"
    score_bias: float = 0.0
    qk_norm: bool = False
    output_norm: bool = False
    learned_sink: bool = False
    bias: bool = False
    norm_eps: float = 1e-6
    backend: str = "auto"


class WindowAttention(Mixer):
    """Attention over the last `window` tokens (all of them when the window is None)."""

    name = "attention"

    def __init__(self, settings: AttentionSettings) -> None:
        super().__init__()
        self.settings = settings
        query_width = settings.num_heads * settings.head_dim
        key_width = settings.num_kv_heads * settings.head_dim
        self.q_proj = nn.Linear(settings.hidden_size, query_width, bias=settings.bias)
        self.k_proj = nn.Linear(settings.hidden_size, key_width, bias=settings.bias)
        self.v_proj = nn.Linear(settings.hidden_size, key_width, bias=settings.bias)
        self.o_proj = nn.Linear(query_width, settings.hidden_size, bias=settings.bias)
        # one weight per head channel, shared by the heads
        self.q_norm = RMSNorm(settings.head_dim, settings.norm_eps) if settings.qk_norm else None
        self.k_norm = RMSNorm(settings.head_dim, settings.norm_eps) if settings.qk_norm else None
        self.output_norm = RMSNorm(settings.head_dim, settings.norm_eps) if settings.output_norm else None
        if settings.learned_sink:
            self.sink = nn.Parameter(torch.zeros(settings.num_heads))
        else:
            self.register_parameter("sink", None)
        # not a buffer: `.to(bfloat16)` must not round the slopes, nor loading leave them uninitialised
        with torch.device("cpu"):
            self._slopes = slopes_for(settings.num_heads, settings.slopes, settings.slope_schedule)

    @classmethod
    def from_config(cls, config: Any, layer_index: int) -> "WindowAttention":
        """Build the attention of one layer from a SwatConfig."""
        return cls(config.attention_settings(layer_index))

    @staticmethod
    def layer_type(window: int | None) -> str:
        """Hugging Face's name for a layer with this window."""
        return "full_attention" if window is None else "sliding_attention"

    def state_spec(self) -> tuple[StateTensor, ...]:
        """Rotated keys and values: `window` places, since a new key is written before it is attended to."""
        shape = (self.settings.window, self.settings.num_kv_heads, self.settings.head_dim)
        return StateTensor("key", shape), StateTensor("value", shape)

    def forward(
        self, hidden: Tensor, angles: tuple[Tensor, Tensor] | None, visible: Visible, memory: Memory | None = None
    ) -> tuple[Tensor, Memory | None]:
        """Mix a chunk `[B, T, M]`; the memory, if any, is extended by the chunk's keys and values."""
        settings = self.settings
        query, key, value = self._project(hidden)
        rotary = angles
        if angles is not None and memory is not None:
            # what a memory keeps is rotated; without one the kernels rotate on the way
            query, key = apply_rotary(query, *angles), apply_rotary(key, *angles)
            rotary = None
        if isinstance(memory, RingMemory) and memory.serves_step(hidden):
            return self.o_proj(self.attend_step(query, key, value, memory)), memory
        num_queries = query.shape[1]
        num_past, last_visible = 0, None
        if memory is not None:
            key, value, num_past = memory.append(key, value)
            if key.shape[1] != num_past + num_queries:
                # a cache of fixed size: places after the newest key are not filled yet
                own = torch.arange(num_past, num_past + num_queries, dtype=torch.int32, device=query.device)
                last_visible = own.expand(query.shape[0], -1)
        result = window_attention(
            query,
            key,
            value,
            window=settings.window,
            score_function=settings.score_function,
            slopes=self.slopes_on(query.device),
            score_bias=settings.score_bias,
            first_visible=visible.first_visible(num_past),
            last_visible=last_visible,
            rotary=rotary,
            return_lse=settings.learned_sink,
            backend=settings.backend,
        )
        return self.o_proj(self.heads_output(result)), None if memory is None else memory.after(key, value)

    def step(self, hidden: Tensor, angles: tuple[Tensor, Tensor] | None, memory: RingMemory) -> Tensor:
        """Mix one token per sequence, `[B, 1, M]`, in place over the rings."""
        query, key, value = self._project(hidden)
        if angles is not None and query.is_cuda:
            # the kernel rotates
            return self.o_proj(self.attend_step(query, key, value, memory, half_angles(*angles)))
        if angles is not None:
            query, key = rotate_paired(query, *angles), rotate_paired(key, *angles)
        return self.o_proj(self.attend_step(query, key, value, memory))

    def attend_step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        memory: RingMemory,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attend with one token per sequence, `[B, 1, heads, D]`; returns the heads' output `[B, 1, H * D]`.

        `rotary` is cosine and sine, `[B, 1, D / 2]`; None where query and key are rotated already.
        """
        settings = self.settings
        if key.dtype != memory.key_ring.dtype:
            # under autocast
            query, key, value = (x.to(memory.key_ring.dtype) for x in (query, key, value))
        result = window_attention_step(
            query,
            key,
            value,
            memory.key_ring,
            memory.value_ring,
            memory.slot,
            memory.position,
            score_function=settings.score_function,
            slopes=self.slopes_on(query.device),
            score_bias=settings.score_bias,
            rotary=rotary,
            return_lse=settings.learned_sink,
            backend=settings.backend,
        )
        return self.heads_output(result)

    def _project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        settings = self.settings
        batch, num_tokens, _ = hidden.shape
        query = self.q_proj(hidden).view(batch, num_tokens, settings.num_heads, settings.head_dim)
        key = self.k_proj(hidden).view(batch, num_tokens, settings.num_kv_heads, settings.head_dim)
        value = self.v_proj(hidden).view(batch, num_tokens, settings.num_kv_heads, settings.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        return query, key, value

    def heads_output(self, result: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """From the operator's `[B, T, H, D]`, with its lse where a sink is learned, to `o_proj`'s `[B, T, H * D]`."""
        if self.sink is not None:
            output, lse = result
            # softmax with one more key, of score `sink` and value zero
            share = torch.sigmoid(lse - self.sink.to(lse.dtype))
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

    def extra_repr(self) -> str:
        """The settings that are not visible in the submodules."""
        shown = self.settings
        return f"window={shown.window}, score_function={shown.score_function}, slopes={shown.slopes}"


def rotate_paired(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """The rotation of `apply_rotary` by angles `[B, 1, 1, D]` of `LayerRotary.step_angles`.

    A roll by half a head exchanges the members of every pair.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), signed_sin).to(x.dtype)


def half_angles(cos: Tensor, signed_sin: Tensor) -> tuple[Tensor, Tensor]:
    """The angles of `LayerRotary.step_angles` as the operator takes them: `[B, 1, 1, D]` to `[B, 1, D / 2]`, views."""
    half = cos.shape[-1] // 2
    return cos[:, :, 0, :half], signed_sin[:, :, 0, half:]
