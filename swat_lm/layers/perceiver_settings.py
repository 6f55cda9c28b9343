"""What may be set of a layer of the kind `perceiver`, and what of it cannot be."""

from dataclasses import dataclass

from swat_lm.layers.ecp_settings import ROTARY_LAYERS
from swat_lm.layers.heads_settings import HeadsSettings
from swat_lm.ops.checks import BACKENDS

HISTORIES = ("drop", "whole", "segments", "compress")


@dataclass(frozen=True, kw_only=True)
class PerceiverSettings(HeadsSettings):
    """What may be set of a Perceiver's layer (arXiv 2202.07765, 2412.06106); in brackets the papers' letters."""

    latents: int = 1024
    """Last tokens of a row (l), which see all before them and are alone trained."""
    history: str = "drop"
    """What becomes of the tokens before them. "drop": they are seen and handed on no more (Perceiver AR, and the last
    layer of all). They see each other in both directions: as a "whole" (V1), within "segments" (V2), or as a whole and
    "compress": are handed on as fewer (V3)."""
    segment: int | None = None
    """Tokens of a segment of the history (s), from the document's start; of "segments" alone."""
    length: int | None = None
    """Tokens of every row (n); of "compress" alone, which learns a map along time."""
    compressed: int | None = None
    """What the history is compressed to (p); of "compress" alone. None: a quarter of the length."""
    tied: bool = True
    """One projection serves as keys and values, and rotary turns both."""
    kv_norm: bool = True
    """LayerNorm over each head of what serves as keys and values, before rotary."""
    rotary_layers: str = "first"
    """Rotary in the "first" layer of this kind alone, or in "all"."""
    attention_backend: str = "auto"

    def check_own(self) -> None:
        """Hold the kind's own settings to their ranges. Raises ValueError, which begins with the setting's name."""
        self.check_words({"history": HISTORIES, "rotary_layers": ROTARY_LAYERS, "attention_backend": BACKENDS})
        if self.latents < 1:
            raise ValueError(f"latents: expected at least 1 token, got {self.latents}")
        self._check_segments()
        self._check_compression()

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

    @property
    def most_seen(self) -> None:
        """All before a latent."""
        return None
