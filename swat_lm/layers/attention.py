"""The kind `attention`: Llama's layer around windowed attention, with its settings.

Parameter names and shapes are Llama's; what attends is in window_attention.py.
"""

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from swat_lm.layers.base import Shared
from swat_lm.layers.lean import AttentionPlan, plan_attention
from swat_lm.layers.pre_norm import FeedForward, PreNorm, start
from swat_lm.layers.window_attention import AttentionSettings, WindowAttention
from swat_lm.ops.checks import BACKENDS
from swat_lm.ops.slopes import slopes_for

INVERSE_WINDOW = "-log(window)"
# kernels count positions in 32 bits, and differences of two of them must fit as well
LARGEST_WINDOW = 2**30


@dataclass(frozen=True, kw_only=True)
class AttentionLayerSettings:
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
    output_norm: bool = False
    learned_sink: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
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
        self._check_bias()
        if self.learned_sink and self.score_function != "softmax":
            raise ValueError("learned_sink: only softmax has a normaliser that a sink can join; use softmax or drop it")
        if self.use_rotary and self.head_dim % 2:
            raise ValueError(f"head_dim: rotary needs an even head size, got {self.head_dim}; or set use_rotary=False")
        if self.attention_backend not in BACKENDS:
            raise ValueError(f"attention_backend: expected {', '.join(BACKENDS)}, got {self.attention_backend!r}")

    def _check_bias(self) -> None:
        bias = self.score_bias
        if isinstance(bias, str):
            if bias != INVERSE_WINDOW:
                raise ValueError(f"score_bias: expected a number or {INVERSE_WINDOW!r}, got {bias!r}")
            if self.sliding_window is None:
                raise ValueError(
                    f"score_bias: the layer has no window, so {INVERSE_WINDOW!r} has no meaning; "
                    "set score_bias=0 or another number, or a list with one entry per layer"
                )
        elif not math.isfinite(bias):
            raise ValueError(f"score_bias: expected a finite number, got {bias}")

    def bias(self) -> float:
        """The number that is added to every score."""
        if isinstance(self.score_bias, str):
            assert self.sliding_window is not None
            return -math.log(self.sliding_window)
        return float(self.score_bias)

    def attention(self, width: int, norm_eps: float = 1e-6) -> "AttentionSettings":
        """What defines the attention in a model of this width."""
        return AttentionSettings(
            hidden_size=width,
            num_heads=self.num_attention_heads,
            num_kv_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            window=self.sliding_window,
            score_function=self.score_function,
            slopes=self.slopes,
            slope_schedule=self.slope_schedule,
            score_bias=self.bias(),
            qk_norm=self.qk_norm,
            output_norm=self.output_norm,
            learned_sink=self.learned_sink,
            bias=self.attention_bias,
            norm_eps=norm_eps,
            backend=self.attention_backend,
        )


class AttentionLayer(PreNorm):
    """Windowed attention in Llama's layer, the kind that SWAT (arXiv 2502.18845) is made of."""

    name = "attention"
    Settings = AttentionLayerSettings

    self_attn: WindowAttention

    def __init__(self, settings: AttentionLayerSettings, width: int, index: int, shared: Shared) -> None:
        rotary = None
        if settings.use_rotary and shared.rotary is not None:
            rotary = shared.rotary(settings.head_dim, settings.rope_parameters or {})
        mixer = WindowAttention(settings.attention(width, shared.norm_eps), rotary, index)
        feed_forward = FeedForward(width, settings.intermediate_size, settings.mlp_bias)
        super().__init__(mixer, feed_forward, width, shared.norm_eps)

    @classmethod
    def build(cls, settings: AttentionLayerSettings, width: int, index: int, shared: Shared) -> "AttentionLayer":
        """Layer number `index` of a model of this width."""
        return cls(settings, width, index, shared)

    @classmethod
    def settle(cls, values: dict[str, Any], given: frozenset[str], width: int) -> dict[str, Any]:
        """Sizes that follow from the number of heads, and the base of this layer's rotary."""
        heads = values["num_attention_heads"]
        if "num_attention_heads" in given:
            # the configuration's own follow from its number of heads
            derived = {"num_key_value_heads", "head_dim"} - given
            values = values | dict.fromkeys(derived)
        if values["num_key_value_heads"] is None:
            values["num_key_value_heads"] = heads
        if values["head_dim"] is None:
            if width % heads:
                raise ValueError(
                    f"num_attention_heads: {heads} heads do not divide hidden_size {width}; "
                    "change one of them or give head_dim"
                )
            values["head_dim"] = width // heads
        parameters = values["rope_parameters"] or {}
        # Hugging Face's form for models whose layers rotate differently with a window and without
        parameters = parameters.get(layer_type(values["sliding_window"]), parameters)
        if values["rope_theta"] is not None:
            parameters = {**parameters, "rope_theta": values["rope_theta"]}
        return {**values, "rope_theta": None, "rope_parameters": parameters}

    @staticmethod
    def layer_type(settings: AttentionLayerSettings) -> str:
        """Hugging Face's name, which chooses its stock cache."""
        return layer_type(settings.sliding_window)

    def init_weights(self, shared: Shared) -> None:
        """Sinks begin at a score of zero."""
        super().init_weights(shared)
        sink = self.self_attn.sink
        if isinstance(sink, nn.Parameter):
            start(sink, lambda: nn.init.zeros_(sink))

    def decoding_plan(self) -> AttentionPlan | None:
        """The joined matrices of the layer; None where it has what they do not cover."""
        return plan_attention(self)


def layer_type(window: int | None) -> str:
    """Hugging Face's name for attention with this window."""
    return "full_attention" if window is None else "sliding_attention"
