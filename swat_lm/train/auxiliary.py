"""What layers say beside their outputs over one optimizer step: auxiliary losses, statistics, metrics.

An auxiliary loss is a sum over all rows of the step divided by a divisor over the same rows, so that neither
micro-batches nor processes change it. It must be in every pass of a layer or in none.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from swat_lm.data import Batch
from swat_lm.layers.base import Auxiliary
from swat_lm.model.absorbing import Statistics, absorb_statistics, add_statistics
from swat_lm.train.engine import Engine
from swat_lm.train.objectives import Objective

__all__ = ["StepAuxiliary", "count_divisors"]


Divisors = dict[tuple[int, str], Tensor]
"""By the number of the layer whose loss it is, and what it is called there."""


def divisors_of(auxiliary: Sequence[Auxiliary], device: torch.device) -> Divisors:
    """What each auxiliary loss of one pass is divided by, float64 scalars."""
    return {
        (layer, loss): torch.as_tensor(divisor, dtype=torch.float64, device=device).detach()
        for layer, said in enumerate(auxiliary)
        for loss, (_, divisor) in said.losses.items()
    }


def summed(engine: Engine, divisors: Divisors) -> Divisors:
    """The divisors over all processes; one that is 0 is 1, since its sum is 0 too."""
    if not divisors:
        return {}
    names = sorted(divisors)
    values = engine.sum(torch.stack([divisors[name] for name in names]))
    return dict(zip(names, values.where(values != 0, 1.0).unbind(), strict=True))


@torch.no_grad()
def count_divisors(engine: Engine, objective: Objective, model: nn.Module, parts: Sequence[Batch]) -> Divisors:
    """The divisors of a step of several micro-batches, which the first backward pass already needs.

    They are known only after a forward pass, so where layers give auxiliary losses each micro-batch has one more;
    where they give none, the first one tells. Random numbers are drawn again by the passes that follow.
    """
    found: Divisors = {}
    devices = [engine.device] if engine.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        for part in parts:
            with engine.autocast():
                auxiliary = objective.loss(model, part, 1.0).auxiliary
            for name, divisor in divisors_of(auxiliary, engine.device).items():
                found[name] = found[name] + divisor if name in found else divisor
            if not found:
                break
    return summed(engine, found)


class StepAuxiliary:
    """Gathers over the micro-batches of one step what layers say."""

    def __init__(self, engine: Engine, weights: Mapping[str, float], divisors: Divisors | None) -> None:
        """`divisors`: those of `count_divisors`; None in a step of one micro-batch, which gives them itself."""
        self.engine, self.weights, self.divisors = engine, weights, divisors
        self.losses: dict[str, Tensor] = {}
        self.shown: dict[str, list[Tensor]] = defaultdict(list)
        self.statistics: Statistics = {}

    def add(self, auxiliary: Sequence[Auxiliary]) -> Tensor | None:
        """Take in one pass; returns what is added to its loss, None where layers give no losses."""
        if self.divisors is None:
            self.divisors = summed(self.engine, divisors_of(auxiliary, self.engine.device))
        given = {(layer, name) for layer, said in enumerate(auxiliary) for name in said.losses}
        if given != self.divisors.keys():
            raise AssertionError(f"layers gave losses {sorted(given)}, and before {sorted(self.divisors)}")
        self.check_weights({loss for _, loss in given})
        added = None
        for layer, said in enumerate(auxiliary):
            for name, (total, _) in said.losses.items():
                value = total / self.divisors[layer, name].to(total.dtype)
                self.losses[name] = self.losses.get(name, 0.0) + value.detach()
                # gradients are averaged over processes, and this is a part of the sum over them
                weighted = value * (self.weights.get(name, 1.0) * self.engine.num_processes)
                added = weighted if added is None else added + weighted
            for name, number in said.metrics.items():
                self.shown[name].append(number.detach().float())
        add_statistics(self.statistics, auxiliary)
        return added

    def check_weights(self, known: set[str]) -> None:
        """Raise ValueError for a weight of a loss that no layer gives."""
        for name in self.weights:
            if name not in known:
                given = f"; given are {', '.join(sorted(known))}" if known else ", nor any other"
                raise ValueError(
                    f"train.objective_settings.auxiliary_weights: no layer gives an auxiliary loss {name!r}{given}"
                )

    def metrics(self) -> dict[str, Tensor]:
        """Scalars of this process that, summed over processes, are the step's: losses unweighted and summed over
        layers as `auxiliary_NAME`, metrics averaged over layers and micro-batches as `layers_NAME`.
        """
        found = {f"auxiliary_{name}": value for name, value in self.losses.items()}
        for name, numbers in self.shown.items():
            found[f"layers_{name}"] = torch.stack(numbers).mean() / self.engine.num_processes
        return found

    @torch.no_grad()
    def absorb(self, model: nn.Module) -> dict[str, Tensor]:
        """After the optimizer's step: hand each layer its statistics, summed over micro-batches and processes.

        Returns what layers show of them, as `metrics` does.
        """
        step = {
            layer: {name: self.engine.sum(sums[name].clone()) for name in sorted(sums)}
            for layer, sums in sorted(self.statistics.items())
        }
        shown = absorb_statistics(model, step)
        return {
            f"layers_{name}": torch.stack(numbers).mean() / self.engine.num_processes for name, numbers in shown.items()
        }
