"""The contract of every way to run layers: its settings, which plans it refuses, and what of a pass it takes over."""

from collections.abc import Sequence
from typing import Any, ClassVar

from swat_lm.layers.base import Layer
from swat_lm.validation import settings

__all__ = ["Execution", "NoSettings"]


@settings
class NoSettings:
    """Of an execution of which nothing can be set."""


class Execution:
    """A way to run layers: one file, one row of `EXECUTIONS`. It changes what is held and recomputed, no result."""

    name: ClassVar[str]
    """What `train.execution` calls it."""
    Settings: ClassVar[type] = NoSettings
    """A class under `settings` of what may be set, all with defaults."""
    recomputes_layers: ClassVar[bool] = False
    """Whether layers are checkpointed one by one."""
    takes_whole_passes: ClassVar[bool] = False
    """Whether it takes a pass of the language model from inputs to loss, not from layer to layer."""

    def __init__(self, settings: Any = None) -> None:
        self.settings = self.Settings() if settings is None else settings

    def enter(self, layers: Sequence[Layer]) -> None:
        """Prepare layers that are to be run so from now on."""

    def leave(self, layers: Sequence[Layer]) -> None:
        """Undo what `enter` did."""

    def refuses(self, layers: Sequence[Layer]) -> str | None:
        """Why it cannot run these layers, in one sentence that names the layer; None where it can."""
        return None
