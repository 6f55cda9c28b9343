"""What a model cannot hold, said before any hour is spent: its positions, and the memory of its cache."""

from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from swat_lm.evaluate.streaming_model import StreamingModel, SwatStreamingModel, probe
from swat_lm.evaluate.windows import kept_first_tokens, theoretical_reach
from swat_lm.layers.relative_bias import RelativeBias
from swat_lm.model.cost import state_bytes
from swat_lm.ops.memory import available_bytes
from swat_lm.words import counted

__all__ = ["available_bytes", "check_length", "extrapolates_beyond", "position_limit", "stream_bytes"]

PROBE_TOKENS = 24


def check_length(streaming: StreamingModel, length: int, batch_size: int) -> None:
    """Raise ValueError if B streams of this many tokens cannot be read: too many positions, or too little memory."""
    limit = position_limit(streaming.model)
    name = type(streaming.model).__name__
    if limit is not None and length > limit:
        raise ValueError(f"{name} has no position beyond token {limit:,}: it cannot read {length:,}; ask for less")
    each, free = stream_bytes(streaming, length), available_bytes(streaming.model.device)
    if free is None or each * batch_size <= free:
        return
    fits = free // each
    advice = f"read at most {fits} side by side (--batch-size)" if fits else "ask for less, or for a --window"
    raise ValueError(
        f"{name} keeps {gibibytes(each)} of the past of each stream of {counted(length, 'token')}, "
        f"{gibibytes(each * batch_size)} for {batch_size}; {gibibytes(free)} are free: {advice}"
    )


def position_limit(model: PreTrainedModel) -> int | None:
    """Tokens after which a model has no positions, or others than before; None where there is no end.

    Learned positions end. Rotary angles that change with the length of the sequence ("dynamic", "longrope") are as
    they were only up to the original length, and beyond it a loss would depend on the chunks.
    """
    config = cast(Any, model.config.get_text_config())
    most = getattr(config, "max_position_embeddings", None)
    if not isinstance(most, int):
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]
    changing = [kind for kind in kinds if kind.get("rope_type") in ("dynamic", "longrope")]
    if changing:
        return min(int(kind.get("original_max_position_embeddings", most)) for kind in changing)
    words = model.get_input_embeddings()
    # buckets of distances have no end
    others = (words, *(module for module in model.modules() if isinstance(module, RelativeBias)))
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding) and module not in others]
    # some reserve a few rows before the first position
    return most if any(most <= table.num_embeddings < most + 8 for table in tables) else None


def extrapolates_beyond(model: PreTrainedModel) -> int | None:
    """The length that a model without windows was made for, after which its positions are new to it; else None."""
    config = cast(Any, model.config.get_text_config())
    far = kept_first_tokens(config) and config.sink_positions == "absolute"
    if theoretical_reach(model) is not None and not far:
        return None
    most = getattr(config, "max_position_embeddings", None)
    return most if isinstance(most, int) and getattr(config, "rope_parameters", None) else None


@torch.inference_mode()
def stream_bytes(streaming: StreamingModel, length: int) -> int:
    """Bytes that one stream keeps after `length` tokens, from what a short one keeps."""
    if isinstance(streaming, SwatStreamingModel):
        weight = cast(torch.Tensor, streaming.head.weight)  # type: ignore[union-attr]
        # rings without a window are doubled
        context = 1 << (length - 1).bit_length()
        return state_bytes(streaming.model.config, context=context, dtype_bytes=weight.element_size())  # type: ignore[arg-type]
    tokens = probe(streaming.model, streaming.vocab_size, PROBE_TOKENS)
    state = streaming.start(len(tokens))
    streaming.extend(tokens, state)
    total = streaming.state_bytes(state)
    for layer in getattr(next(iter(state.cache.values())), "layers", ()):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if not isinstance(keys, torch.Tensor) or not isinstance(values, torch.Tensor) or keys.dim() != 4:
            continue
        held = (keys.nbytes + values.nbytes) // len(tokens)
        most = getattr(layer, "sliding_window", None) or length
        total += held * (min(most, length) - keys.shape[-2]) // keys.shape[-2]
    return max(total, 1)


def gibibytes(count: int) -> str:
    """Bytes as GiB or MiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**29 else f"{max(1, round(count / 2**20))} MiB"
