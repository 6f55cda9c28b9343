"""What a recipe's `model:` may say of a model of ours, and the configuration that it describes."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from swat_lm.model.configuration import ALIASES, RECIPE_KEYS, SwatConfig, in_layers
from swat_lm.model.fitting import explain_misfit
from swat_lm.model.plan import kinds_with
from swat_lm.model.presets import preset_fields
from swat_lm.model.window_plan import with_full_layers
from swat_lm.words import did_you_mean

# the tokenizer's, the row's, or how a model is run and not what it is
DECIDED_ELSEWHERE = ("vocab_size", "max_position_embeddings", "use_cache", "attention_backend")
DEFAULTS = {
    field.name: default
    for field in fields(SwatConfig)  # type: ignore[arg-type]
    if field.name in RECIPE_KEYS and field.name not in DECIDED_ELSEWHERE
    and (default := field.default if field.default_factory is MISSING else field.default_factory()) is not None
}  # fmt: skip
"""By field, what a recipe that says nothing gets."""


def check_fields(values: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    """Raise ValueError, naming the nearest valid one, for a key of `what` that is not among `known`."""
    for key in values:
        if key not in known and key not in RECIPE_KEYS and (owners := kinds_with(str(key))):
            raise ValueError(f"{what}: unknown key {key!r}; {in_layers(key, owners)}")
        if key not in known:
            near = [ALIASES[key]] if key in ALIASES else known
            hint = did_you_mean(ALIASES.get(key, key), near, f"; valid keys: {', '.join(known)}")
            raise ValueError(f"{what}: unknown key {key!r}{hint}")
    slopes = values.get("slopes")
    if any(isinstance(spec, int) for spec in (slopes if isinstance(slopes, list) else [slopes])):
        # YAML 1.1 reads 8:4 as a number to the base 60
        raise ValueError(f"{what}: slopes came as a number; a split such as 8:4 must be quoted in YAML: '8:4'")


def written_out(model: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's `model:` with every setting of ours that it leaves open, as it is today.

    Whoever trains on, or trains the same again, from what this gives has the same model after a default has changed.
    What a tokenizer, the data or other settings decide stays open, and so does what is None.
    """
    preset = model.get("preset")
    return {**DEFAULTS, **({} if preset is None else preset_fields(preset)), **model}


def config_from_recipe(model: Mapping[str, Any], vocab_size: int | None = None) -> SwatConfig:
    """Build the configuration that a recipe's `model:` mapping describes.

    Args:
        model: fields of SwatConfig, and optionally `preset: NAME` whose values they replace and `full_layers`: which
            layers keep full attention beside the window of the others (swat_lm/model/window_plan.py).
        vocab_size: the tokenizer's; used where the mapping itself names no vocab_size.

    Raises:
        ValueError: an unknown key (the nearest valid one is named), an unknown preset, a wrong value, or a vocab_size
            smaller than the tokenizer's.
    """
    values = dict(model)
    known = (*RECIPE_KEYS, "preset", "full_layers")
    check_fields({name: value for name, value in values.items() if name != "mixers"}, known, "model")
    preset, full = values.pop("preset", None), values.pop("full_layers", None)
    if vocab_size is not None:
        if values.get("vocab_size", vocab_size) < vocab_size:
            raise ValueError(
                f"model: vocab_size {values['vocab_size']} is smaller than the tokenizer's {vocab_size}; "
                "leave it out or raise it"
            )
        values.setdefault("vocab_size", vocab_size)
    if preset is not None:
        values = {**preset_fields(preset), **values}
    try:
        config = SwatConfig(**values)
        return config if full is None else with_full_layers(config, full)
    except StrictDataclassError as error:
        raise ValueError(f"model: {explain_misfit(error, SwatConfig, values)}") from error
