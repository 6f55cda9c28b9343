"""Other heads than a language model's on the same layers: sequence and token classification, question answering.

Everything but the layers is `transformers`' own. A sequence is scored at its last token that is no padding.
"""

from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)

from swat_lm.model.modeling import SwatPreTrainedModel


class SwatForSequenceClassification(GenericForSequenceClassification, SwatPreTrainedModel):
    """Logits `[B, labels]` of whole sequences; with one label a reward model."""


class SwatForTokenClassification(GenericForTokenClassification, SwatPreTrainedModel):
    """Logits `[B, T, labels]` of every token."""


class SwatForQuestionAnswering(GenericForQuestionAnswering, SwatPreTrainedModel):
    """Logits `[B, T]` of where an answer begins, and of where it ends."""
