"""What may be set of every kind of attention in Llama's layer: its heads, how scores weigh, and the feed-forward."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from swat_lm.layers.norm import NORMS
from swat_lm.layers.pre_norm import ACTIVATIONS, FEED_FORWARDS, NORM_PLACEMENTS

INVERSE_WINDOW = "-log(window)"
WORDS = {
    "score_function": ("sigmoid", "softmax"),
    "norm": tuple(NORMS),
    "norm_placement": NORM_PLACEMENTS,
    "feed_forward": FEED_FORWARDS,
    "hidden_act": tuple(ACTIVATIONS),
}


@dataclass(frozen=True, kw_only=True)
class HeadsSettings(ABC):
    """Settings that such kinds share; their own stand beside these."""

    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    head_dim: int = 64
    intermediate_size: int = 2816
    score_function: str = "softmax"
    """A paper's own is changed by an entry of the plan alone, not by the configuration's field of the same name."""
    score_bias: float | str = 0.0
    """Added to products; "-log(window)" stands for the logarithm of all that may be seen, where that has a bound."""
    use_rotary: bool = True
    rope_theta: float | None = None
    """Rotary base; None: that of `rope_parameters`."""
    rope_parameters: dict[str, Any] | None = None
    mlp_bias: bool = False
    residual_multiplier: float = 1.0
    norm: str = "rms"
    norm_placement: str = "pre"
    feed_forward: str = "gated"
    hidden_act: str = "silu"

    def __post_init__(self) -> None:
        """Hold every setting to its range. Raises ValueError, which begins with the setting's name."""
        for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            raise ValueError(
                f"num_key_value_heads: expected a divisor of num_attention_heads ({heads}), got {kv_heads}"
            )
        self.check_words(WORDS)
        if not 0 < self.residual_multiplier < math.inf:
            raise ValueError(f"residual_multiplier: expected a positive number, got {self.residual_multiplier}")
        if self.use_rotary and self.head_dim % 2:
            raise ValueError(f"head_dim: rotary needs an even head size, got {self.head_dim}; or set use_rotary=False")
        self.check_own()
        self.bias()

    @abstractmethod
    def check_own(self) -> None:
        """Hold the kind's own settings to their ranges, as above."""

    @property
    @abstractmethod
    def most_seen(self) -> int | None:
        """Keys that a token sees at most; None: all before it."""

    def check_words(self, known: dict[str, tuple[str, ...]]) -> None:
        """Raise ValueError for a setting, by name, that is none of the words it may be."""
        for name, words in known.items():
            if getattr(self, name) not in words:
                raise ValueError(f"{name}: expected {' or '.join(map(repr, words))}, got {getattr(self, name)!r}")

    def bias(self) -> float:
        """The number that is added to every product. Raises ValueError where there is none."""
        bias = self.score_bias
        if isinstance(bias, str):
            if bias != INVERSE_WINDOW:
                raise ValueError(f"score_bias: expected a number or {INVERSE_WINDOW!r}, got {bias!r}")
            if self.most_seen is None:
                raise ValueError(
                    f"score_bias: some tokens see all before them, so {INVERSE_WINDOW!r} has no meaning; give a number"
                )
            return -math.log(self.most_seen)
        if not math.isfinite(bias):
            raise ValueError(f"score_bias: expected a finite number, got {bias}")
        return float(bias)
