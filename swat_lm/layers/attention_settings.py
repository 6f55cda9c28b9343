"""What may be set of a layer of windowed attention, and what of it cannot be."""

import math
from dataclasses import dataclass, field

from torch import Tensor

from swat_lm.layers.first_tokens import SINK_POSITIONS
from swat_lm.layers.heads_settings import INVERSE_WINDOW, HeadsSettings
from swat_lm.layers.relative_bias import RELATIVE_BIASES
from swat_lm.ops.checks import BACKENDS
from swat_lm.ops.slopes import DEFAULT_SPAN, checked_span, slopes_for, split_heads

QK_NORMS = ("head", "layer")
# kernels count positions in 32 bits, and differences of two of them must fit as well
LARGEST_WINDOW = 2**30
# a handful is what models lean on
MOST_SINKS = 2**16


@dataclass(frozen=True, kw_only=True)
class AttentionSettings(HeadsSettings):
    """What may be set of a layer of windowed attention; the fields of SwatConfig of the same names explain them."""

    sliding_window: int | None = 1024
    score_function: str = "sigmoid"
    slopes: str = "balanced"
    slope_schedule: str = "swat"
    slope_span: float | list[float] = field(default_factory=lambda: list(DEFAULT_SPAN))
    """Of the schedule "window": what the steepest slope, or the first and the last, come to over the window."""
    positive_slope_span: float | list[float] | None = None
    """The same of the heads whose slopes are positive; None: as `slope_span`."""
    learned_slopes: bool = False
    """Slopes are parameters that start so."""
    learned_score_bias: bool = False
    """The bias is a parameter per head that starts so."""
    qk_norm: bool = False
    qk_norm_over: str = "head"
    """"head": each head by itself, with one weight for all of them; "layer": all heads together."""
    output_norm: bool = False
    output_gate: bool = False
    """Each head's output times a sigmoid of the layer's normed input (arXiv 2505.06708)."""
    layer_scale: float | None = None
    """Start of a weight per channel on what attention and feed-forward give (arXiv 2103.17239); None: none."""
    learned_sink: bool = False
    sinks: int = 0
    """First tokens of a document that stay visible when they have left the window."""
    sink_positions: str = "cache"
    """Where rotary and slopes see them: "cache", right before the window; "absolute", where they stood."""
    relative_bias: str = "none"
    """T5's bias by distance: "own" of the layer, or "shared" by all layers that say so."""
    bidirectional: bool = False
    """Whether tokens see as many after them as before them; for encoders, which nothing streams."""
    attention_bias: bool = False
    output_bias: bool | None = None
    """Of `o_proj`; None: as `attention_bias` says."""
    attention_multiplier: float | None = None
    attn_logit_softcapping: float | None = None
    attention_backend: str = "auto"

    def check_own(self) -> None:
        """Hold the kind's own settings to their ranges. Raises ValueError, which begins with the setting's name."""
        window = self.sliding_window
        if window is not None and not 1 <= window <= LARGEST_WINDOW:
            limit = f"at most {LARGEST_WINDOW}" if window > LARGEST_WINDOW else "at least 1 (a query counts itself)"
            raise ValueError(f"sliding_window: expected {limit} or None for full attention, got {window}")
        self._check_sinks()
        checked_span(self.slope_span)
        self._check_positive_span()
        self.first_slopes()
        if self.learned_slopes and self.slopes == "none":
            raise ValueError("learned_slopes: slopes is 'none', so there are none to learn; say with which they start")
        if self.learned_score_bias and self.score_function == "softmax" and not self.learned_sink:
            raise ValueError(
                "learned_score_bias: softmax is the same whatever is added to all scores of a row, so there is nothing "
                "to learn; use sigmoid, or drop it"
            )
        if self.learned_sink and self.score_function != "softmax":
            raise ValueError("learned_sink: only softmax has a normaliser that a sink can join; use softmax or drop it")
        self.check_words({"qk_norm_over": QK_NORMS, "sink_positions": SINK_POSITIONS, "relative_bias": RELATIVE_BIASES})
        for name in ("attention_multiplier", "attn_logit_softcapping", "layer_scale"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        if self.attention_backend not in BACKENDS:
            raise ValueError(f"attention_backend: expected {', '.join(BACKENDS)}, got {self.attention_backend!r}")

        if self.bidirectional and (self.slopes != "none" or self.sinks or self.sliding_window is None):
            raise ValueError(
                "bidirectional: slopes and first tokens count back from the query, and a window says how far it looks "
                "both ways; give the layer a sliding_window, slopes='none' and no sinks, or set bidirectional to false"
            )
        if self.relative_bias != "none" and (self.sliding_window is None or self.sinks):
            raise ValueError(
                "relative_bias: holds a number for every distance in a window; give the layer a sliding_window and no "
                "sinks, or relative_bias: none"
            )
        self._check_backend()

    def _check_positive_span(self) -> None:
        if self.positive_slope_span is None:
            return
        checked_span(self.positive_slope_span, "positive_slope_span")
        positive = 0 if self.slopes == "none" else split_heads(self.num_attention_heads, self.slopes)[1]
        if self.slope_schedule != "window" or not positive:
            raise ValueError(
                f"positive_slope_span: {self.positive_slope_span} is of the positive heads of slope_schedule='window'; "
                f"the layer has slope_schedule={self.slope_schedule!r} and slopes={self.slopes!r}; leave it out"
            )

    def _check_backend(self) -> None:
        if self.attention_backend != "triton":
            return
        for name, nothing in (("relative_bias", "none"), ("attn_logit_softcapping", None)):
            if getattr(self, name) != nothing:
                raise ValueError(
                    f"attention_backend: the kernels of 'triton' have no {name}, which is {getattr(self, name)!r}; "
                    f"use 'auto' or 'blocked', or set {name} to {'none' if nothing else 'null'}"
                )

    def _check_sinks(self) -> None:
        if self.sinks < 0:
            raise ValueError(f"sinks: expected a number of first tokens to keep, or 0 for none, got {self.sinks}")
        if self.sinks > MOST_SINKS:
            raise ValueError(
                f"sinks: expected at most {MOST_SINKS:,} first tokens, which every layer keeps of every stream, got "
                f"{self.sinks}; a wider sliding_window keeps more of a text"
            )
        if self.sinks and self.sliding_window is None:
            raise ValueError(
                f"sinks: {self.sinks} first tokens are kept beside a window, and the layer has none, so it sees all; "
                "give it a sliding_window, or set sinks=0"
            )
        if self.sinks and self.sink_positions == "absolute" and self.slopes != "none":
            raise ValueError(
                "sink_positions: 'absolute' leaves the first tokens where they stood, and a slope has no bound so far "
                "away; use 'cache', which puts them right before the window, or slopes='none'"
            )

    def first_slopes(self) -> Tensor | None:
        """One slope per query head, float32 `[H]`, with which learned ones start; None: none. Raises ValueError."""
        return slopes_for(
            self.num_attention_heads, self.slopes, self.slope_schedule, self.sliding_window, self.slope_span,
            self.positive_slope_span,
        )  # fmt: skip

    @property
    def most_seen(self) -> int | None:
        """The window."""
        return self.sliding_window

    def bias(self) -> float:
        """The number that is added to every score. Raises ValueError where there is none."""
        if self.score_bias == INVERSE_WINDOW and self.sliding_window is None:
            raise ValueError(
                f"score_bias: the layer has no window, so {INVERSE_WINDOW!r} has no meaning; "
                "set score_bias=0 or another number, or a list with one entry per layer"
            )
        return super().bias()
