"""The kind `attention`: Llama's layer around windowed attention, with its settings; and around a paper's own.

Parameter names and shapes are Llama's; what attends is in window_attention.py.
"""

from typing import Any, ClassVar

from torch import Tensor

from swat_lm.layers.attention_settings import AttentionSettings
from swat_lm.layers.base import Shared
from swat_lm.layers.chunk import Chunk, Rotary
from swat_lm.layers.heads_settings import HeadsSettings
from swat_lm.layers.lean import AttentionPlan, plan_attention
from swat_lm.layers.per_head import start_per_head
from swat_lm.layers.pre_norm import FeedForward, Mixer, PreNorm
from swat_lm.layers.window_attention import WindowAttention


class AttentionLayer(PreNorm):
    """Windowed attention in Llama's layer, the kind that SWAT (arXiv 2502.18845) is made of."""

    name = "attention"
    Settings = AttentionSettings

    self_attn: WindowAttention

    def __init__(self, settings: AttentionSettings, width: int, index: int, shared: Shared) -> None:
        mixer = WindowAttention(settings, width, own_rotary(settings, shared), index, shared.norm_eps, shared)
        super().__init__(
            mixer, own_feed_forward(settings, width), width, shared.norm_eps, settings.residual_multiplier,
            settings.norm_placement, settings.norm, settings.layer_scale,
        )  # fmt: skip

    @classmethod
    def settle(cls, values: dict[str, Any], given: frozenset[str], width: int) -> dict[str, Any]:
        """Sizes that follow from the number of heads, and the base of this layer's rotary."""
        values = settle_rotary(settle_heads(values, given, width), layer_type(values["sliding_window"]))
        if values["sliding_window"] is None and "sinks" not in given:
            # the configuration's are for its layers with a window; the others see all
            values = {**values, "sinks": 0}
        return values

    @staticmethod
    def layer_type(settings: AttentionSettings) -> str:
        """Hugging Face's name, which chooses its stock cache."""
        return layer_type(settings.sliding_window)

    @classmethod
    def keeps_beside_keys(cls, settings: AttentionSettings) -> str | None:
        """First tokens, where they are kept."""
        return "first tokens (sinks)" if settings.sinks else None

    def init_weights(self, shared: Shared) -> None:
        """What is learned per head starts as the settings say."""
        super().init_weights(shared)
        start_per_head(self.self_attn)

    def kept_items(self, hidden: Tensor, chunk: Chunk) -> dict[str, Tensor]:
        """What a past is extended by, by name: of a chunk `[B, T, M]` its rotated keys and its values alone."""
        return self.self_attn.kept_items(self._mixer_input(hidden), chunk)

    def decoding_plan(self) -> AttentionPlan | None:
        """The joined matrices of the layer; None where it has what they do not cover."""
        return plan_attention(self)


class HeadsLayer(PreNorm):
    """A paper's own attention in Llama's layer."""

    rotates_as: ClassVar[str] = "sliding_attention"
    """Hugging Face's name of layers that rotate alike, where a model's layers do not all."""

    def __init__(self, mixer: Mixer, settings: HeadsSettings, width: int, shared: Shared) -> None:
        super().__init__(
            mixer, own_feed_forward(settings, width), width, shared.norm_eps, settings.residual_multiplier,
            settings.norm_placement, settings.norm,
        )  # fmt: skip

    @classmethod
    def settle(cls, values: dict[str, Any], given: frozenset[str], width: int) -> dict[str, Any]:
        """Sizes that follow from the number of heads, the base of rotary; the paper's softmax unless the entry says."""
        values = settle_rotary(settle_heads(values, given, width), cls.rotates_as)
        own = {"score_function": "softmax", "score_bias": 0.0}
        return values | {name: value for name, value in own.items() if name not in given}


def own_rotary(settings: HeadsSettings, shared: Shared) -> Rotary | None:
    """Rotary of a layer's head size and base; None where the layer or the model has none."""
    if not settings.use_rotary or shared.rotary is None:
        return None
    return shared.rotary(settings.head_dim, settings.rope_parameters or {})


def own_feed_forward(settings: HeadsSettings, width: int) -> FeedForward:
    """The feed-forward that a layer's settings ask for."""
    return FeedForward(width, settings.intermediate_size, settings.mlp_bias, settings.hidden_act, settings.feed_forward)


def layer_type(window: int | None) -> str:
    """Hugging Face's name for attention with this window."""
    return "full_attention" if window is None else "sliding_attention"


def settle_heads(values: dict[str, Any], given: frozenset[str], width: int) -> dict[str, Any]:
    """Fill in key/value heads and head size that follow from the number of heads and the width M.

    Raises ValueError, which begins with the setting's name, for heads that do not divide the width.
    """
    heads = values["num_attention_heads"]
    if heads < 1:
        raise ValueError(f"num_attention_heads: expected at least 1, got {heads}")
    if "num_attention_heads" in given:
        # the configuration's own follow from its number of heads
        values = values | dict.fromkeys({"num_key_value_heads", "head_dim"} - given)
    if values["num_key_value_heads"] is None:
        values["num_key_value_heads"] = heads
    if values["head_dim"] is None:
        if width % heads:
            raise ValueError(
                f"num_attention_heads: {heads} heads do not divide hidden_size {width}; "
                "change one of them or give head_dim"
            )
        values["head_dim"] = width // heads
    return values


def settle_rotary(values: dict[str, Any], kind: str) -> dict[str, Any]:
    """Bring the base of this layer's rotary into its `rope_parameters`; `kind` is Hugging Face's name of the layer."""
    parameters = values["rope_parameters"] or {}
    # Hugging Face's form for models whose layers rotate differently with a window and without
    parameters = parameters.get(kind, parameters)
    if values["rope_theta"] is not None:
        parameters = {**parameters, "rope_theta": values["rope_theta"]}
    return {**values, "rope_theta": None, "rope_parameters": parameters}
