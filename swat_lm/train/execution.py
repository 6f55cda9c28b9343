"""How the layers of a run are run: what the recipe asks for, checked against the model before anything is prepared."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from swat_lm.model.building import layers_without_weights
from swat_lm.model.configuration import SwatConfig
from swat_lm.model.execution.table import EXECUTIONS, make_execution
from swat_lm.recipe import TrainRecipe

__all__ = ["check_execution", "execution_of", "set_execution"]

SETTINGS = "train.execution_settings"
OF_LIBRARIES = ("plain", "checkpoint")


def execution_of(train: TrainRecipe) -> str:
    """The word of `EXECUTIONS` that a recipe asks for, in whichever spelling."""
    return "checkpoint" if train.activation_checkpointing else train.execution


def settings_of(train: TrainRecipe, out: Path) -> dict[str, Any]:
    """Its settings; what lies on disk lies in the run's folder unless the recipe names another."""
    values = dict(train.execution_settings)
    if values.get("carries") == "disk" and values.get("folder") is None:
        values["folder"] = str(out)
    return values


def check_execution(train: TrainRecipe, config: PreTrainedConfig) -> None:
    """Raise ValueError for settings that do not exist, or layers that cannot be run so; the message names them."""
    name = execution_of(train)
    execution = make_execution(name, train.execution_settings, SETTINGS)
    if isinstance(config, SwatConfig):
        reason = execution.refuses(layers_without_weights(config))
        if reason is not None:
            raise ValueError(f"train.execution: {name} cannot run this model: {reason}")
    elif name not in OF_LIBRARIES:
        raise ValueError(
            f"train.execution: {name} runs the layers of swat-lm, and a model of a library has its own: take "
            f"{' or '.join(OF_LIBRARIES)} (others, {', '.join(EXECUTIONS.keys() - set(OF_LIBRARIES))}, are for "
            "model.architecture=swat)"
        )


def set_execution(model: nn.Module, train: TrainRecipe, out: Path) -> None:
    """Tell a model how to run its layers, once `check_execution` has passed."""
    name = execution_of(train)
    if isinstance(model.config, SwatConfig):
        model.set_execution(name, **settings_of(train, out))  # type: ignore[operator]
    elif name == "checkpoint":
        model.activation_checkpointing_enable()  # type: ignore[operator]
