"""Embeddings that scale what they give: those of tokens, and those that logits are formed with.

Legend: B rows, T tokens, M model width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ScaledEmbedding", "ScaledHead", "output_embedding", "token_embedding"]


class ScaledEmbedding(nn.Embedding):
    """Token embeddings times a number, as Granite and Gemma (arXiv 2403.08295) have them."""

    multiplier: float = 1.0

    def forward(self, input: Tensor) -> Tensor:
        """Ids `[B, T]` to embeddings `[B, T, M]`."""
        return super().forward(input) * self.multiplier

    def extra_repr(self) -> str:
        """Sizes and the multiplier."""
        return f"{super().extra_repr()}, multiplier={self.multiplier}"


class ScaledHead(nn.Linear):
    """Logits divided by a number, as Granite has them, then capped softly, as Gemma 2 does (arXiv 2408.00118)."""

    divisor: float = 1.0
    softcap: float | None = None
    """c: logits become `c * tanh(logits / c)`; None: they stay."""

    def forward(self, input: Tensor) -> Tensor:
        """Hidden states `[B, T, M]` to logits `[B, T, V]`."""
        logits = F.linear(input, self.weight, self.bias)
        if self.divisor != 1:
            logits = logits / self.divisor
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def extra_repr(self) -> str:
        """Sizes, the divisor and the cap."""
        return f"{super().extra_repr()}, divisor={self.divisor}, softcap={self.softcap}"


def token_embedding(vocabulary: int, width: int, padding: int | None, multiplier: float) -> nn.Embedding:
    """Embeddings of V tokens; the plain kind where nothing is scaled."""
    if multiplier == 1:
        return nn.Embedding(vocabulary, width, padding)
    embedding = ScaledEmbedding(vocabulary, width, padding)
    embedding.multiplier = multiplier
    return embedding


def output_embedding(linear: nn.Linear, divisor: float, softcap: float | None = None) -> nn.Linear:
    """The map from M to V logits with the weight of `linear`; that itself, which has shortcuts, where it is no more."""
    if (divisor == 1 and softcap is None) or type(linear) is not nn.Linear:
        return linear
    with torch.device("meta"):
        head = ScaledHead(linear.in_features, linear.out_features, linear.bias is not None)
    head.weight, head.bias, head.divisor, head.softcap = linear.weight, linear.bias, divisor, softcap
    return head
