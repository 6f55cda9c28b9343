"""What a pass from the last block of rows to the first carries along: keys and values before the block that is gone
through, and the gradients that later blocks have for them.

Legend: B rows, K key/value heads, D head size.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from swat_lm.ops.head_bias import score_dtype

__all__ = ["Older"]

Make = Callable[[int, int], Iterable[tuple[slice, Mapping[str, Tensor]]]]


class Older:
    """Never more than the block may see: with a window as much as that, without one all tokens before."""

    def __init__(self, make: Make, num_tokens: int) -> None:
        """`make(start, stop)` computes keys and values `[B, n, K, D]` by name of these tokens, piece by piece."""
        self.make = make
        self.first = num_tokens
        """The first token that is held."""
        self.held: dict[str, Tensor] = {}
        """From `first` to the block's own first token."""
        self.waiting: dict[str, Tensor] = {}
        """Gradients of those, summed over later blocks, so never in less than the precision of scores."""

    def pass_by(self, start: int, first: int) -> dict[str, Tensor]:
        """Go to the block that begins at `start` and sees tokens from `first` on, at most `start`.

        Returns what later blocks have as the gradients of its own keys and values; nothing where none saw them.
        """
        own, place = max(start - self.first, 0), max(self.first - start, 0)
        of_block = {name: padded(each[:, own:], place) for name, each in self.waiting.items()}
        held = {name: each[:, :own] for name, each in self.held.items()}
        waiting = {name: each[:, :own] for name, each in self.waiting.items()}
        stop = min(self.first, start)
        if first < stop:
            held = self._longer(held, first, stop, start)
            waiting = {name: longer_zeros(each, waiting.get(name)) for name, each in held.items()}
        elif first == start:
            held, waiting = {}, {}
        self.first, self.held, self.waiting = first, held, waiting
        return of_block

    def add(self, found: Sequence[Tensor | None]) -> None:
        """Add the gradients that the block has for what is held, in its order; None: it saw nothing of it."""
        for waiting, part in zip(self.waiting.values(), found, strict=True):
            if part is not None:
                waiting += part

    def _longer(self, held: Mapping[str, Tensor], first: int, stop: int, start: int) -> dict[str, Tensor]:
        """From `first` to `start`, of which those from `stop` on are held."""
        longer: dict[str, Tensor] = {}
        for span, items in self.make(first, stop):
            for name, new in items.items():
                if name not in longer:
                    longer[name] = new.new_empty(new.shape[0], start - first, *new.shape[2:])
                longer[name][:, span.start - first : span.stop - first] = new
        for name, old in held.items():
            longer[name][:, stop - first :] = old
        return longer


def padded(gradient: Tensor, place: int) -> Tensor:
    """Of `place` more tokens before, which nobody saw."""
    return F.pad(gradient, (0, 0, 0, 0, place, 0)) if place else gradient


def longer_zeros(like: Tensor, end: Tensor | None) -> Tensor:
    """Zeros to sum up gradients of these keys or values in, with those of the last ones that there are already."""
    zeros = torch.zeros(like.shape, dtype=score_dtype(like), device=like.device)
    if end is not None and end.shape[1]:
        zeros[:, -end.shape[1] :] = end
    return zeros
