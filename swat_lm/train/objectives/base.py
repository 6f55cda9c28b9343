"""The contract of every objective: how rows become inputs and targets, what is counted, and what is minimised.

An objective is called on micro-batches; sums over micro-batches and processes are the loop's affair.
Legend: B rows, T tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import Field
from torch import Tensor, nn

from swat_lm.data import Batch
from swat_lm.data.batches import IGNORED
from swat_lm.layers.base import Auxiliary, Layer
from swat_lm.model.execution.table import run_model
from swat_lm.recipe import DataRecipe
from swat_lm.validation import number, settings

__all__ = ["Loss", "Objective", "ObjectiveSettings"]


@settings
class ObjectiveSettings:
    """What may be set of every objective, in `train.objective_settings`."""

    auxiliary_weights: dict[str, Annotated[float, number(at_least=0)]] = Field(default_factory=dict)
    """By name, what an auxiliary loss of the layers is multiplied by before it is added; 1 where none is given."""


class Loss(NamedTuple):
    """What an objective makes of one micro-batch."""

    loss: Tensor
    """A scalar in float32: a sum over the micro-batch's targets, divided as the loop says."""
    auxiliary: tuple[Auxiliary, ...] = ()
    """What each layer says beside; empty where none says anything. The loop weighs, divides and adds their losses."""
    metrics: Mapping[str, Tensor] = {}
    """Scalars to show by name, averaged over micro-batches and processes; the same names at every step."""


class Objective(ABC):
    """An objective: one file, one row of `OBJECTIVES`, its settings. What it keeps between steps is in `state_dict`."""

    name: ClassVar[str]
    """What `train.objective` calls it."""
    Settings: ClassVar[type[ObjectiveSettings]] = ObjectiveSettings
    """A class under `settings` of what may be set in `train.objective_settings`, all with defaults."""

    def __init__(self, settings: ObjectiveSettings) -> None:
        self.settings = settings

    @classmethod
    def refuses(cls, data: DataRecipe) -> str | None:
        """Why it cannot learn from such data, as the rest of a sentence that begins with its name; None where it can.

        Asked before anything is read or written.
        """
        return None

    @classmethod
    def refuses_execution(cls, execution: str) -> str | None:
        """Why it cannot learn from layers that are run so, as the rest of a sentence; None where it can.

        One that reads a prefix in both directions, or logits or hidden states of whole rows, refuses `chunks`, which
        give the loss of `labels` alone.
        """
        return None

    @classmethod
    def refuses_layer(cls, layer: Layer) -> str | None:
        """Why it cannot train such a layer, as the rest of a sentence that begins with the layer; None where it can.

        By default one whose tokens see what comes after them, their targets among it. An objective whose inputs do not
        show its targets returns None.
        """
        # latents of a shortened row look back, and what else they ask for is said where targets are aligned
        if layer.shortens or layer.refuses_past() is None:
            return None
        return (
            "looks both ways (bidirectional), so that every token sees the one that it is to predict; set "
            "bidirectional to false, or train it for an objective of your own whose inputs do not show its targets"
        )

    @abstractmethod
    def labels(self, batch: Batch) -> Tensor:
        """int64 `[B, T]`: the tokens to be predicted in their own places (the model shifts them); -100 elsewhere."""

    def num_targets(self, batch: Batch) -> int:
        """What the losses of a step are divided by, summed over micro-batches and processes: predicted tokens."""
        return int((self.labels(batch) != IGNORED).sum())

    def loss(self, model: nn.Module, batch: Batch, num_targets: float) -> Loss:
        """Sum of the losses in nats over a micro-batch, divided by `num_targets`; changes no state.

        The divisor is given because only the loop knows how many targets all processes and micro-batches of a step
        have together; dividing each by its own count would weigh tokens unequally.
        """
        output = self.run(model, batch, num_targets)
        return Loss(output.loss, getattr(output, "auxiliary", None) or ())

    def cross_entropy(self, model: nn.Module, batch: Batch, num_targets: float) -> Tensor:
        """What held-out rows are judged by, whatever is minimised: cross-entropy alone, summed and divided so."""
        return self.run(model, batch, num_targets).loss

    def run(self, model: nn.Module, batch: Batch, num_targets: float) -> Any:
        """The model's output for a micro-batch, with the cross-entropy of `labels` as its loss."""
        return run_model(
            model,
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            document_ids=batch.document_ids,
            labels=self.labels(batch),
            num_items_in_batch=num_targets,
            use_cache=False,
            return_logits=False,
            noise_seed=batch.noise_seed,
        )

    def state_dict(self) -> dict[str, Tensor]:
        """What belongs in a checkpoint, equal on all processes; most objectives keep nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what a checkpoint holds; names that it lacks, as older ones do, stay as they began."""
        if state:
            raise AssertionError(f"{self.name} has state {sorted(state)} but does not load it")
