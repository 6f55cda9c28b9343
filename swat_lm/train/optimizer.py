"""AdamW over a model's parameters, with weight decay on matrices only."""

import torch
from torch import nn

from swat_lm.recipe import TrainRecipe

__all__ = ["make_optimizer", "set_hyperparameters"]


def make_optimizer(model: nn.Module, train: TrainRecipe) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) with two groups: tensors of two or more dimensions decay (embeddings among them);
    norms, biases, slopes and other vectors do not.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("no parameter of the model requires a gradient: nothing to train")
    groups = [
        {"params": [parameter for parameter in trained if parameter.dim() >= 2], "decays": True},
        {"params": [parameter for parameter in trained if parameter.dim() < 2], "decays": False},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], fused=True)
    set_hyperparameters(optimizer, train, train.learning_rate)
    return optimizer


def set_hyperparameters(optimizer: torch.optim.Optimizer, train: TrainRecipe, learning_rate: float) -> None:
    """Write the recipe's values and this step's learning rate into every group.

    Done at every step, so that the recipe decides and not what a checkpoint restored.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
        group["betas"] = train.betas
        group["eps"] = train.eps
        group["weight_decay"] = train.weight_decay if group["decays"] else 0.0
