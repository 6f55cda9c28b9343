"""What may be set of a layer of the kind `ecp`, and what of it cannot be."""

from dataclasses import dataclass

from swat_lm.layers.attention_settings import LARGEST_WINDOW
from swat_lm.layers.heads_settings import HeadsSettings
from swat_lm.ops.checks import BACKENDS

ROTARY_LAYERS = ("first", "all")
# of segments; a handful, since all of them are attended to
MOST_LOOKED_BACK = 2**10


@dataclass(frozen=True, kw_only=True)
class EcpSettings(HeadsSettings):
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
    """Rotary in the "first" layer of this kind alone, or in "all"."""
    attention_backend: str = "auto"

    def check_own(self) -> None:
        """Hold the kind's own settings to their ranges. Raises ValueError, which begins with the setting's name."""
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
        self.check_words({"rotary_layers": ROTARY_LAYERS, "attention_backend": BACKENDS})

    @property
    def window(self) -> int:
        """Tokens that the last one of a segment sees, itself included: 2 m unless `look_back` says otherwise."""
        return (self.look_back + 1) * self.segment

    @property
    def sliding_window(self) -> int:
        """The same under the name by which caches of transformers ask for it."""
        return self.window

    @property
    def most_seen(self) -> int:
        """The same."""
        return self.window
