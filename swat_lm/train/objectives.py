"""What a training step minimises. An objective counts a batch's targets and turns a batch into a loss."""

from torch import Tensor, nn

from swat_lm.data import Batch

__all__ = ["NextToken"]


class NextToken:
    """Predict each token from those before it in its row and, if documents are separate, in its document."""

    def num_targets(self, batch: Batch) -> int:
        """Tokens that are predicted."""
        return batch.num_targets

    def loss(self, model: nn.Module, batch: Batch, num_targets: float) -> Tensor:
        """Sum of the cross-entropies in nats, divided by `num_targets`, in fp32.

        The divisor is given because only the loop knows how many targets all processes and micro-batches of a step
        have together; dividing each by its own count would weigh tokens unequally.
        """
        output = model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            document_ids=batch.document_ids,
            labels=batch.labels,
            num_items_in_batch=num_targets,
            use_cache=False,
        )
        return output.loss
