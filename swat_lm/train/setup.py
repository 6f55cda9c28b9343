"""Everything a run needs before its first step: folder checked, data prepared, model built or continued."""

import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from swat_lm.data import (
    BatchSource,
    Progress,
    load_tokenizer,
    prepare,
    resolve_sources,
    vocabulary_size,
)
from swat_lm.data.synthetic import SyntheticSource, is_synthetic, synthetic_task
from swat_lm.files import write_text
from swat_lm.model.architectures import OURS, build_model, check_trainable, configure_model, training_flops
from swat_lm.model.building import check_rows
from swat_lm.model.configuration import SwatConfig
from swat_lm.model.recipe_fields import written_out
from swat_lm.recipe import Recipe, dump_recipe
from swat_lm.train.checkpoint import Checkpoint
from swat_lm.train.engine import Engine
from swat_lm.train.evaluation import HeldOut
from swat_lm.train.execution import check_execution, set_execution
from swat_lm.train.initial import (
    Initial,
    agreed,
    check_initial,
    config_of,
    find_initial,
    init_of,
    load_initial,
    plain_values,
    without_init,
)
from swat_lm.train.metrics import check_loggers
from swat_lm.train.objectives import Objective, check_layers, make_objective
from swat_lm.train.optimizer import make_optimizer
from swat_lm.train.ownership import check_export
from swat_lm.train.run_folder import (
    check_continuation,
    check_model,
    choose_start,
    describe_new_schedule,
    scales_rotary,
)
from swat_lm.train.trained_text import write_trained_text

__all__ = ["Training", "check_beforehand", "set_up"]


@dataclass(frozen=True)
class Training:
    """A run ready for its next step."""

    recipe: Recipe
    engine: Engine
    model: nn.Module
    optimizer: torch.optim.Optimizer
    objective: Objective
    tokenizer: PreTrainedTokenizerFast
    source: BatchSource | SyntheticSource
    held_out: HeldOut | None
    """None if the recipe evaluates never or holds nothing out."""
    start: Checkpoint | None
    """The checkpoint it continues, None for a new run."""
    config: dict[str, Any]
    """The model's configuration as plain values."""
    data: str
    """Identity of the prepared tokens, or the task."""
    flops_per_token: float


def check_beforehand(engine: Engine, recipe: Recipe) -> None:
    """What can be refused before there is a run folder: a misspelt source, say, must not leave an empty one behind."""
    engine.rows()
    engine.on_main(lambda: check_loggers(recipe.train.loggers))
    if init_of(recipe) is None:
        check_trainable(recipe.model, recipe.data.documents)
    make_objective(recipe)
    engine.on_main_only(lambda: check_sources(recipe))
    engine.on_main_only(lambda: check_initial(recipe))


def set_up(engine: Engine, recipe: Recipe, on_progress: Callable[[Progress], None] | None = None) -> Training:
    """Check, prepare and build, the cheap and likely failures first; nothing is overwritten before all checks passed.

    `on_progress` hears how far tokenising is, on the main process. Raises ValueError or OSError.
    """
    out = Path(recipe.out)
    if recipe.train.export:
        engine.on_main(lambda: check_export(out / "export"))
    start, damaged = engine.on_main(lambda: choose_start(out, recipe.train.resume))
    if damaged and engine.is_main:
        assert start is not None
        warnings.warn(f"{'; '.join(damaged)}; continuing from {start.folder} instead", stacklevel=4)
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    init = init_of(recipe)
    initial = find_initial(init) if init is not None and start is None else None
    config = configure(recipe, tokenizer, start, initial)
    plain_config = plain_values(config)
    check_execution(recipe.train, config)
    check_layers(recipe.train.objective, config)
    # a run of before goes on as it began
    if start is None and isinstance(config, SwatConfig):
        check_rows(config, recipe.data.sequence_length)
    if start is not None:
        check_model(start, plain_config)

    source, held_out, key = open_rows(engine, recipe, vocabulary_size(tokenizer), on_progress)
    if start is not None and start.folder.parent.parent.resolve() == out.resolve():
        check_continuation(start, json.loads(json.dumps(asdict(recipe))), key)
        remark = describe_new_schedule(start, recipe)
        if remark and engine.is_main:
            warnings.warn(remark, stacklevel=4)
    if start is not None and start.step > recipe.train.steps:
        raise ValueError(
            f"checkpoint {start.folder} is at step {start.step}, beyond train.steps ({recipe.train.steps}): raise "
            "train.steps, or choose another `out`"
        )

    # on the CPU, so that drawn weights depend on the seed alone
    torch.manual_seed(recipe.seed)
    model = build_model(config)
    if initial is not None:
        load_initial(engine, initial, model)
    set_execution(model, recipe.train, out)
    model = engine.set_up(model).train()
    optimizer, objective = make_optimizer(model, recipe.train), make_objective(recipe)
    if start is not None:
        objective.load_state_dict(engine.read_state(start.folder, model, optimizer, objective.state_dict()))
    if held_out is not None:
        held_out.check(engine, objective)
    store = source.store if isinstance(source, BatchSource) else None
    earlier = start.folder.resolve().parent.parent if start else initial.folder if initial else None
    engine.on_main(lambda: write_trained_text(out, store, earlier))
    engine.on_main(lambda: write_text(out / "recipe.yaml", dump_recipe(resolved(recipe))))
    return Training(
        recipe, engine, model, optimizer, objective, tokenizer, source, held_out, start, plain_config, key,
        training_flops(config, recipe.data.sequence_length).per_token,
    )  # fmt: skip


