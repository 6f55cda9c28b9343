"""Llama's layer around any mixer: a norm before the mixer and one before SwiGLU, each added to the residual stream.

Or with norms behind them, as OLMo 2 has them (arXiv 2501.00656), or before and behind; with LayerNorm, and a
feed-forward without a gate, as StarCoder2 has them (arXiv 2402.19173).

Parameter names and shapes are Llama's. Legend: B rows, T tokens, M width.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swat_lm.layers.base import InPlace, Layer, Output, Part, Past, Shared, StateTensor, TokenMixer
from swat_lm.layers.chunk import Chunk
from swat_lm.layers.norm import NORMS

NORM_PLACEMENTS = ("pre", "post", "both")
"""Before mixer and feed-forward, behind each before it joins the residual stream, or both."""


class Mixer(TokenMixer):
    """What such a layer has between its first norm and the residual stream."""

    o_proj: nn.Linear
    """The projection that writes to the stream."""


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}
"""Of the feed-forward's gate, or of all that it widens where it has none; by Hugging Face's names."""

FEED_FORWARDS = ("gated", "plain")


class FeedForward(nn.Module):
    """SwiGLU or GEGLU (arXiv 2002.05202): `down(activation(gate(x)) * up(x))`; plain: `down(activation(up(x)))`."""

    def __init__(
        self, width: int, intermediate_size: int, bias: bool = False, activation: str = "silu", kind: str = "gated"
    ) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.gate_proj = nn.Linear(width, intermediate_size, bias=bias) if kind == "gated" else None
        self.up_proj = nn.Linear(width, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, width, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `[B, T, M]` to `[B, T, M]`."""
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(hidden)))
        return self.down_proj(self.activation(self.gate_proj(hidden)) * self.up_proj(hidden))


class PreNorm(Layer):
    """Normed mixer and feed-forward, each added to the residual stream."""

    mixer_scale: nn.Parameter | None
    feedforward_scale: nn.Parameter | None

    def __init__(
        self,
        mixer: Mixer,
        feed_forward: FeedForward,
        width: int,
        norm_eps: float,
        residual_multiplier: float = 1.0,
        norm_placement: str = "pre",
        norm: str = "rms",
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.self_attn: Mixer = mixer
        self.mlp = feed_forward
        self.residual_multiplier = residual_multiplier
        before, behind, made = norm_placement != "post", norm_placement != "pre", NORMS[norm]
        self.input_layernorm = made(width, norm_eps) if before else None
        self.post_attention_layernorm = made(width, norm_eps) if before else None
        self.mixer_output_layernorm = made(width, norm_eps) if behind else None
        self.feedforward_output_layernorm = made(width, norm_eps) if behind else None
        self.layer_scale = layer_scale
        for name in ("mixer_scale", "feedforward_scale"):
            scale = None if layer_scale is None else nn.Parameter(torch.full((width,), float(layer_scale)))
            self.register_parameter(name, scale)

    def forward(self, hidden: Tensor, chunk: Chunk, past: Past | None = None) -> Output:
        """Process a chunk `[B, T, M]` after its past."""
        mixed, past, auxiliary = self.self_attn(self._mixer_input(hidden), chunk, past)
        return Output(self._feed(self._join_mixed(hidden, mixed)), past, auxiliary)

    def step(self, hidden: Tensor, chunk: Chunk, past: InPlace) -> Tensor:
        """Process one token per row, `[B, 1, M]`, in place over slots."""
        mixed = self.self_attn.step(self._mixer_input(hidden), chunk, past)
        return self._feed(self._join_mixed(hidden, mixed))

    def forward_packed(self, hidden: Tensor, parts: Sequence[Part]) -> Tensor:
        """Process parts of a row `[1, T, M]`: norms and feed-forward for all at once."""
        mixed = self.self_attn.forward_packed(self._mixer_input(hidden), parts)
        return self._feed(self._join_mixed(hidden, mixed))

    def _mixer_input(self, hidden: Tensor) -> Tensor:
        return hidden if self.input_layernorm is None else self.input_layernorm(hidden)

    def _join_mixed(self, hidden: Tensor, mixed: Tensor) -> Tensor:
        return self._join(hidden, mixed, self.mixer_output_layernorm, self.mixer_scale)

    def _join(self, hidden: Tensor, change: Tensor, norm: nn.Module | None, scale: Tensor | None) -> Tensor:
        """The residual stream with what the mixer or the feed-forward adds to it."""
        change = change if norm is None else norm(change)
        change = change if scale is None else change * scale
        return hidden + (change if self.residual_multiplier == 1 else change * self.residual_multiplier)

    def _feed(self, hidden: Tensor) -> Tensor:
        """The residual stream `[B, T, M]` after the feed-forward."""
        norm = self.post_attention_layernorm
        change = self.mlp(hidden if norm is None else norm(hidden))
        return self._join(hidden, change, self.feedforward_output_layernorm, self.feedforward_scale)

    def state_spec(self) -> tuple[StateTensor, ...]:
        """What the mixer keeps."""
        return self.self_attn.state_spec()

    def flops(self, num_tokens: int, num_past: int = 0) -> int:
        """Those of the mixer and of the feed-forward."""
        matrices = sum(module.weight.numel() for module in self.mlp.children() if isinstance(module, nn.Linear))
        return self.self_attn.flops(num_tokens, num_past) + 2 * num_tokens * matrices

    def reach(self) -> int | None:
        """The mixer's."""
        return self.self_attn.reach()

    def first_kept(self) -> int:
        """The mixer's."""
        return self.self_attn.first_kept()

    def refuses_past(self) -> str | None:
        """What the mixer says."""
        return self.self_attn.refuses_past()

    def refuses(self, chunk: Chunk) -> str | None:
        """What the mixer refuses."""
        return self.self_attn.refuses(chunk)

    def init_weights(self, shared: Shared) -> None:
        """Start what writes to the residual stream smaller or larger, and scales of channels, where asked to."""
        scale = shared.output_projection_init_scale
        if scale != 1:
            start_normal(self.self_attn.o_proj.weight, shared.initializer_range * scale)
            start_normal(self.mlp.down_proj.weight, shared.initializer_range * scale)
        for parameter in (self.mixer_scale, self.feedforward_scale):
            if parameter is not None and self.layer_scale is not None:
                start(parameter, partial(nn.init.constant_, parameter, float(self.layer_scale)))


def start_normal(weight: Tensor, std: float) -> None:
    """Draw a weight anew, unless it was loaded."""
    start(weight, lambda: torch.nn.init.normal_(weight, mean=0.0, std=std))


def start(parameter: Tensor, draw: Callable[[], object]) -> None:
    """Start a parameter in place, unless Hugging Face's loading has marked it as loaded."""
    if not getattr(parameter, "_is_hf_initialized", False):
        with torch.no_grad():
            draw()
