"""Choosing the next token from logits: greedy, temperature, top-k, top-p; every draw from a generator of its own.

Legend: B streams, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Sampling", "sample"]

# below, logits over temperature leave float32 and the odds of all but the most likely token are nothing anyway
LOWEST_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Temperature 0 (or below 1e-6) takes the likeliest; top-k, then top-p, narrow the choice."""

    temperature: float = 1.0
    top_k: int | None = None
    """Keep this many most likely tokens; None: all."""
    top_p: float = 1.0
    """Keep the fewest most likely tokens whose probabilities reach this sum; 1: all."""
    vocab_size: int | None = None
    """Never draw ids from here on, for models whose vocabulary is padded beyond the tokenizer's."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature: expected 0 (most likely token) or a number above, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: expected at least 1, got {self.top_k}; leave it out to keep all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected above 0 and at most 1, got {self.top_p}")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(f"vocab_size: expected at least 1, got {self.vocab_size}")


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """Draw one token per stream from logits `[B, V]`; returns int64 `[B]`."""
    logits = logits[:, : sampling.vocab_size].float()
    if sampling.temperature < LOWEST_TEMPERATURE:
        return logits.argmax(dim=-1)
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[1]:
        smallest = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if sampling.top_p < 1:
        ordered, places = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        # a token stays while those before it have not reached the sum, so the first always does
        before = ordered.cumsum(dim=-1) - ordered
        dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, places, before >= sampling.top_p)
        logits = logits.masked_fill(dropped, -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(1)
