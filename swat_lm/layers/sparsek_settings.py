"""What may be set of a layer of the kind `sparsek`, and what of it cannot be."""

import math
from dataclasses import dataclass

from swat_lm.layers.heads_settings import HeadsSettings
from swat_lm.ops.selected_attention import MASKINGS

SELECTIONS = ("learned", "recent", "random")
# positions of a stream stay whole numbers in float64 beside such a slope
MOST = 2**16


@dataclass(frozen=True, kw_only=True)
class SparsekSettings(HeadsSettings):
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

    def check_own(self) -> None:
        """Hold the kind's own settings to their ranges. Raises ValueError, which begins with the setting's name."""
        self._check_selection()
        self.check_words({"masking": MASKINGS, "selection": SELECTIONS})
        if not 0 < self.score_std < math.inf:
            raise ValueError(f"score_std: expected a positive number, got {self.score_std}")
        if not 0 <= self.position_slope < math.inf:
            raise ValueError(f"position_slope: expected a number of at least 0, got {self.position_slope}")

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
        if most is not None and not self.k:
            raise ValueError(f"candidates: nothing is selected (k is 0), so there are none to choose from; got {most}")
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

    @property
    def most_seen(self) -> int:
        """k + W."""
        return self.k + self.window
