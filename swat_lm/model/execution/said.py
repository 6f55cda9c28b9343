"""What layers say beside their outputs over the chunks of one pass: sums of losses and statistics, means of metrics."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from swat_lm.layers.base import Auxiliary

__all__ = ["Said"]


class Said:
    """Adds up over chunks. Losses are in the order of layers, and within one in that of its names."""

    def __init__(self) -> None:
        self.layers: list[Auxiliary] | None = None

    @staticmethod
    def losses_of(said: Sequence[Auxiliary] | None) -> Iterator[Tensor]:
        """The sums of losses of one chunk, in order."""
        for auxiliary in said or ():
            for name in sorted(auxiliary.losses):
                yield auxiliary.losses[name][0]

    def add(self, said: Sequence[Auxiliary] | None, share: Callable[[], Tensor | float]) -> None:
        """Take in a chunk; `share` says which part of the tokens it has, padding left out, by which metrics count."""
        if said is None:
            return
        part = share() if any(auxiliary.metrics for auxiliary in said) else 0.0
        new = [scaled(auxiliary, part) for auxiliary in said]
        self.layers = new if self.layers is None else list(map(joined, self.layers, new))

    def sums(self) -> tuple[Tensor, ...]:
        """The sums of losses, in order."""
        return tuple(self.losses_of(self.layers))

    def told(self, losses: Sequence[Tensor]) -> tuple[Auxiliary, ...] | None:
        """What layers say of the whole pass, with these in the places of its sums; None where they say nothing."""
        if self.layers is None:
            return None
        rest = iter(losses)
        return tuple(
            replace(one, losses={name: (next(rest), one.losses[name][1]) for name in sorted(one.losses)})
            for one in self.layers
        )


def scaled(auxiliary: Auxiliary, share: Tensor | float) -> Auxiliary:
    """With metrics as a part of their mean; nothing belongs to a graph."""
    return Auxiliary(
        {name: (total.detach(), number(divisor)) for name, (total, divisor) in auxiliary.losses.items()},
        {name: statistic.detach() for name, statistic in auxiliary.statistics.items()},
        {name: metric.detach().float() * share for name, metric in auxiliary.metrics.items()},
    )


def joined(before: Auxiliary, new: Auxiliary) -> Auxiliary:
    """The sums of two."""
    assert before.losses.keys() == new.losses.keys(), "a layer gave other losses for another chunk"
    return Auxiliary(
        {name: (total + new.losses[name][0], divisor + new.losses[name][1])
         for name, (total, divisor) in before.losses.items()},
        {name: statistic + new.statistics[name] for name, statistic in before.statistics.items()},
        {name: metric + new.metrics[name] for name, metric in before.metrics.items()},
    )  # fmt: skip


def number(divisor: Tensor | float) -> Tensor | float:
    """A divisor outside of any graph."""
    return divisor.detach() if isinstance(divisor, torch.Tensor) else divisor
