"""The ways to train on long rows that are compared: an attention, and how its layers are run."""

from typing import Any, NamedTuple

from swat_lm.model.configuration import SwatConfig
from swat_lm.papers.blockwise.scales import Size
from swat_lm.papers.scales import Scale

__all__ = ["METHODS", "Method", "configuration", "execution_settings"]


class Method(NamedTuple):
    """One row of the comparison."""

    label: str
    execution: str
    windowed: bool = False
    """Attention over a window instead of all tokens before: another model, which is why chunks can run it."""
    backend: str = "auto"


METHODS = {
    "vanilla": Method("vanilla: all scores at once", "plain", backend="reference"),
    "memory-efficient": Method("memory-efficient attention, plain feed-forward", "plain"),
    "checkpoint": Method("layers checkpointed whole", "checkpoint"),
    "blockwise": Method("blockwise parallel", "blockwise"),
    "window-plain": Method("window, plain", "plain", True),
    "window-checkpoint": Method("window, layers checkpointed", "checkpoint", True),
    "window-blockwise": Method("window, blockwise parallel", "blockwise", True),
    "window-chunks": Method("window, reverse chunks, carries on disk", "chunks", True),
}


def configuration(method: Method, size: Size, scale: Scale) -> SwatConfig:
    """A model of GPT's shape: LayerNorm, GELU over four widths, softmax; rotary in the place of learned positions."""
    return SwatConfig(
        vocab_size=size.vocabulary, hidden_size=size.width, intermediate_size=4 * size.width,
        num_hidden_layers=size.layers, num_attention_heads=size.heads,
        sliding_window=scale.sizes["window"] if method.windowed else None, score_function="softmax", slopes="none",
        norm="layer", feed_forward="plain", hidden_act="gelu_pytorch_tanh", mlp_bias=True,
        attention_backend=method.backend,
    )  # fmt: skip


def execution_settings(method: Method, scale: Scale) -> dict[str, Any]:
    """Sizes of blocks and chunks at a scale."""
    sizes = scale.sizes
    return {
        "blockwise": {"block_size": sizes["block"], "key_block_size": sizes["keys"]},
        "chunks": {"chunk_size": sizes["chunk"], "carries": "disk"},
    }.get(method.execution, {})
