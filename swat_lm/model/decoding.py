"""A model laid out for decoding on a CPU: its layers by their plans, and the output embedding.

Layers without a plan, or of which a module was replaced or a weight was moved since, take their own step.
Legend: B streams, M model width, V vocabulary.
"""

from collections.abc import Sequence
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from swat_lm.layers.base import InPlace, Layer
from swat_lm.layers.chunk import Chunk
from swat_lm.layers.lean import Held, LayerPlan, Matrix, Norm, are_in_place, held_by, is_plain, join, of_one
from swat_lm.layers.norm import RMSNorm
from swat_lm.model.execution import step_layers

if TYPE_CHECKING:
    from swat_lm.model.modeling import SwatForCausalLM


class DecodingPlan:
    """The layers' plans, the final norm and the output embedding, as long as they describe the model."""

    def __init__(self, model: "SwatForCausalLM") -> None:
        self.layers: list[LayerPlan | None] = [layer.decoding_plan() for layer in model.model.stack]
        self._planned = list(model.model.stack)
        self._final_norm = Norm(model.model.norm) if isinstance(model.model.norm, RMSNorm) else None
        self._norm_held: Held = [held for held in held_by(model.model) if isinstance(held[2], RMSNorm)]
        self.head: Matrix | None = None
        """`[M, V]`; None where the output embedding is called instead."""
        if is_plain(model.lm_head) and model.lm_head.weight.dtype in (torch.float32, torch.float64):
            self.head = of_one(model.lm_head)
        self._head_held: Held = [held for held in held_by(model) if held[1] == "lm_head"]
        self._held: Held = [held for plan in self.layers if plan is not None for held in plan.held] + self._norm_held
        self.num_threads = 1

    def matrices(self) -> list[Matrix]:
        """Of all layers, and of the output embedding."""
        matrices = [matrix for plan in self.layers if plan is not None for matrix in plan.matrices()]
        return matrices if self.head is None else [*matrices, self.head]

    def _is_whole(self, layers: Sequence[Layer]) -> bool:
        """Whether all layers and the norm are as planned: looked at in one go, since it is done for every token."""
        return are_in_place(self._held) and all(map(is_, layers, self._planned))

    def serving(self, layers: Sequence[Layer]) -> list[LayerPlan | None]:
        """The plan of every layer that still has one."""
        return [
            plan if plan is not None and layer is planned and plan.describes_the_layer() else None
            for plan, planned, layer in zip(self.layers, self._planned, layers, strict=True)
        ]

    def step(
        self,
        layers: Sequence[Layer],
        hidden: Tensor,
        positions: Tensor,
        pasts: Sequence[InPlace],
        norm: nn.Module,
        may_share: bool,
        batch_invariant: bool = False,
    ) -> Tensor:
        """Hidden states `[B, M]` before the layers to hidden states after the final norm.

        `may_share` says that the rows own the slots in order, so that rows at one position share what depends on it.
        """
        if self.num_threads != torch.get_num_threads():
            self.num_threads = torch.get_num_threads()
            for matrix in self.matrices():
                matrix.cut(self.num_threads)
        places = set(positions.tolist()) if may_share else set()
        position = places.pop() if len(places) == 1 else None
        chunk = Chunk((positions if position is None else positions[:1])[:, None], batch_invariant=batch_invariant)
        is_whole = self._is_whole(layers)
        plans = self.layers if is_whole else self.serving(layers)
        hidden = step_layers(layers, hidden, chunk, pasts, plans, position)
        if self._final_norm is not None and (is_whole or are_in_place(self._norm_held)):
            return self._final_norm(hidden)
        return norm(hidden)

    def logits(self, head: nn.Module, hidden: Tensor) -> Tensor:
        """`[B, M]` to `[B, V]`."""
        return head(hidden) if self.head is None or not are_in_place(self._head_held) else self.head.times(hidden)


def arrange(model: "SwatForCausalLM") -> DecodingPlan:
    """Store the weights by input channel and join those with the same input; returns the plan that uses them."""
    if not model.config.tie_word_embeddings and type(model.lm_head) is nn.Linear:
        # looking a token up in a tied one would touch one cache line per channel
        join([model.lm_head])
    return DecodingPlan(model)


def contiguous_state_dict(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: dict) -> None:
    """A hook for `state_dict()`: weights leave as matrices of their own, as files need them."""
    for name, value in state_dict.items():
        if isinstance(value, Tensor) and not value.is_contiguous():
            state_dict[name] = value.contiguous()
