"""What the checks of the contract of layers share: a plan to try, and how numbers are compared."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swat_lm import SwatConfig, SwatForCausalLM

VOCABULARY = 40
TOLERANCE = 1e-10
"""In float64, relative to the largest number or 1."""

Check = Callable[["Subject", Path], None]
"""Of a subject and an empty folder."""


@dataclass(frozen=True)
class Subject:
    """A plan of layers, and what else of the configuration it needs."""

    name: str
    layers: list[Any]
    changes: dict[str, Any] = field(default_factory=dict)

    def config(self, **changes: Any) -> SwatConfig:
        """A small configuration; the kinds' own settings are their defaults at width 64."""
        values = {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 48,
            "num_hidden_layers": max(2, len(self.layers)),
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "sliding_window": 7,
            "layers": self.layers,
            # a larger start than usual, so that differences show
            "initializer_range": 0.2,
        }
        return SwatConfig(**{**values, **self.changes, **changes})

    def model(self, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> SwatForCausalLM:
        """A model in evaluation mode; equal seeds give equal weights."""
        torch.manual_seed(seed)
        model = SwatForCausalLM(self.config(**changes)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    # sinks, norms and biases that are not all alike
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
        # in training, layers that draw noise draw the same in every pass, as one pass and its chunks must
        model.model.register_forward_pre_hook(with_the_same_noise, with_kwargs=True)
        return model.to(dtype)


def with_the_same_noise(module: torch.nn.Module, given: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What a pass is called with, and a seed where it brings none."""
    return given, {"noise_seed": 5, **named}


def name_of(one: Any) -> str:
    """What a test of a check or subject is called."""
    return one.name if isinstance(one, Subject) else one.__name__


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    """Random token ids `[B, T]`."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def close(actual: Tensor, expected: Tensor, what: str = "result", tolerance: float = TOLERANCE) -> None:
    """Equal up to rounding, relative to the largest value or 1."""
    scale = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale, msg=lambda text: f"{what}: {text}")


def keeps_summaries(model: SwatForCausalLM) -> bool:
    """Whether any layer keeps a summary, which cannot be taken back."""
    return any(one.kind == "summary" for layer in model.model.stack for one in layer.state_spec())


def grows(model: SwatForCausalLM) -> bool:
    """Whether any layer keeps everything."""
    return any(one.kind == "growing" for layer in model.model.stack for one in layer.state_spec())


def one_pass(model: SwatForCausalLM, ids: Tensor, mask: Tensor | None = None, **more: Any) -> Tensor:
    """Logits `[B, T, V]` without any past."""
    with torch.no_grad():
        return model(ids, attention_mask=mask, use_cache=False, **more).logits


def gradients(model: SwatForCausalLM, loss: Tensor) -> dict[str, Tensor]:
    """Of a loss with respect to every parameter, by name; the model's own are empty afterwards."""
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    missing = [name for name, gradient in found.items() if gradient is None]
    assert not missing, f"no gradient reaches {missing}"
    model.zero_grad(set_to_none=True)
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """All of them equal up to rounding, and not all zero."""
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        close(actual[name], gradient, f"gradient of {name}")
    dead = [name for name, gradient in expected.items() if not gradient.any()]
    assert not dead, f"nothing depends on {dead}"


def twin(model: SwatForCausalLM) -> SwatForCausalLM:
    """The same model once more, sharing nothing."""
    return copy.deepcopy(model)
