"""A kind of layer that uses all a layer can say to the trainer, and an objective that keeps state.

Importing it changes nothing; `register()` puts both into their tables, also in processes of torchrun.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from swat_lm.layers import LAYERS, AttentionLayer
from swat_lm.layers.base import Auxiliary, Output
from swat_lm.layers.chunk import Chunk
from swat_lm.train.objectives import OBJECTIVES, NextToken


class SpeakingLayer(AttentionLayer):
    """Attention beside a router, which is learnt by an auxiliary loss alone; every third token of a document counts."""

    name = "speaking"

    def __init__(self, settings, width: int, index: int, shared) -> None:
        super().__init__(settings, width, index, shared)
        self.router = nn.Linear(width, 1, bias=False)
        self.gain = nn.Parameter(torch.ones(width))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, hidden: Tensor, chunk: Chunk, past=None) -> Output:
        hidden, past, _ = super().forward(hidden, chunk, past)
        scores = self.router(hidden).float().squeeze(-1)
        counted = (chunk.positions % 3 == 0).expand_as(scores)
        real = torch.ones_like(counted) if chunk.real is None else chunk.real.expand_as(counted)
        auxiliary = Auxiliary(
            losses={"balance": (((scores - 0.5).square() * counted).sum(), counted.sum())},
            statistics={"seen": counted.sum()},
            metrics={"score": (scores * real).sum() / real.sum().clamp(min=1)},
        )
        return Output(hidden * self.gain, past, auxiliary)

    def init_weights(self, shared) -> None:
        super().init_weights(shared)
        if not getattr(self.gain, "_is_hf_initialized", False):
            nn.init.ones_(self.gain)
        if not getattr(self.seen, "_is_hf_initialized", False):
            nn.init.zeros_(self.seen)

    def optimizer_options(self):
        return {"router.weight": {"weight_decay": 0.0}, "gain": {"learning_rate_factor": 3.0, "weight_decay": 0.5}}

    def absorb(self, statistics: Mapping[str, Tensor]) -> None:
        self.seen += statistics["seen"]


class Counting(NextToken):
    """Next token, counting the micro-batches of held-out rows: something that only a checkpoint can bring back."""

    name = "counting"

    def __init__(self, settings) -> None:
        super().__init__(settings)
        self.count = torch.zeros(2)

    def cross_entropy(self, model, batch, num_targets: float) -> Tensor:
        self.count += torch.tensor([1.0, 0.5])
        return super().cross_entropy(model, batch, num_targets)

    def state_dict(self) -> dict[str, Tensor]:
        return {"count": self.count}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.count = state.get("count", self.count).clone()


def register() -> None:
    """Put both into their tables."""
    LAYERS["speaking"] = SpeakingLayer
    OBJECTIVES["counting"] = Counting