def resolved(recipe: Recipe) -> Recipe:
    """The recipe with all settings of a model of ours that it left open; a model that it begins with has its own."""
    if init_of(recipe) is not None or recipe.model.get("architecture", OURS) != OURS:
        return recipe
    return replace(recipe, model=written_out(recipe.model))


def check_sources(recipe: Recipe) -> None:
    """Raise ValueError for sources that lead nowhere, or a task that does not exist."""
    if is_synthetic(recipe.data.sources):
        synthetic_task(recipe.data.sources[0])
    else:
        resolve_sources(recipe.data.sources)


def open_rows(
    engine: Engine, recipe: Recipe, vocab_size: int, on_progress: Callable[[Progress], None] | None
) -> tuple[BatchSource | SyntheticSource, HeldOut | None, str]:
    """What a run trains on, what it is evaluated on, and the identity of both: of a task, or of text.

    Text is prepared first. The identity is equal for the same tokens, or the same task.
    """
    data, size = recipe.data, recipe.train.batch_size
    if is_synthetic(data.sources):
        task, counts = synthetic_task(data.sources[0]), None
        key = str(task)

        def open_split(split: str, seed: int) -> BatchSource | SyntheticSource:
            return SyntheticSource(task, split, data.sequence_length, seed, batch_size=size, vocab_size=vocab_size)
    else:
        # the others then find what the main process made (or, without a shared disk, make it themselves)
        engine.on_main_only(lambda: prepare(data, on_progress))
        store = prepare(data)
        counts = None if store.token_bytes is None else torch.from_numpy(store.token_bytes)
        key = store.key

        def open_split(split: str, seed: int) -> BatchSource | SyntheticSource:
            return BatchSource(
                store,
                split,
                data.sequence_length,
                data.documents,
                seed,
                batch_size=size,
                shuffle=data.shuffle or split == "held_out",
            )

    held_out = None
    if data.held_out > 0 and recipe.train.evaluate_every > 0:
        # its rows do not depend on the run's seed
        held_out = HeldOut(open_split("held_out", data.split_seed), recipe.train.evaluate_batches, counts)
    return open_split("train", recipe.seed), held_out, key


def configure(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, start: Checkpoint | None, initial: Initial | None
) -> PreTrainedConfig:
    """The model's configuration; special tokens the recipe leaves open are the tokenizer's, for generation.

    With `model.init` it is that of the model that the run began with, which its own checkpoints know too.
    """
    if initial is not None:
        config = agreed(initial.config, recipe.model, f"model.init: {initial.name}")
    elif start is not None and init_of(recipe) is not None:
        config = agreed(config_of(start.model), recipe.model, f"checkpoint {start.folder}")
    else:
        config = configure_model(without_init(recipe.model), vocabulary_size(tokenizer))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(config, name) is None:
            setattr(config, name, getattr(tokenizer, name))
    # where rotary is scaled by it, the training length is part of the model that a run begins with
    fixed = init_of(recipe) is not None and scales_rotary(plain_values(config))
    states_length = bool(recipe.model.keys() & {"preset", "max_position_embeddings"}) or fixed
    if not states_length and hasattr(config, "max_position_embeddings"):
        config.max_position_embeddings = recipe.data.sequence_length
    return config
