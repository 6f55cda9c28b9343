"""What may be set of a layer of the kind `perceiver`, and what of it cannot be."""

import math
from dataclasses import dataclass
from typing import Any

from swat_lm.layers.attention_settings import INVERSE_WINDOW
from swat_lm.layers.ecp_settings import ROTARY_LAYERS, check_sizes, check_words
from swat_lm.ops.checks import BACKENDS

HISTORIES = ("drop", "whole", "segments", "compress")


@dataclass(frozen=True, kw_only=True)
class PerceiverSettings:
    """What may be set of a Perceiver's layer (arXiv 2202.07765, 2412.06106); in brackets the papers' letters."""

    latents: int = 1024
    """Last tokens of a row (l), which see all before them and are alone trained."""
    history: str = "drop"
    """What becomes of the tokens before them. "drop": they are seen and handed on no more (Perceiver AR, and the last
    layer of all). They see each other in both directions: as a "whole" (V1), within "segments" (V2), or as a whole and
    "compress": are handed on as fewer (V3)."""
    segment: int | None = None
    """Tokens of a segment of the history (s), from the row's start; of "segments" alone."""
    length: int | None = None
    """Tokens of every row (n); of "compress" alone, which learns a map along time."""
    compressed: int | None = None
    """What the history is compressed to (p); of "compress" alone. None: a quarter of the length."""
    tied: bool = True
    """One projection serves as keys and values, and rotary turns both."""
    kv_norm: bool = True
    """LayerNorm over each head of what serves as keys and values, before rotary."""
    rotary_layers: str = "first"
    """Rotary in the model's "first" layer alone, or in "all"."""
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    head_dim: int = 64
    intermediate_size: int = 2816
    score_function: str = "softmax"
    """The paper's; the configuration's field of the same name does not change it, an entry of the plan does."""
    score_bias: float | str = 0.0
    """Added to products: a number, since there is no window."""
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
        check_words(self, history=HISTORIES, rotary_layers=ROTARY_LAYERS, attention_backend=BACKENDS)
        if self.latents < 1:
            raise ValueError(f"latents: expected at least 1 token, got {self.latents}")
        self._check_segments()
        self._check_compression()
        if self.score_bias == INVERSE_WINDOW:
            raise ValueError(
                f"score_bias: latents see all before them, so {INVERSE_WINDOW!r} has no meaning; give a number"
            )
        self.bias()

    def _check_segments(self) -> None:
        if self.history != "segments":
            if self.segment is not None:
                raise ValueError(f"segment: only history='segments' has any, and it is {self.history!r}; leave it out")
        elif self.segment is None or self.segment < 1:
            raise ValueError(f"segment: history='segments' needs the tokens of one, at least 1, got {self.segment}")

    def _check_compression(self) -> None:
        if self.history != "compress":
            for name in ("length", "compressed"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}: only history='compress' has one, and it is {self.history!r}; leave it out"
                    )
            return
        if self.length is None:
            raise ValueError("length: history='compress' learns a map along time, so give the tokens of every row")
        if self.length <= self.latents + 1:
            raise ValueError(
                f"latents: {self.latents} of rows of {self.length} tokens leave no history to compress; take fewer "
                "latents, or longer rows"
            )
        if not 1 <= self.num_compressed < self.num_history:
            raise ValueError(
                f"compressed: expected at least 1 and fewer than the {self.num_history} tokens of the history, got "
                f"{self.num_compressed}"
            )

    @property
    def num_history(self) -> int:
        """h, where it is compressed."""
        assert self.length is not None
        return self.length - self.latents

    @property
    def num_compressed(self) -> int:
        """p, where the history is compressed."""
        assert self.length is not None
        return self.length // 4 if self.compressed is None else self.compressed

    def bias(self) -> float:
        """The number that is added to every product. Raises ValueError where there is none."""
        if isinstance(self.score_bias, str) or not math.isfinite(self.score_bias):
            raise ValueError(f"score_bias: expected a finite number, got {self.score_bias!r}")
        return float(self.score_bias)
