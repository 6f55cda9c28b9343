"""The one loop over layers: whoever asks, for a training step, a chunk of a stream, a decoded token or `generate()`."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from swat_lm.layers.base import NOTHING, Auxiliary, InPlace, Layer, Past
from swat_lm.layers.chunk import Chunk
from swat_lm.layers.lean import LayerPlan


def check_chunk(layers: Sequence[Layer], chunk: Chunk, has_past: bool = False) -> None:
    """Raise ValueError, naming the layer, where one refuses such a chunk: before anything is kept of it.

    `has_past`: whether the layers go on from a past, or are to keep what the next chunk needs.
    """
    if chunk.windows is not None and len(chunk.windows) != len(layers):
        raise ValueError(f"windows: expected one per layer ({len(layers)}), got {len(chunk.windows)}")
    if has_past:
        check_goes_on(layers)
    for index, layer in enumerate(layers):
        reason = layer.refuses(chunk)
        if reason is not None:
            raise ValueError(f"layer {index} ({layer.name}): {reason}")


def check_goes_on(layers: Sequence[Layer]) -> None:
    """Raise ValueError, naming the layer, where one cannot go on from a past."""
    for index, layer in enumerate(layers):
        reason = layer.refuses_past()
        if reason is not None:
            raise ValueError(f"layer {index} ({layer.name}): {reason}")


def run_layers(
    layers: Sequence[Layer], hidden: Tensor, chunk: Chunk, pasts: Sequence[Past] | None = None
) -> tuple[Tensor, list[Any], list[Auxiliary]]:
    """Hidden states `[B, T, M]` through all layers; their pasts for the next chunk, and what they say beside.

    A layer that shortens hands fewer tokens on. Raises ValueError for a chunk that a layer refuses.
    """
    check_chunk(layers, chunk, has_past=pasts is not None)
    after, said = [], []
    for index, layer in enumerate(layers):
        past = None if pasts is None else pasts[index]
        # positional, so that a reentrant checkpoint sees the hidden states' gradient
        hidden, past, auxiliary = layer(hidden, chunk, past)
        if pasts is not None and past is None:
            raise AssertionError(f"layer {index} ({layer.name}) got a past and returned none: return past.after()")
        if hidden.shape[1] != chunk.num_tokens:
            chunk = chunk.tail(hidden.shape[1])
        after.append(past)
        said.append(NOTHING if auxiliary is None else auxiliary)
    return hidden, after, said


def stepped_over(layers: nn.ModuleList) -> list[nn.Module]:
    """The modules that a step does not call, but reads from: layers, their mixers and short convolutions."""
    return [module for module in layers.modules() if hasattr(type(module), "step") or isinstance(module, nn.Conv1d)]


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody waits for the module's call: by a hook, or to bring its weights."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "_hf_hook" in module.__dict__)


def step_layers(
    layers: Sequence[Layer],
    hidden: Tensor,
    chunk: Chunk,
    pasts: Sequence[InPlace],
    plans: Sequence[LayerPlan | None] | None = None,
    position: int | None = None,
) -> Tensor:
    """One real token per row, `[B, M]`, through all layers, in place over slots; inference only.

    Layers that have a plan run by it; `position` is where all rows stand, None where they stand apart.
    """
    for layer, past, plan in zip(layers, pasts, plans or [None] * len(layers), strict=True):
        if plan is None:
            hidden = layer.step(hidden.unsqueeze(1), chunk, past).squeeze(1)
        else:
            hidden = plan.step(hidden, chunk, past, position)
    return hidden
