"""What a training step minimises: one file per objective; `OBJECTIVES` is the table that `train.objective` names."""

from transformers import PreTrainedConfig

from swat_lm.model.building import layers_without_weights
from swat_lm.model.configuration import SwatConfig
from swat_lm.recipe import Recipe
from swat_lm.train.execution import execution_of
from swat_lm.train.objectives.base import Loss, Objective, ObjectiveSettings
from swat_lm.train.objectives.last_tokens import LastTokens
from swat_lm.train.objectives.masked_next_token import MaskedNextToken
from swat_lm.train.objectives.next_token import NextToken
from swat_lm.validation import build
from swat_lm.words import did_you_mean

__all__ = [
    "OBJECTIVES", "LastTokens", "Loss", "MaskedNextToken", "NextToken", "Objective", "ObjectiveSettings",
    "check_layers", "make_objective",
]  # fmt: skip

OBJECTIVES: dict[str, type[Objective]] = {kind.name: kind for kind in (NextToken, MaskedNextToken, LastTokens)}


def check_layers(objective: str, config: PreTrainedConfig) -> None:
    """Raise ValueError, naming the layer, for a model of ours that an objective of `OBJECTIVES` cannot train."""
    if not isinstance(config, SwatConfig):
        return
    for index, layer in enumerate(layers_without_weights(config)):
        reason = OBJECTIVES[objective].refuses_layer(layer)
        if reason is not None:
            raise ValueError(f"train.objective: {objective} cannot train layer {index} ({layer.name}), which {reason}")


def make_objective(recipe: Recipe) -> Objective:
    """The objective that a recipe names, with its settings.

    Raises ValueError for an unknown one or an unknown setting (the nearest valid one is named), and for data that does
    not carry what the objective needs.
    """
    name = recipe.train.objective
    if name not in OBJECTIVES:
        hint = did_you_mean(name, OBJECTIVES, f"; known are {', '.join(OBJECTIVES)}")
        raise ValueError(f"train.objective: unknown objective {name!r}{hint}")
    kind = OBJECTIVES[name]
    settings = build(kind.Settings, recipe.train.objective_settings, "train.objective_settings")
    reason = kind.refuses(recipe.data)
    if reason is not None:
        raise ValueError(f"train.objective: {name} {reason}")
    execution = execution_of(recipe.train)
    reason = kind.refuses_execution(execution)
    if reason is not None:
        raise ValueError(f"train.execution: {execution} does not serve {name}, which {reason}")
    return kind(settings)
