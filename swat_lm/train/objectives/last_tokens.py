"""The objective `last_tokens`: predict what the last tokens of a row are followed by, as latents alone can."""

from typing import Annotated

from torch import Tensor

from swat_lm.data import Batch
from swat_lm.data.batches import IGNORED
from swat_lm.train.objectives.base import Objective, ObjectiveSettings
from swat_lm.validation import number, settings

__all__ = ["LastTokens", "LastTokensSettings"]


@settings
class LastTokensSettings(ObjectiveSettings):
    """Which tokens are learnt from."""

    count: Annotated[int, number(at_least=2)] = 1024
    """Tokens at the end of a row that predict the ones after them; the very last one has none in its row."""


class LastTokens(Objective):
    """Predict each token from those before it, where the one before it is among the last of its row."""

    name = "last_tokens"
    Settings = LastTokensSettings

    settings: LastTokensSettings

    def labels(self, batch: Batch) -> Tensor:
        """All but the first of the last tokens."""
        labels = batch.labels.clone()
        labels[:, : max(0, labels.shape[1] - self.settings.count + 1)] = IGNORED
        return labels
