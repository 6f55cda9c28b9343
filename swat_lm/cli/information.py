"""`swat-lm info`: what a model costs, from its configuration alone."""

import itertools
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swat_lm.cli.console import key_value_table, messages, results
from swat_lm.cli.memory import print_memory
from swat_lm.cli.plan_costs import PLAN_WINDOW, print_plans
from swat_lm.named_recipes import is_recipe, recipe_names
from swat_lm.words import counted, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from swat_lm.model.configuration import SwatConfig
    from swat_lm.model.cost import LayerCost
    from swat_lm.recipe import Recipe

__all__ = ["info"]


def info(
    target: Annotated[
        str | None, typer.Argument(metavar="RECIPE|CHECKPOINT|PRESET", help="Leave out to list presets and recipes.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For a recipe: settings that replace its own.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=1, help="Sequence length of the figures; default as trained.")
    ] = None,
    plans: Annotated[
        bool, typer.Option("--plans", help="Compare what it costs which layers keep full attention beside windows.")
    ] = False,
    window: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"With --plans: the window of the others; default the model's own, else {PLAN_WINDOW}."
        ),
    ] = None,
    full_layers: Annotated[
        list[str] | None,
        typer.Option(help="With --plans: one more row, such as every:4 or 0,7,15; repeatable."),
    ] = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Of a recipe: predict what a training step needs, by `train.execution`.")
    ] = False,
    processes: Annotated[int, typer.Option(min=1, help="With --memory: processes that share a batch.")] = 1,
    available: Annotated[
        str | None, typer.Option(help="With --memory: a size such as 80GiB, to say the longest row that fits it.")
    ] = None,
) -> None:
    """Show what a model costs.

    Parameters, FLOPs per token, state bytes and reach; nothing is loaded but the configuration.

    \b
    Examples:
      swat-lm info swat-340m
      swat-lm info own-text model.sliding_window=256
      swat-lm info runs/mine --length 100000
      swat-lm info models/smollm2 --plans --window 256 --full-layers every:4
      swat-lm info own-text --memory --length 65536 --available 16GiB
    """
    if not plans and (window is not None or full_layers):
        raise ValueError("--window and --full-layers belong to --plans; for a recipe write model.sliding_window=256")
    if plans and target is None:
        raise ValueError("--plans: name a recipe, a checkpoint or a preset")
    if not memory and (processes != 1 or available is not None):
        raise ValueError("--processes and --available belong to --memory")
    if memory and plans:
        raise ValueError("--memory and --plans are two tables: give one of them")
    if memory:
        if target is None or not is_recipe(target):
            raise ValueError("--memory: name a recipe, whose batch and precision it predicts for")
        from swat_lm.recipe import load_recipe

        print_memory(load_recipe(target, overrides or []), length, processes, available)
        return
    if target is None:
        from swat_lm.model.presets import preset_names

        results().print("presets: " + ", ".join(preset_names()), markup=False)
        results().print("recipes: " + ", ".join(recipe_names()), markup=False)
        return
    config, trained_length = find_config(target, overrides or [], is_any=plans)
    from swat_lm.model.configuration import SwatConfig

    if plans:
        print_plans(config, window, full_layers or [], None if length is None else [length])
        return
    describe = describe_model if isinstance(config, SwatConfig) else describe_library_model
    results().print(key_value_table(describe(config, length or trained_length)))  # type: ignore[arg-type]


def find_config(target: str, overrides: list[str], is_any: bool = False) -> "tuple[PreTrainedConfig, int]":
    """The configuration and training length behind a recipe, a preset or a checkpoint (see `load_config`)."""
    from swat_lm.model.building import check_rows
    from swat_lm.model.configuration import SwatConfig
    from swat_lm.model.presets import preset_names
    from swat_lm.model.recipe_fields import config_from_recipe

    if reads_recipe(target, overrides):
        from swat_lm.recipe import load_recipe

        recipe = load_recipe(target, overrides)
        config = find_recipe_config(recipe)
        if isinstance(config, SwatConfig):
            check_rows(config, recipe.data.sequence_length)
        return config, recipe.data.sequence_length
    if overrides:
        raise ValueError(
            f"settings such as {overrides[0]!r} only go with a recipe (a .yaml file, or a name that `swat-lm recipes` "
            f"lists); got {target}"
        )
    if target in preset_names():
        config = config_from_recipe({"preset": target})
    elif not Path(target).exists() and "/" not in target:
        names = sorted({*preset_names(), *recipe_names()})
        raise ValueError(
            f"no recipe, checkpoint or preset {target!r}{did_you_mean(target.lower(), names, ';')} presets: "
            f"{', '.join(preset_names())}; `swat-lm recipes` lists the recipes"
        )
    else:
        config = load_config(target, is_any)
    # models with a recurrent state name no length
    return config, getattr(config, "max_position_embeddings", None) or 2048


def find_recipe_config(recipe: "Recipe") -> "PreTrainedConfig":
    """The configuration that a recipe trains."""
    from swat_lm.model.architectures import configure_model

    if recipe.model.get("init") is not None:
        from swat_lm.train.initial import begun_config

        return begun_config(recipe)
    return configure_model(recipe.model, None if "vocab_size" in recipe.model else size_of_vocabulary(recipe))


