"""Loss on held-out rows during training; evaluation against length lives in `swat_lm.evaluate`."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from swat_lm.data import BatchSource
from swat_lm.data.synthetic import SyntheticSource
from swat_lm.train.engine import Engine
from swat_lm.train.objectives import Objective

__all__ = ["HeldOut", "HeldOutLoss"]


@dataclass(frozen=True)
class HeldOutLoss:
    """Result of an evaluation over all processes."""

    loss: float
    """Nats per target token."""
    num_targets: int
    num_bytes: int | None
    """UTF-8 bytes that the targets stand for, where the tokenizer lets them be counted."""

    def metrics(self) -> dict[str, float]:
        """The numbers under the names metrics.jsonl uses."""
        found = {"held_out_loss": self.loss}
        # beyond, the number fits no float and says nothing
        if self.loss < 700:
            found["held_out_perplexity"] = math.exp(self.loss)
        if self.num_bytes:
            found["held_out_bits_per_byte"] = self.loss * self.num_targets / self.num_bytes / math.log(2)
        return found


@dataclass(frozen=True)
class HeldOut:
    """The same rows at every evaluation: the first `num_batches` batches of `source`, or all if there are fewer."""

    source: BatchSource | SyntheticSource
    num_batches: int
    token_bytes: Tensor | None
    """Bytes each token id stands for, int64 [V]; None if unknown."""

    def check(self, engine: Engine, objective: Objective) -> None:
        """Raise ValueError where its rows hold nothing to predict, which would look like a loss of 0."""
        rows = self.source.pass_over(engine.rows(), self.num_batches)
        if not engine.sum(torch.tensor(int(any(objective.num_targets(batch) for batch in rows)))):
            raise ValueError(
                f"train.objective: in the held-out rows there is nothing for {objective.name} to predict: raise "
                "data.sequence_length, data.held_out or train.evaluate_batches, or set train.evaluate_every=0"
            )

    @torch.no_grad()
    def evaluate(self, engine: Engine, model: nn.Module, objective: Objective) -> HeldOutLoss:
        """Mean cross-entropy per target token, each process by its own rows; leaves the model in training mode."""
        model.eval()
        total = torch.zeros((), dtype=torch.float64)
        counts = torch.zeros(2, dtype=torch.int64)
        for batch in self.source.pass_over(engine.rows(), self.num_batches):
            for part in engine.micro_batches(batch):
                with engine.autocast():
                    total += objective.cross_entropy(model, part, num_targets=1.0).double().cpu()
            counts[0] += objective.num_targets(batch)
            if self.token_bytes is not None:
                labels = objective.labels(batch)
                counts[1] += self.token_bytes[labels[labels >= 0]].sum()
        model.train()
        num_targets, num_bytes = engine.sum(counts).tolist()
        loss = engine.sum(total.to(engine.device)).item() / max(num_targets, 1)
        return HeldOutLoss(loss, num_targets, num_bytes if self.token_bytes is not None else None)
