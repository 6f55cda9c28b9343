"""The objective `masked_next_token`: read everything, predict only what the data marks, such as answers to prompts."""

from torch import Tensor, nn

from swat_lm.data import Batch
from swat_lm.data.batches import IGNORED
from swat_lm.data.instructions import is_marked
from swat_lm.data.synthetic import is_synthetic
from swat_lm.recipe import DataRecipe
from swat_lm.train.objectives.base import Loss, Objective

__all__ = ["MaskedNextToken"]


class MaskedNextToken(Objective):
    """Predict the marked tokens; the others are only read."""

    name = "masked_next_token"

    @classmethod
    def refuses(cls, data: DataRecipe) -> str | None:
        """Plain text, which marks nothing."""
        if is_marked(data) or is_synthetic(data.sources):
            return None
        return (
            "learns what the data marks, and plain text marks nothing: set data.format to prompt_answer or messages "
            "for instruction data, or train.objective=next_token"
        )

    def labels(self, batch: Batch) -> Tensor:
        """The marked tokens."""
        assert batch.loss_mask is not None, "the data marks nothing; `refuses` should have said so"
        return batch.labels.masked_fill(~batch.loss_mask, IGNORED)

    def loss(self, model: nn.Module, batch: Batch, num_targets: float) -> Loss:
        """Also shows `marked_share`, the share of tokens that are marked."""
        assert batch.loss_mask is not None
        metrics = {"marked_share": batch.loss_mask.float().mean()}
        return super().loss(model, batch, num_targets)._replace(metrics=metrics)
