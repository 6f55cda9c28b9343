"""What may be set of a layer of the kind `sparsek`, and what of it cannot be."""

import math
from dataclasses import dataclass
from typing import Any

from swat_lm.layers.attention_settings import INVERSE_WINDOW
from swat_lm.layers.norm import NORMS
from swat_lm.layers.pre_norm import ACTIVATIONS, FEED_FORWARDS, NORM_PLACEMENTS
from swat_lm.ops.selected_attention import MASKINGS

SELECTIONS = ("learned", "recent", "random")
# positions of a stream stay whole numbers in float64 beside such a slope
MOST = 2**16


@dataclass(frozen=True, kw_only=True)
class SparsekSettings:
    """What may be set of a SPARSEK layer (arXiv 2406.16747); in brackets the paper's letters."""

    k: int = 64
    """Keys that are selected of those that have left the window."""
    sliding_window: int | None = 128
    """Tokens that are always seen, itself included (w); 0: none."""
    candidates: int | None = None
    """Scores that count for the threshold, the largest of those before (M); None: 4 k."""
    masking: str = "value"
    """What the soft mask multiplies: the "value", "both" key and value, or nothing ("straight"), with its gradient."""
    selection: str = "learned"
    """"learned" scores. Controls: the most "recent" of those that have left the window, or "random" ones."""
    position_slope: float = 1e-6
    """Added to a score for each token before it in the document, so that scores need not grow themselves (epsilon)."""
    score_std: float = 1.0
    """Of the scores at the start: much below 1 the mask is spread over more keys than are selected."""
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    head_dim: int = 64
    intermediate_size: int = 2816
    score_function: str = "softmax"
    """The paper's; the configuration's field of the same name does not change it, an entry of the plan does."""
    score_bias: float | str = 0.0
    """Added to products; "-log(window)" stands for the logarithm of all that is seen, k + w."""
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
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: expected a divisor of num_attention_heads ({self.num_attention_heads}), got "
                f"{self.num_key_value_heads}"
            )
        self._check_selection()
        for name, words in (
            ("masking", MASKINGS),
            ("selection", SELECTIONS),
            ("score_function", ("sigmoid", "softmax")),
            ("norm", tuple(NORMS)),
            ("norm_placement", NORM_PLACEMENTS),
            ("feed_forward", FEED_FORWARDS),
            ("hidden_act", ACTIVATIONS),
        ):
            if getattr(self, name) not in words:
                raise ValueError(f"{name}: expected {' or '.join(map(repr, words))}, got {getattr(self, name)!r}")
        for name in ("score_std", "residual_multiplier"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if not 0 <= self.position_slope < math.inf:
            raise ValueError(f"position_slope: expected a number of at least 0, got {self.position_slope}")
        if self.use_rotary and self.head_dim % 2:
            raise ValueError(f"head_dim: rotary needs an even head size, got {self.head_dim}; or set use_rotary=False")
        self.bias()

    def _check_selection(self) -> None:
        window = self.sliding_window
        if window is None:
            raise ValueError(
                "sliding_window: a window of all tokens leaves none to select; give the tokens that are always seen, "
                "or 0 for none"
            )
        if not 0 <= window <= MOST:
            raise ValueError(f"sliding_window: expected 0 to {MOST:,} tokens that are always seen, got {window}")
        if not 0 <= self.k <= MOST:
            raise ValueError(f"k: expected 0 to {MOST:,} selected keys, got {self.k}")
        if self.k + window < 1:
            raise ValueError("k: nothing is selected and there is no window; give k or sliding_window")
        most = self.candidates
        if most is not None and self.k and most <= self.k:
            raise ValueError(
                f"candidates: expected more than are selected (k is {self.k}), got {most}: with as many the mask is 1 "
                "everywhere and the scores have no gradient"
            )

    @property
    def window(self) -> int:
        """W."""
        assert self.sliding_window is not None
        return self.sliding_window

    @property
    def num_candidates(self) -> int:
        """M; 0 where nothing is selected."""
        if not self.k:
            return 0
        return 4 * self.k if self.candidates is None else self.candidates

    def bias(self) -> float:
        """The number that is added to every product. Raises ValueError where there is none."""
        if isinstance(self.score_bias, str):
            if self.score_bias != INVERSE_WINDOW:
                raise ValueError(f"score_bias: expected a number or {INVERSE_WINDOW!r}, got {self.score_bias!r}")
            return -math.log(self.k + self.window)
        if not math.isfinite(self.score_bias):
            raise ValueError(f"score_bias: expected a finite number, got {self.score_bias}")
        return float(self.score_bias)
