"""`model.init`: the weights that a run begins with instead of drawn ones, and the model they are of.

They come from a run of ours (its newest checkpoint, or one by its folder) or from an exported model, also of the hub.
The model is then that one: what the recipe itself says of it must agree, and so must the tokenizer. Once the run has
saved a checkpoint of its own, nothing of this is needed any more.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from swat_lm.data import DataError, load_tokenizer, vocabulary_size
from swat_lm.hub import hub_answers, stored_folder
from swat_lm.model.architectures import check_known, check_trainable, configure_model, library_keys, name_of
from swat_lm.model.loading import find_model_folder, know_library_of, load_causal_lm, model_type
from swat_lm.model.presets import preset_fields
from swat_lm.paths import local_path
from swat_lm.recipe import Recipe
from swat_lm.train.checkpoint import MANIFEST, Checkpoint, find_checkpoints, newest_checkpoint, read_manifest
from swat_lm.train.engine import Engine
from swat_lm.train.export import progress_bars_off
from swat_lm.train.run_folder import NOT_ARCHITECTURE, differing_fields
from swat_lm.words import counted

__all__ = [
    "Initial", "agreed", "begun_config", "check_initial", "config_of", "find_initial", "init_of", "load_initial",
    "plain_values", "without_init",
]  # fmt: skip

# what stands for itself: no list, and nothing that is left to follow from others
SINGLE = (bool, int, float, str)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


class Initial(NamedTuple):
    """Where the first weights of a run come from."""

    name: str
    """As the recipe names it."""
    config: PreTrainedConfig
    checkpoint: Checkpoint | None
    """A training checkpoint, verified; None: an exported model."""
    tokenizer: str | None
    """What `load_tokenizer` reads its tokenizer from; None where that is unknown."""

    @property
    def folder(self) -> Path | None:
        """The run's or the model's, whose text this model knows; None for a name on the hub."""
        path = local_path(self.name) if self.checkpoint is None else self.checkpoint.folder.resolve().parent.parent
        return path if path.exists() else None


def init_of(recipe: Recipe) -> str | None:
    """What the recipe says, if anything. Raises ValueError for what is no name."""
    name = recipe.model.get("init")
    if name is not None and (not isinstance(name, str) or not name.strip()):
        raise ValueError(f"model.init must name a run's folder, a checkpoint or an exported model; got {name!r}")
    return name


def without_init(model: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe says of the model itself."""
    return {key: value for key, value in model.items() if key != "init"}


def find_initial(name: str) -> Initial:
    """The model behind `model.init`. Raises ValueError naming it where there is none or it is damaged."""
    path = local_path(name)
    try:
        checkpoint = find_checkpoint(path)
        if checkpoint is not None:
            export = checkpoint.folder.resolve().parent.parent / "export"
            spec = str(export) if has_tokenizer(export) else checkpoint.recipe["data"]["tokenizer"]
            return Initial(name, config_of(checkpoint.model), checkpoint, spec)
        folder = find_model_folder(name)
        if Path(folder).exists():
            know_library_of(model_type(Path(folder)), folder)
        elif not hub_answers():
            folder = stored_folder(folder)
        config = AutoConfig.from_pretrained(folder)
        check_known(config, folder)
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, OSError) and not path.exists():
            reason = f"no run or model at {name}, and the hub gave no model of that name: {reason.split('. ')[0]}"
        raise ValueError(f"model.init: {reason}") from error
    return Initial(name, config, None, folder if not Path(folder).exists() or has_tokenizer(Path(folder)) else None)


def find_checkpoint(path: Path) -> Checkpoint | None:
    """The training checkpoint that a path means: itself, or the newest whole one of a run; None if it means none."""
    if not path.is_dir():
        return None
    if (path / MANIFEST).is_file():
        return read_manifest(path)
    if (path / "config.json").exists() or not find_checkpoints(path):
        return None
    return newest_checkpoint(path)[0]


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer lies in a folder."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def config_of(plain: Mapping[str, Any]) -> PreTrainedConfig:
    """A configuration from its plain values, as a checkpoint's manifest holds them."""
    kind = plain["model_type"]
    know_library_of(kind, "the checkpoint")
    return CONFIG_MAPPING[kind].from_dict(dict(plain))


