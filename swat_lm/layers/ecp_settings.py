"""What may be set of a layer of the kind `ecp`, and what of it cannot be."""

import math
from dataclasses import dataclass
from typing import Any

from swat_lm.layers.attention_settings import INVERSE_WINDOW, LARGEST_WINDOW
from swat_lm.layers.norm import NORMS
from swat_lm.layers.pre_norm import ACTIVATIONS, FEED_FORWARDS, NORM_PLACEMENTS
from swat_lm.ops.checks import BACKENDS

ROTARY_LAYERS = ("first", "all")
# of segments; a handful, since all of them are attended to
MOST_LOOKED_BACK = 2**10


@dataclass(frozen=True, kw_only=True)
class EcpSettings:
    """What may be set of an ECP layer (arXiv 2412.06106); in brackets the paper's letters."""

    segment: int = 256
    """Tokens of a segment (m), counted from the document's start."""
    look_back: int = 1
    """Segments before its own that a token sees. 0: none, the control of disjoint segments."""
    tied: bool = True
    """One projection serves as keys and values, and rotary turns both."""
    first_projection: bool = True
    """Tokens of a document's first segment have an output projection of their own."""
    rotary_layers: str = "first"
    """Rotary in the model's "first" layer alone, or in "all"."""
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    head_dim: int = 64
    intermediate_size: int = 2816
    score_function: str = "softmax"
    """The paper's; the configuration's field of the same name does not change it, an entry of the plan does."""
    score_bias: float | str = 0.0
    """Added to products; "-log(window)" stands for the logarithm of all that may be seen."""
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
    attention_backend: str = "auto"

    def __post_init__(self) -> None:
        """Hold every setting to its range. Raises ValueError, which begins with the setting's name."""
        check_sizes(self)
        if self.segment < 1:
            raise ValueError(f"segment: expected at least 1 token, got {self.segment}")
        if not 0 <= self.look_back <= MOST_LOOKED_BACK:
            raise ValueError(
                f"look_back: expected 0 to {MOST_LOOKED_BACK:,} segments before a token's own, got {self.look_back}"
            )
        if self.window > LARGEST_WINDOW:
            raise ValueError(
                f"segment: {self.look_back + 1} segments of {self.segment:,} tokens are {self.window:,}, more than the "
                f"{LARGEST_WINDOW:,} that can be seen; take shorter ones"
            )
        check_words(self, rotary_layers=ROTARY_LAYERS, attention_backend=BACKENDS)
        checked_bias(self.score_bias, self.window)

    @property
    def window(self) -> int:
        """Tokens that the last one of a segment sees, itself included: 2 m unless `look_back` says otherwise."""
        return (self.look_back + 1) * self.segment

    @property
    def sliding_window(self) -> int:
        """The same under the name by which caches of transformers ask for it."""
        return self.window

    def bias(self) -> float:
        """The number that is added to every product."""
        return checked_bias(self.score_bias, self.window)


def check_sizes(settings: Any) -> None:
    """Heads, head size and feed-forward. Raises ValueError, which begins with the setting's name."""
    for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name}: expected at least 1, got {getattr(settings, name)}")
    heads, kv_heads = settings.num_attention_heads, settings.num_key_value_heads
    if heads % kv_heads:
        raise ValueError(f"num_key_value_heads: expected a divisor of num_attention_heads ({heads}), got {kv_heads}")
    if not 0 < settings.residual_multiplier < math.inf:
        raise ValueError(f"residual_multiplier: expected a positive number, got {settings.residual_multiplier}")
    if settings.use_rotary and settings.head_dim % 2:
        raise ValueError(f"head_dim: rotary needs an even head size, got {settings.head_dim}; or set use_rotary=False")


def check_words(settings: Any, **more: tuple[str, ...]) -> None:
    """Settings that are words, those of the layer around attention and more. Raises ValueError, as above."""
    words = {
        "score_function": ("sigmoid", "softmax"),
        "norm": tuple(NORMS),
        "norm_placement": NORM_PLACEMENTS,
        "feed_forward": FEED_FORWARDS,
        "hidden_act": tuple(ACTIVATIONS),
    }
    for name, known in (words | more).items():
        if getattr(settings, name) not in known:
            raise ValueError(f"{name}: expected {' or '.join(map(repr, known))}, got {getattr(settings, name)!r}")


def checked_bias(bias: float | str, window: int) -> float:
    """The number that is added to every product. Raises ValueError where there is none."""
    if isinstance(bias, str):
        if bias != INVERSE_WINDOW:
            raise ValueError(f"score_bias: expected a number or {INVERSE_WINDOW!r}, got {bias!r}")
        return -math.log(window)
    if not math.isfinite(bias):
        raise ValueError(f"score_bias: expected a finite number, got {bias}")
    return float(bias)
