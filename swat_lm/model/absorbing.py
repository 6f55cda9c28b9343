"""What layers learn otherwise than by gradients: sums over the passes of a step, absorbed after the optimizer's."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from swat_lm.layers.base import Auxiliary, Layer
from swat_lm.model.execution.table import Checkpointed

__all__ = ["Absorbing", "Statistics", "absorb_statistics", "add_statistics", "sum_over_processes"]

Statistics = dict[int, dict[str, Tensor]]
"""By the number of a layer, its sums by name."""


def add_statistics(into: Statistics, auxiliary: Sequence[Auxiliary]) -> None:
    """Add what layers said in one pass."""
    for layer, said in enumerate(auxiliary):
        held = into.setdefault(layer, {}) if said.statistics else {}
        for name, statistic in said.statistics.items():
            held[name] = held[name] + statistic.detach() if name in held else statistic.detach()


@torch.no_grad()
def absorb_statistics(model: nn.Module, statistics: Statistics) -> dict[str, list[Tensor]]:
    """Hand each layer the sums of a whole step, over micro-batches and processes.

    Returns the numbers to show of them by name, one for each layer that has such.

    Raises:
        ValueError: sums of a layer that the model does not have.
    """
    layers = [module for module in model.modules() if isinstance(module, Layer)]
    if statistics and max(statistics) >= len(layers):
        raise ValueError(
            f"auxiliary: holds statistics of layer {max(statistics)} and the model has {len(layers)} layers: pass the "
            "outputs of this model"
        )
    shown: dict[str, list[Tensor]] = {}
    for number, sums in sorted(statistics.items()):
        for name, value in layers[number].metrics_of(sums).items():
            shown.setdefault(name, []).append(value.detach().float())
        layers[number].absorb(sums)
    return shown


def sum_over_processes(statistics: Statistics) -> Statistics:
    """The sums of all processes of the default group; the same where there is one."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return statistics
    found: Statistics = {}
    for number, sums in sorted(statistics.items()):
        found[number] = {name: sums[name].clone() for name in sorted(sums)}
        for value in found[number].values():
            distributed.all_reduce(value)
    return found


class Absorbing(Checkpointed):
    """Mixed into the models: training loops of one's own have layers absorb what they have seen."""

    def absorb(self, *auxiliary: Sequence[Auxiliary] | None) -> dict[str, float]:
        """After `optimizer.step()`: layers take in what they said in the passes of the step.

        A codebook (LongVQ) learns by this alone. Every process of a distributed run calls it; what they saw is summed.

        Args:
            auxiliary: `outputs.auxiliary` of each pass, one per micro-batch; None where no layer says anything.

        Returns:
            Numbers to show, means over layers, such as how many codes are in use.

        Raises:
            ValueError: outputs of another model.
        """
        assert isinstance(self, nn.Module)
        statistics: Statistics = {}
        for said in auxiliary:
            add_statistics(statistics, said or ())
        shown = absorb_statistics(self, sum_over_processes(statistics))
        return {name: torch.stack(numbers).mean().item() for name, numbers in shown.items()}
