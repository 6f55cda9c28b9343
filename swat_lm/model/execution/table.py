"""The ways to run layers by name, and how a model is told which one."""

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from torch import nn

from swat_lm.model.execution.base import Execution
from swat_lm.model.execution.blockwise import Blockwise
from swat_lm.model.execution.chunks import ReverseChunks
from swat_lm.validation import build
from swat_lm.words import did_you_mean

if TYPE_CHECKING:
    from swat_lm.model.modeling import SwatModel

__all__ = ["EXECUTIONS", "Checkpoint", "Checkpointed", "Executable", "Plain", "make_execution", "run_model"]


class Plain(Execution):
    """All layers over whole rows; what the backward pass needs is held."""

    name = "plain"


class Checkpoint(Execution):
    """All layers over whole rows; of each layer its input is held, and the layer is computed again."""

    name = "checkpoint"
    recomputes_layers = True


EXECUTIONS: dict[str, type[Execution]] = {kind.name: kind for kind in (Plain, Checkpoint, Blockwise, ReverseChunks)}


def make_execution(name: str, values: dict[str, Any], at: str = "execution_settings") -> Execution:
    """The execution of this name with its settings.

    Raises ValueError for an unknown one or an unknown setting: the nearest valid one is named, or whose setting it is.
    """
    if name not in EXECUTIONS:
        hint = did_you_mean(name, EXECUTIONS, f"; known are {', '.join(EXECUTIONS)}")
        raise ValueError(f"execution: unknown execution {name!r}{hint}")
    kind = EXECUTIONS[name]
    own = known_settings(kind)
    for key in values:
        owners = [other.name for other in EXECUTIONS.values() if key in known_settings(other)]
        if key not in own and (owners or not own):
            belongs = f"{key} belongs to {' and '.join(owners)}" if owners else f"got {key}"
            takes = f"takes {', '.join(own)}" if own else "takes no settings"
            raise ValueError(f"{at}: {name} {takes}; {belongs}")
    return kind(build(kind.Settings, values, at))


def known_settings(kind: type[Execution]) -> list[str]:
    """What may be set of one."""
    return [field.name for field in fields(kind.Settings)]


class Executable:
    """Mixed into the language model: which way its layers are run in training."""

    if TYPE_CHECKING:
        model: SwatModel
        activation_checkpointing_enable: Any
        activation_checkpointing_disable: Any

    @property
    def execution(self) -> Execution:
        """The way that was chosen; plain at first."""
        return self.model.execution

    def set_execution(self, name: str = "plain", **settings: Any) -> None:
        """Choose how layers are run in training; it changes memory and time, and no result.

        Args:
            name: a word of `EXECUTIONS`: `plain`, `checkpoint`, `blockwise`, `chunks`.
            settings: those of its `Settings`, as `block_size` of `blockwise`, `chunk_size` and `carries` of `chunks`.

        Raises:
            ValueError: an unknown name or setting, or a plan of layers that cannot be run so.
        """
        execution = make_execution(name, settings)
        reason = execution.refuses(self.model.stack)
        if reason is not None:
            raise ValueError(f"execution: {name} cannot run this model: {reason}")
        self.execution.leave(self.model.stack)
        self.model.execution = Plain()
        # layers within a chunk may be checkpointed too
        if self.model.gradient_checkpointing:
            self.activation_checkpointing_disable()
        if execution.recomputes_layers:
            self.activation_checkpointing_enable()
        execution.enter(self.model.stack)
        self.model.execution = execution


class Checkpointed:
    """Mixed into every model: Hugging Face's switch of checkpointing, as `transformers.Trainer` turns it, and the
    execution say the same."""

    def _set_gradient_checkpointing(self, enable: bool = True, *arguments: Any, **options: Any) -> None:
        # whichever of the model and its body is asked
        body: Any = getattr(self, "model", self)
        if isinstance(body.execution, Blockwise):
            if not enable:
                # its layers are not checkpointed, and go on block by block
                return
            raise ValueError(
                "gradient_checkpointing: execution blockwise computes layers again by itself, and checkpointing would "
                "take its place: leave it off, or choose it by model.set_execution('checkpoint')"
            )
        super()._set_gradient_checkpointing(enable, *arguments, **options)  # type: ignore[misc]
        # chunks stay: layers may be checkpointed within them
        if enable and isinstance(body.execution, Plain):
            body.execution = Checkpoint()
        elif not enable and isinstance(body.execution, Checkpoint):
            body.execution = Plain()


def run_model(model: nn.Module, **inputs: Any) -> Any:
    """A training pass of any model, ours or a library's; inputs are those of its `forward`.

    Where passes over chunks are passes of the model of their own, each with the hooks of whoever shards its weights,
    the pass as a whole goes past these hooks.
    """
    execution = getattr(model, "execution", None)
    alone = isinstance(execution, ReverseChunks) and execution.before_backward is not None
    return model.forward(**inputs) if alone else model(**inputs)
