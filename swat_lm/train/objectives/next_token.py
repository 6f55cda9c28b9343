"""The objective `next_token`: predict every token from those before it."""

from torch import Tensor

from swat_lm.data import Batch
from swat_lm.train.objectives.base import Objective

__all__ = ["NextToken"]


class NextToken(Objective):
    """Predict each token from those before it in its row and, if documents are separate, in its document."""

    name = "next_token"

    def labels(self, batch: Batch) -> Tensor:
        """All that the data says may be predicted: of text every token, of a recall task its answers."""
        return batch.labels