def agreed(config: PreTrainedConfig, model: Mapping[str, Any], where: str) -> PreTrainedConfig:
    """The configuration, with what a recipe may say otherwise of it: how it is computed, and for which length.

    Raises ValueError naming each field of which the recipe says something else, and for unknown keys.
    """
    stated = {key: value for key, value in without_init(model).items() if (key, value) != ("preset", None)}
    name = stated.pop("architecture", name_of(config))
    if name != name_of(config):
        raise ValueError(f"{where} holds a model of architecture {name_of(config)}, the recipe's is {name}")
    if "preset" in stated:
        stated = {**preset_fields(stated.pop("preset")), **stated}
    held = {key: value for key, value in config.to_dict().items() if key in library_keys(type(config))}
    # what follows from others must not stand beside what it would follow from
    follows = {
        "sliding_window": "layer_types",
        "num_hidden_layers": "layer_types",
        "rope_theta": "rope_parameters",
        "rope_parameters": "rope_theta",
    }
    beside = {follows[key] for key in stated.keys() & follows.keys()} - stated.keys()
    kept = {key: value for key, value in held.items() if key not in beside}
    # plain numbers and words first: together, different ones may be no model at all
    single = {
        key for key in stated.keys() & kept.keys() if isinstance(stated[key], SINGLE) and isinstance(kept[key], SINGLE)
    }
    differing = differing_fields({key: kept[key] for key in single}, {key: stated[key] for key in single})
    if not differing:
        base = configure_model({"architecture": name, **held})
        differing = differing_fields(
            plain_values(base), plain_values(configure_model({"architecture": name, **kept, **stated}))
        )
    if differing:
        raise ValueError(
            f"{where} has another architecture than the recipe: {', '.join(differing)}; leave these keys of model out, "
            "or set them as they are there"
        )
    result = copy.deepcopy(config)
    for key in stated.keys() & {*NOT_ARCHITECTURE, "max_position_embeddings"}:
        setattr(result, key, stated[key])
    return result


def check_initial(recipe: Recipe) -> None:
    """What can be refused of `model.init` before there is a run folder.

    Raises ValueError. A run that has saved something goes on from that, whatever has become of the other model.
    """
    name = init_of(recipe)
    if name is None:
        return
    resume = recipe.train.resume
    if resume not in ("auto", "never"):
        raise ValueError(
            f"model.init ({name}) and train.resume ({resume}) both say which weights to begin with: train.resume goes "
            "on with a run and its optimizer, model.init begins a new one; leave one of them out"
        )
    if resume == "auto" and find_checkpoints(Path(recipe.out)):
        return
    initial = find_initial(name)
    agreed(initial.config, recipe.model, f"model.init: {name}")
    check_trainable({"architecture": name_of(initial.config)}, recipe.data.documents)
    check_vocabulary(initial, load_tokenizer(recipe.data.tokenizer), recipe.data.tokenizer)


def begun_config(recipe: Recipe) -> PreTrainedConfig:
    """The configuration of the model that a recipe with `model.init` begins with; raises ValueError."""
    name = init_of(recipe)
    assert name is not None
    return agreed(find_initial(name).config, recipe.model, f"model.init: {name}")


def check_vocabulary(initial: Initial, tokenizer: PreTrainedTokenizerFast, spec: str) -> None:
    """Raise ValueError for a tokenizer, `spec` in the recipe, whose tokens are not those that the model has learnt."""
    size, ours = initial.config.vocab_size, vocabulary_size(tokenizer)
    advice = f"set data.tokenizer={initial.tokenizer}" if initial.tokenizer else "set data.tokenizer to the model's own"
    if size < ours:
        raise ValueError(
            f"model.init: {initial.name} has a vocabulary of {size:,}, the tokenizer ({spec}) one of {ours:,}: {advice}"
        )
    if initial.tokenizer is None:
        return
    try:
        theirs = load_tokenizer(initial.tokenizer).get_vocab()
    except DataError:
        # a checkpoint outlives its tokenizer; of that the size alone is known
        return
    other = theirs.items() ^ tokenizer.get_vocab().items()
    if other:
        raise ValueError(
            f"model.init: {initial.name} has learnt the tokens of another tokenizer than data.tokenizer ({spec}), "
            f"{counted(len({number for _, number in other}), 'id')} stand for something else: {advice}"
        )


def load_initial(engine: Engine, initial: Initial, model: PreTrainedModel) -> None:
    """Fill a model that was built on the CPU with the weights; raises ValueError for weights that do not fit."""
    if initial.checkpoint is not None:
        engine.read_weights(initial.checkpoint.folder, model)
        return
    with progress_bars_off():
        weights = load_causal_lm(initial.name, "cpu").state_dict()
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"model.init: {initial.name}: {' '.join(str(error).split())}") from error


def plain_values(config: PreTrainedConfig) -> dict[str, Any]:
    """A configuration as plain values, as a checkpoint's manifest keeps it."""
    return json.loads(config.to_json_string(use_diff=False))