def reads_recipe(target: str, overrides: list[str]) -> bool:
    """Whether a target is read as a recipe; what a preset and a recipe of ours are both called costs the same."""
    from swat_lm.model.presets import preset_names

    return is_recipe(target) and (bool(overrides) or target not in preset_names())


def size_of_vocabulary(recipe: "Recipe") -> int | None:
    """The tokenizer's; None, with a remark, where it cannot be had but the recipe's preset has a size of its own."""
    from swat_lm.data import DataError, load_tokenizer, vocabulary_size
    from swat_lm.model.presets import preset_fields

    try:
        return vocabulary_size(load_tokenizer(recipe.data.tokenizer))
    except DataError as error:
        preset = recipe.model.get("preset")
        known = None if preset is None else preset_fields(preset).get("vocab_size")
        if known is None:
            raise ValueError(
                f"{error}; costs need only its size: give model.vocab_size=32000, say, or data.tokenizer=bytes"
            ) from error
        messages().print(
            f"tokenizer {recipe.data.tokenizer} is not here: counted with the {counted(known, 'token')} of the preset "
            f"{preset}",
            markup=False,
        )
        return None


def load_config(target: str, is_any: bool = False) -> "PreTrainedConfig":
    """The configuration, ours or a baseline's, of a checkpoint's folder or a name on the hub; no weights are read.

    With `is_any` it may be of any architecture, for whoever looks at it next to judge.

    Raises ValueError that names both where it is neither; only the first line of a library's many is passed on.
    """
    from transformers import AutoConfig

    from swat_lm.hub import hub_answers
    from swat_lm.model.architectures import check_known
    from swat_lm.model.loading import find_model_folder, know_library_of, model_type

    folder = find_model_folder(target)
    is_local = Path(folder).exists()
    if is_local:
        know_library_of(model_type(Path(folder)), folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=not is_local and not hub_answers())
        if not is_any:
            check_known(config, folder)
        return config
    except OSError as error:
        if Path(target).exists():
            raise
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"no folder {target}, and no such model could be had from the hub: {reason}") from error


def describe_model(config: "SwatConfig", length: int) -> list[tuple[str, str]]:
    """Names and figures for people."""
    from swat_lm.model import cost

    count = cost.count_parameters(config)
    reach, first = cost.reach(config), cost.first_kept(config)
    beside = f" and the first {first:,}" if first else ""
    tokens = counted(length, "token")
    state = cost.state_bytes(config, context=length, dtype_bytes=2)
    grows = f" after {tokens}, growing" if cost.grows(config) else ""
    plan = cost.plan_costs(config, length)
    return [
        ("parameters", f"{count.total:,} ({count.embedding:,} of them in the input embedding)"),
        ("layers", ", ".join(f"{count} x {words}" for words, count in Counter(layer.words for layer in plan).items())),
        ("width", f"{config.hidden_size:,}, {counted(config.num_attention_heads, 'head')} of {config.head_dim}"),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("reach", "everything before" if reach is None else counted(reach, "token") + beside),
        ("training", f"{cost.training_flops_per_token(config, length):.3g} FLOPs per token at {tokens}"),
        ("decoding", f"{cost.decoding_flops_per_token(config, length):.3g} FLOPs per token after {tokens}"),
        ("state", f"{counted(state, 'byte')} per stream in bf16{grows}"),
        *describe_plan(plan, length),
    ]


def describe_plan(plan: "list[LayerCost]", length: int) -> list[tuple[str, str]]:
    """A line for all layers that are equal, where not all are."""
    alike: dict[LayerCost, list[int]] = {}
    for layer in plan:
        alike.setdefault(layer._replace(index=0), []).append(layer.index)
    if len(alike) == 1:
        return []
    lines = []
    for layer, indices in alike.items():
        reach = "everything before" if layer.reach is None else f"{layer.reach:,} tokens"
        figures = (
            f"{layer.words}: {layer.parameters:,} parameters, {layer.state_bytes:,} bytes of state after {length:,} "
            f"tokens, reach {reach}, {layer.flops_per_token:.3g} FLOPs per token"
        )
        lines.append((f"layer {indices[0]}" if len(indices) == 1 else f"layers {index_words(indices)}", figures))
    return lines


def index_words(indices: list[int]) -> str:
    """`0 to 5, 7, 9`; of many, the first three and the last."""
    runs = [list(run) for _, run in itertools.groupby(indices, key=lambda index: index - indices.index(index))]
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    return ", ".join(parts if len(parts) <= 4 else [*parts[:3], "...", parts[-1]])


def describe_library_model(config: "PreTrainedConfig", length: int) -> list[tuple[str, str]]:
    """The same of a baseline from a library: counted, or estimated and called so."""
    from swat_lm.model.architectures import count_model_parameters, model_state_bytes, training_flops

    count, flops = count_model_parameters(config), training_flops(config, length)
    state, tokens = model_state_bytes(config, length), counted(length, "token")
    return [
        ("architecture", type(config).__name__.removesuffix("Config")),
        ("parameters", f"{count.total:,} ({count.embedding:,} of them in the input embedding)"),
        ("width", f"{config.hidden_size:,} in {counted(config.num_hidden_layers, 'layer')}"),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("training", f"{flops.per_token:.3g} FLOPs per token at {tokens} ({flops.method})"),
        ("state", "known only while it runs" if state is None else f"{counted(state, 'byte')} in bf16 after {tokens}"),
    ]
