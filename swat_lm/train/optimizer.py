"""AdamW over a model's parameters: weight decay on matrices only, unless a layer says otherwise of a parameter."""

import math
from typing import Any

import torch
from torch import nn

from swat_lm.layers.base import Layer
from swat_lm.recipe import TrainRecipe

__all__ = ["make_optimizer", "set_hyperparameters"]

OPTIONS = ("weight_decay", "learning_rate_factor")
# what vectors have anyway, and everything
USUAL = (("weight_decay", 0), ("learning_rate_factor", 1))


def make_optimizer(model: nn.Module, train: TrainRecipe) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101): tensors of two or more dimensions decay (embeddings among them); norms, biases, slopes
    and other vectors do not. What layers say by `optimizer_options` goes before that, in groups of its own.

    Raises ValueError for options that do not exist.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise ValueError("no parameter of the model requires a gradient: nothing to train")
    options = options_by_parameter(model)
    # the two usual groups first, as checkpoints of before options have them
    groups: dict[tuple[Any, ...], dict[str, Any]] = {
        (decays,): {"params": [], "decays": decays} for decays in (True, False)
    }
    for name, parameter in trained.items():
        own = {option: value for option, value in options.get(name, {}).items() if (option, value) not in USUAL}
        decays = parameter.dim() >= 2 and options.get(name, {}).get("weight_decay") != 0
        key = (decays, *sorted(own.items()))
        group = {"params": [], "decays": decays, **{f"own_{option}": value for option, value in own.items()}}
        groups.setdefault(key, group)["params"].append(parameter)
    optimizer = torch.optim.AdamW([group for group in groups.values() if group["params"]], fused=True)
    set_hyperparameters(optimizer, train, train.learning_rate)
    return optimizer


def options_by_parameter(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What layers say, by the parameter's name in the model."""
    found = {}
    for place, layer in model.named_modules():
        if not isinstance(layer, Layer):
            continue
        names = {name for name, _ in layer.named_parameters()}
        for name, options in layer.optimizer_options().items():
            if name not in names:
                raise ValueError(f"{layer.name}: optimizer_options names {name!r}, which is no parameter of the layer")
            for option, value in options.items():
                number = type(value) in (int, float) and math.isfinite(value) and value >= 0
                if option not in OPTIONS or not number:
                    raise ValueError(
                        f"{layer.name}: optimizer_options of {name}: expected {' or '.join(OPTIONS)} and a number of "
                        f"at least 0; got {option}={value!r}"
                    )
            found[f"{place}.{name}" if place else name] = options
    return found


def set_hyperparameters(optimizer: torch.optim.Optimizer, train: TrainRecipe, learning_rate: float) -> None:
    """Write the recipe's values and this step's learning rate into every group.

    Done at every step, so that the recipe and the layers decide and not what a checkpoint restored.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("own_learning_rate_factor", 1.0)
        group["betas"] = train.betas
        group["eps"] = train.eps
        group["weight_decay"] = group.get("own_weight_decay", train.weight_decay if group["decays"] else 0.0)
