"""Tiny models for the tests of this folder."""

import itertools

import torch

from swat_lm import SwatConfig, SwatForCausalLM

VOCABULARY = 97


def tiny_config(**changes) -> SwatConfig:
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 7,
        # a larger start than usual, so that differences show
        "initializer_range": 0.3,
    }
    return SwatConfig(**{**values, **changes})


def tiny_model(seed: int = 0, **changes) -> SwatForCausalLM:
    torch.manual_seed(seed)
    return SwatForCausalLM(tiny_config(**changes)).eval()


def tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to rounding in float32, relative to the largest value."""
    scale = max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


def split(ids: torch.Tensor, cuts: list[int]) -> list[torch.Tensor]:
    """Rows `[B, T]` in parts that end at these places, each taken modulo T."""
    bounds = [0, *sorted(cut % ids.shape[1] for cut in cuts), ids.shape[1]]
    return [ids[:, start:end] for start, end in itertools.pairwise(bounds) if end > start]
