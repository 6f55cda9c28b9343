"""Where the tokens of a chunk stand and what they see: built once per pass, shared by all layers.

Legend: B rows, T tokens of the chunk, P items of a past before it, D head size.
"""

from abc import abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# beyond what any layer keeps, and far from where 32-bit indices end: a stream has no end
FARTHEST = -(2**30)


class Rotary(Protocol):
    """Frequencies of rotary position embedding that several layers may share; equal keys mean equal angles."""

    key: Hashable

    @abstractmethod
    def angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine, each `[*positions.shape, D / 2]`."""

    @abstractmethod
    def step_angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and signed sine over whole heads, each `[B, 1, 1, D]`, for one token per row."""


@dataclass
class Chunk:
    """T tokens of B rows. Places and `first` count from the chunk's first token, so a past has negative ones.

    A row may begin or end with padding: places whose `first` lies after their own. They see nothing, nobody sees them,
    and no past keeps them.
    """

    positions: Tensor
    """int64 `[B or 1, T]`, from the document's or the stream's start: what rotary sees."""
    first: Tensor | None = None
    """int32 `[B, T]`, the first place that each token may see, non-decreasing; None: all of the past."""
    last: Tensor | None = None
    """int32 `[B, T]`, the last place that each token may see, non-decreasing; beyond its own inside a prefix that is
    read in both directions. None: its own."""
    hidden: Tensor | None = None
    """bool `[B, T]`, tokens that nobody sees though they stand in the row: a hole in a mask. Distances stay as they
    are, recurrences skip them."""
    past_hidden: Tensor | None = None
    """bool `[B, P]`, the same of the last P tokens before the chunk; None: none of them."""
    windows: tuple[int | None, ...] | None = None
    """A window for every layer that has one, instead of the configured one: drawn for this step, say."""
    seed: Tensor | None = None
    """int64 `[B or 1]`: in training, what layers draw the noise of a row from, by `swat_lm.ops.noise`: a function of
    this, the layer and the token's position, so that chunks and recomputation draw the same. None: no noise."""
    key_block: int | None = None
    """Where layers are run block by block: keys that attention without a window takes at once. None: all of them."""
    batch_invariant: bool = False
    """Of a decoding step: a row must come out bit for bit the same whatever the others hold."""
    before: Tensor | int | None = None
    """Items of the row, hidden ones too, that stand before the chunk's first token: int64 `[B or 1, 1]`, or a number
    for all rows. None: as `first` or else `positions` say."""
    _made: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.positions.shape[1]

    def first_visible(self, num_past: int) -> Tensor | None:
        """Int32 `[B, T]`, `first` as an index into items of which `num_past` stand before the chunk."""
        first = self.first
        return None if first is None else self._once(("first", num_past), lambda: (first + num_past).clamp(min=0))

    def last_visible(self, num_past: int) -> Tensor | None:
        """Int32 `[B, T]`, `last` as an index into items of which `num_past` stand before the chunk."""
        last = self.last
        return None if last is None else self._once(("last", num_past), lambda: last + num_past)

    def hidden_items(self, num_past: int) -> Tensor | None:
        """Bool `[B, P + T]`: which of `num_past` kept items and of the chunk's own nobody sees; None: all are seen."""
        if self.hidden is None and self.past_hidden is None:
            return None
        return self._once(("hidden", num_past), lambda: self._hidden_items(num_past))

    def _hidden_items(self, num_past: int) -> Tensor:
        own, past = self.hidden, self.past_hidden
        if past is None:
            assert own is not None
            return F.pad(own, (num_past, 0))
        # cut where more is known than was kept
        past = F.pad(past, (num_past - past.shape[1], 0))
        return F.pad(past, (0, self.num_tokens)) if own is None else torch.cat((past, own), dim=1)

    # `functools.cached_property` has a lock before Python 3.12, at which torch.compile gives up

    @property
    def real(self) -> Tensor | None:
        """Bool `[B, T]`: tokens that are neither padding nor hidden; None: all of them."""
        return self._once("real", self._real)

    def _real(self) -> Tensor | None:
        seen = None if self.first is None else self.first <= self.places
        if self.hidden is None:
            return seen
        return ~self.hidden if seen is None else seen & ~self.hidden

    @property
    def begins(self) -> Tensor | None:
        """Bool `[B, T]`: places where a document begins, hidden or not; None: none begins in the chunk."""
        first = self.first
        return None if first is None else self._once("begins", lambda: first == self.places)

    @property
    def segments(self) -> Tensor | None:
        """Int64 `[B, T]`: 0 where a token's document began before the chunk, and one more for each that begins in it.

        None: no document begins in the chunk.
        """
        begins = self.begins
        return None if begins is None else self._once("segments", lambda: begins.cumsum(dim=1))

    @property
    def document_places(self) -> Tensor:
        """int64 `[B or 1, T]`: how many tokens of its document stand before each, hidden ones too; below 0 for padding.

        `positions` do not count hidden tokens, and a caller may choose them.
        """
        return self._once("document places", self._document_places)

    def _document_places(self) -> Tensor:
        places = self.places.long()
        if self.first is None:
            return self.positions if self.before is None else torch.atleast_2d(places + self.before)
        near = places - self.first
        # a document that began farther away than `first` can say
        return near if self.before is None else torch.where(self.first > FARTHEST, near, self.before + places)

    @property
    def places(self) -> Tensor:
        """int32 `[T]`: 0, 1, ..."""
        positions = self.positions
        return self._once(
            "places", lambda: torch.arange(positions.shape[1], dtype=torch.int32, device=positions.device)
        )

    def angles(self, rotary: Rotary, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the tokens, each `[B or 1, T, D / 2]`, for hidden states of this dtype; made once."""
        return self._once(("angles", rotary.key, dtype), lambda: rotary.angles(self.positions, dtype))

    def step_angles(self, rotary: Rotary, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The angles of one token per row, laid out over whole heads: `[B or 1, 1, 1, D]`; made once."""
        # asked for by every layer of every token: without a closure
        key = ("step", rotary.key, dtype)
        found = self._made.get(key)
        if found is None:
            found = self._made[key] = rotary.step_angles(self.positions, dtype)
        return found

    def tail(self, count: int) -> "Chunk":
        """The last `count` tokens as a chunk of their own: what a layer that shortens hands on."""
        start = self.num_tokens - count
        if not start >= 0:
            raise ValueError(f"count: the chunk has {self.num_tokens} tokens, got {count}")
        return self.part(start, self.num_tokens)

    def part(self, start: int, stop: int) -> "Chunk":
        """The tokens `start .. stop - 1` as a chunk of their own; those before it are its past."""
        own = slice(start, stop)
        hidden, past = self.hidden, self.past_hidden
        if hidden is not None:
            left = hidden[:, :start]
            past = left if past is None else torch.cat((past, left), dim=1)
        elif past is not None:
            past = F.pad(past, (0, start))
        return Chunk(
            self.positions[:, own],
            None if self.first is None else self.first[:, own] - start,
            None if self.last is None else self.last[:, own] - start,
            None if hidden is None else hidden[:, own],
            past,
            self.windows,
            self.seed,
            before=None if self.before is None else self.before + start,
        )

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]
