"""Which window a model sees through, how far its layers reach together, and the same weights with another window."""

import copy
from dataclasses import asdict
from typing import Any, Literal, cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from swat_lm.layers import AttentionLayer
from swat_lm.model.building import layers_without_weights
from swat_lm.model.configuration import SwatConfig
from swat_lm.model.conversion import convert_config
from swat_lm.model.cost import first_kept, reach
from swat_lm.model.families import FAMILIES, family_of
from swat_lm.model.modeling import SwatForCausalLM
from swat_lm.model.plan import LayerEntry

__all__ = ["kept_first_tokens", "layer_windows", "model_window", "theoretical_reach", "widest_window", "with_window"]


def layer_windows(outer: PreTrainedConfig) -> list[int | None] | None:
    """How far every layer sees, None where it sees everything; None for a model whose layers do not say.

    Of attention that is its window; recurrent layers, and what selects, see everything before them. The windows of
    models of `transformers` are read from `layer_types` and `sliding_window`, as its caches do.
    """
    config = cast(Any, outer.get_text_config())
    if isinstance(config, SwatConfig):
        return [layer.reach() for layer in layers_without_weights(config)]
    count = getattr(config, "num_hidden_layers", None)
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if count is None:
        return None
    if types is not None:
        return [window if kind == "sliding_attention" else None for kind in types]
    # of the models without layer types only these have every layer windowed
    return [window if config.model_type in ("mistral", "mixtral", "starcoder2") else None] * count


def model_window(model: PreTrainedModel) -> int | None:
    """The widest window of any layer; None if a layer sees everything."""
    return widest_window(model.config)


def widest_window(config: PreTrainedConfig) -> int | None:
    """As `model_window`, of a configuration."""
    windows = layer_windows(config)
    return None if windows is None or None in windows else max(cast(list[int], windows))


def kept_first_tokens(config: PreTrainedConfig) -> int:
    """First tokens that layers keep beside their windows; of another family's model none."""
    return first_kept(config) if isinstance(config, SwatConfig) else 0


def theoretical_reach(model: PreTrainedModel) -> int | None:
    """Tokens, itself included, that a place can depend on: 1 + sum of (window - 1) over layers; None = all.

    Beside the first tokens, where they are kept; less where layers see the same segments.
    """
    if isinstance(model.config, SwatConfig):
        return reach(model.config)
    windows = layer_windows(model.config)
    return None if windows is None or None in windows else 1 + sum(window - 1 for window in cast(list[int], windows))


def with_window(
    model: PreTrainedModel, window: int | Literal["keep"] | None, sinks: int | None = None
) -> SwatForCausalLM:
    """The same weights (shared, not copied) with one window in every layer, None for full attention.

    Figure 2 and the windows of Table 2. Models of other families are taken over as softmax models of ours. A score bias
    that was derived from the trained window keeps its value.

    Args:
        window: "keep": every layer's own.
        sinks: first tokens kept beside the windows, as StreamingLLM (arXiv 2309.17453) reads models that were trained
            without; None: the model's own, and none with full attention.

    Raises:
        ValueError: a window below 1, sinks without a window, an architecture without a counterpart here, or a model
            without attention.
    """
    if isinstance(window, int) and window < 1:
        raise ValueError(f"window: expected at least 1 (a token counts itself), got {window}")
    state = model.state_dict()
    if isinstance(model, SwatForCausalLM):
        if not any(issubclass(entry.kind, AttentionLayer) for entry in model.config.plan()):
            raise ValueError("window: the model has no layer of attention whose window could be another")
        config = changed_config(model.config, window, sinks)
    elif model.config.model_type in FAMILIES:
        config = convert_config(model.config, window, **({"sinks": sinks} if sinks else {}))
        state = family_of(model.config).weights(state, model.config)
    else:
        raise ValueError(
            f"window: a {model.config.model_type} model cannot be run with another window, only swat models and those "
            "that can be taken over as such, with attention, can"
        )
    with torch.device("meta"):
        windowed = SwatForCausalLM(config)
    windowed.load_state_dict(state, assign=True)
    if config.tie_word_embeddings:
        windowed.tie_weights()
    return windowed.train(model.training)


def changed_config(old: SwatConfig, window: int | Literal["keep"] | None, sinks: int | None) -> SwatConfig:
    """A copy with one window, and as many sinks, in every layer of attention; other kinds stay as they are."""
    config = cast(SwatConfig, copy.deepcopy(old))
    layers, plan = range(old.num_hidden_layers), old.plan()
    # by a window's presence, which is about to change; in a list of bases it does not matter
    rotaries = {str(rotary) for layer in layers if (rotary := old.rotary(layer)) is not None}
    wanted = kept_first_tokens(old) if sinks is None else sinks
    config.sinks = 0 if window is None else wanted
    if old.layers is not None or (len(rotaries) > 1 and not isinstance(old.rope_theta, list)):
        config.layers = [entry_with_window(entry, window, sinks, wanted) for entry in plan]
        config.layer_types = [kind.layer_type(settings) for kind, settings in config.plan()]
        # every entry says its own
        config.sinks = 0
    elif window != "keep":
        config.score_bias = [old.attention_settings(layer).bias() for layer in layers]
        config.sliding_window = window
        config.layer_types = ["full_attention" if window is None else "sliding_attention"] * len(layers)
    if sinks and not kept_first_tokens(config):
        raise ValueError(f"sinks: {sinks} first tokens are kept beside a window, and no layer has one; give a window")
    return config


def entry_with_window(
    entry: LayerEntry, window: int | Literal["keep"] | None, sinks: int | None, wanted: int
) -> dict[str, Any]:
    """An entry of `SwatConfig.layers` with all its settings, and this window if it is attention.

    `sinks` beside it; None: as many as it has, or, where it had no window, `wanted`.
    """
    settings = entry.settings
    values = {"kind": entry.kind.name, **asdict(settings)}
    if issubclass(entry.kind, AttentionLayer):
        own = settings.sliding_window if window == "keep" else window
        had = settings.sinks if settings.sliding_window is not None else wanted
        kept = 0 if own is None else had if sinks is None else sinks
        values |= {"sliding_window": own, "score_bias": settings.bias(), "sinks": kept}
    return values
