"""Has layers absorb what they have seen under transformers' Trainer and the trainers of its family."""

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from swat_lm.model.absorbing import Statistics, absorb_statistics, add_statistics, sum_over_processes
from swat_lm.model.modeling import SwatForCausalLM, SwatModel

__all__ = ["AbsorbingCallback"]


class AbsorbingCallback(TrainerCallback):
    """`Trainer(model, ..., callbacks=[AbsorbingCallback()])`: a codebook (LongVQ) learns by this alone.

    The Trainer drops what layers say beside their outputs, so a hook on the model sums it up over the passes of a step
    that have gradients, and layers absorb it after the optimizer's step. One callback serves one Trainer at a time.
    """

    def __init__(self) -> None:
        self.statistics: Statistics = {}
        self.hooks: list[RemovableHandle] = []
        self.gathered = False
        self.model: nn.Module | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Hook the model. Raises ValueError for one that holds none of this package."""
        modules = [] if model is None else list(model.modules())
        self._forget()
        # trainers may put a forward of their own around the model inside, so that is asked first; where rows are cut
        # into chunks it is asked for a part at a time, and the language model says the whole
        for module in modules:
            if isinstance(module, SwatForCausalLM):
                self.hooks += [
                    module.register_forward_pre_hook(self._begin), module.register_forward_hook(self._gather)
                ]  # fmt: skip
            elif isinstance(module, SwatModel):
                self.model = module
                self.hooks.append(module.register_forward_hook(self._gather))
        if self.model is not None:
            return
        raise ValueError(f"AbsorbingCallback: expected a model of swat_lm, got {type(model).__name__}; leave it out")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Layers absorb the sums of the step."""
        assert self.model is not None, "the Trainer has begun"
        absorb_statistics(self.model, sum_over_processes(self.statistics))
        self.statistics = {}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the hook away."""
        self._forget()

    def _forget(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.statistics, self.hooks, self.model = {}, [], None

    def _begin(self, module: nn.Module, given: Any) -> None:
        self.gathered = False

    def _gather(self, module: nn.Module, given: Any, output: Any) -> None:
        # a reference's passes, of the same weights but for an adapter, have no gradients; and a pass within a backward
        # pass is one that is computed again, a chunk at a time
        if torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:
            if isinstance(module, SwatForCausalLM) and self.gathered:
                return
            add_statistics(self.statistics, getattr(output, "auxiliary", None) or ())
            self.gathered = True
