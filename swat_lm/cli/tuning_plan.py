"""What `swat-lm tune` measures: every kind of attention of a model, or the one that options describe."""

import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from swat_lm.cli.information import find_config, reads_recipe
from swat_lm.cli.outputs import check_file
from swat_lm.words import counted

if TYPE_CHECKING:
    import torch

    from swat_lm.ops.triton.configurations import Problem

__all__ = ["Attention", "Call", "Described", "Model", "Round", "check_tiles", "check_word", "plan_rounds", "remarks"]

# of a call that is described by options, at least
DEFAULT_LENGTH = 4096


class Described(NamedTuple):
    """Attention in the words of the options, by their names; None where one was not given."""

    window: int | None
    head_dim: int | None
    heads: int | None
    kv_heads: int | None
    score_function: str | None
    rotary: bool | None


class Attention(NamedTuple):
    """The attention of one layer, as far as tiles depend on it."""

    window: int | None
    head_dim: int
    num_heads: int
    num_kv_heads: int
    score_function: str
    score_bias: float
    rotary: bool

    @property
    def name(self) -> str:
        """What tells the kinds of one model apart."""
        window = "full attention" if self.window is None else f"window {self.window:,}"
        return f"{self.score_function}, {window}"


class Model(NamedTuple):
    """All layers, and how they are called unless the user says otherwise."""

    layers: list[Attention]
    length: int
    packed: bool


class Call(NamedTuple):
    """What one measurement runs."""

    length: int
    batch: int
    dtype: "torch.dtype"
    packed: bool


class Round(NamedTuple):
    """One kind of attention to measure, and the layers that its tiles will serve."""

    attention: Attention
    problem: "Problem"
    layers: list[Attention]


def check_word(given: str, option: str, allowed: tuple[str, ...]) -> str:
    """The word; raises ValueError for one that an option does not know."""
    if given not in allowed:
        raise ValueError(f"{option}: expected {', '.join(allowed[:-1])} or {allowed[-1]}; got {given!r}")
    return given


def check_tiles(out: Path) -> None:
    """Raise for a file that could not be written, or that is there and is no file of tiles."""
    from swat_lm.ops.triton.configurations import read_tuned

    check_file(out, "--out")
    if out.exists():
        try:
            read_tuned(out)
        except ValueError as error:
            raise ValueError(f"--out: {error}") from error


def from_options(described: Described) -> Model:
    """One layer as the options say; raises ValueError for one that is missing or does not fit."""
    window, head_dim, heads, kv_heads, score_function, rotary = described
    if window is None or head_dim is None or heads is None:
        needed = {"--window": window, "--head-dim": head_dim, "--heads": heads}
        missing = [option for option, value in needed.items() if value is None]
        raise ValueError(
            "name a recipe, a checkpoint or a preset whose attention to measure, or describe it; "
            f"missing for that: {', '.join(missing)}"
        )
    kv_heads = heads if kv_heads is None else kv_heads
    rotary = True if rotary is None else rotary
    score_function = "sigmoid" if score_function is None else score_function
    score_function = check_word(score_function, "--score-function", ("sigmoid", "softmax"))
    if heads % kv_heads:
        raise ValueError(f"--kv-heads: {heads} query heads cannot be shared evenly by {kv_heads} key/value heads")
    if rotary and head_dim % 2:
        raise ValueError(f"--head-dim: rotary needs an even head size, got {head_dim}; or add --no-rotary")
    layer = Attention(window, head_dim, heads, kv_heads, score_function, 0.0, rotary)
    return Model([layer], max(DEFAULT_LENGTH, 2 * window), packed=False)


def from_source(source: str, overrides: list[str], described: Described) -> Model:
    """The layers of a recipe, a checkpoint or a preset; raises ValueError where none has a window."""
    extra = [name for name, value in described._asdict().items() if value is not None]
    if extra:
        option = f"--{extra[0].replace('_', '-')}"
        raise ValueError(f"{option} describes attention without a source, and {source} has its own: drop one of them")
    config, length = find_config(source, overrides)
    from swat_lm.layers import AttentionLayer
    from swat_lm.model.configuration import SwatConfig
    from swat_lm.model.families import family_words
    from swat_lm.recipe import load_recipe

    if not isinstance(config, SwatConfig):
        raise ValueError(
            f"{source}: a {config.model_type} of a library, whose layers these kernels do not serve; "
            f"{family_words('and')} weights become a SWAT model by `swat-lm convert`"
        )
    layers = []
    for index, entry in enumerate(config.plan()):
        if not issubclass(entry.kind, AttentionLayer):
            continue
        held = config.attention_settings(index)
        heads = held.head_dim, held.num_attention_heads, held.num_key_value_heads
        is_rotary = config.rotary(index) is not None
        layers.append(Attention(held.sliding_window, *heads, held.score_function, held.bias(), is_rotary))
    if all(layer.window is None for layer in layers):
        raise ValueError(
            f"{source}: no layer has a window, so there is nothing to tune; describe a call of your own by --window, "
            "--head-dim and --heads"
        )
    is_packed = reads_recipe(source, overrides) and load_recipe(source, overrides).data.documents == "separate"
    return Model(layers, length, is_packed)


def plan_rounds(layers: list[Attention], call: Call) -> list[Round]:
    """One round for all layers whose tiles are kept under the same name, with the commonest of them."""
    from swat_lm.ops.triton.autotune import check_gpu, problem_here
    from swat_lm.ops.triton.configurations import tuned_key

    # heads too large for the kernels, say
    check_gpu(call.dtype, layers[0].head_dim)
    problems: dict[Attention, Problem] = {}
    alike: dict[str, list[Attention]] = {}
    for layer in layers:
        window = call.length if layer.window is None else min(layer.window, call.length)
        group = layer.num_heads // layer.num_kv_heads
        problems[layer] = problem_here(
            window, layer.head_dim, group, call.dtype, layer.score_function, layer.rotary
        )  # fmt: skip
        alike.setdefault(tuned_key("", problems[layer]), []).append(layer)
    rounds = []
    for group in alike.values():
        counts = Counter(group)
        chosen = max(counts, key=lambda layer: (counts[layer], problems[layer].window))
        rounds.append(Round(chosen, problems[chosen], group))
    return rounds


def remarks(rounds: list[Round], call: Call) -> list[str]:
    """What is measured in another way than one may expect, a line each."""
    from swat_lm.ops.triton.configurations import FORM_VARIABLE

    notes = []
    for attention, _, layers in rounds:
        window = attention.window
        if window is None:
            notes.append(
                f"full attention is measured, and kept, as a window of the {counted(call.length, 'token')} of --length"
            )
        elif window > call.length:
            notes.append(
                f"window {window:,} is longer than a sequence of {counted(call.length, 'token')}, which sees no more: "
                f"measured, and kept, as window {call.length:,}; for its own, raise --length"
            )
        others = {layer.name for layer in layers} - {attention.name}
        if others:
            notes.append(f"{'; '.join(sorted(others))}: has the tiles of {attention.name}, which are measured")
    if FORM_VARIABLE in os.environ:
        notes.append(f"{FORM_VARIABLE} is set: it goes before the form of the backward that is found here")
    return notes
