"""SwatConfig: one configuration for SWAT, softmax windows, interleaved plans of any layers and full attention.

`layers` says what each layer is; flat fields are the defaults of every layer that has a setting of that name. The
settings of attention may be lists with one value per layer, which is all that models of attention alone need.
"""

import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import field, fields
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from swat_lm.files import write_text
from swat_lm.layers import AttentionLayer, AttentionSettings
from swat_lm.model.layer_views import LayerViews
from swat_lm.model.plan import LayerEntry, kinds_with, resolve_plan
from swat_lm.model.registration import AUTO_CODE, AUTO_MAP, AUTO_MODULE, MODEL_TYPE
from swat_lm.ops.slopes import DEFAULT_SPAN

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
PER_LAYER = ("sliding_window", "score_function", "slopes", "score_bias", "use_rotary", "rope_theta")
"""Fields that may be a list with one value per layer."""


FORMER_SPAN = 16.0
"""The default until 2026-12, which checkpoints and recipes of then name whatever their schedule."""

HEADS = "swat_heads"
"""The style of swat_lm/model/tensor_parallel.py."""


@strict
class SwatConfig(PreTrainedConfig):
    """Configuration of a SwatModel; the defaults are the paper's 340M model (arXiv 2502.18845).

    Args:
        sliding_window: keys a query sees, itself included; None = full causal attention; or one per layer.
        layer_types: Hugging Face's names, "sliding_attention" or "full_attention"; derived from the windows when None.
            Given beside a single window, it says which layers have that window and which see everything.
        layers: kinds of `swat_lm.layers.LAYERS`, a pattern that is cycled over the layers: words, or mappings with
            `kind`, settings of that kind, and `repeat`; attention everywhere when None.
        score_function: "sigmoid" or "softmax"; or one per layer.
        slopes: "balanced", "negative", "positive", "none" or a split such as "8:4"; or one per layer.
        slope_schedule: "swat" (2**-k), "alibi" (standard ALiBi magnitudes) or "window" (as `slope_span` says).
        slope_span: of "window": a number c, for `c / window * 2**-i`, or the first and the last of equal ratios.
        positive_slope_span: the same of the heads with positive slopes; None: as slope_span.
        learned_slopes, learned_score_bias: a parameter per head that starts as slopes and score_bias say.
        score_bias: added to every score; a number or "-log(window)" (arXiv 2409.04431); or one per layer.
        qk_norm: RMS norm on queries and keys before rotary.
        qk_norm_over: what that norm is over: each "head" by itself, or all heads of the "layer" together.
        output_norm: RMS norm per head on the attention's output (hybrid-norm).
        output_gate: each head's output times a sigmoid of the layer's normed input.
        layer_scale: start of a weight per channel on what attention and feed-forward give; None: none.
        learned_sink: softmax only: one more key per head with a learned score and the value zero.
        sinks: first tokens of each document that stay visible, and are kept, when they have left the window.
        sink_positions: where rotary and slopes see these: "cache", right before the window, or "absolute".
        output_projection_init_scale: multiplies the start of `o_proj` and `down_proj`.
        attention_bias: biases of `q_proj`, `k_proj`, `v_proj` and `o_proj`.
        output_bias: the bias of attention's `o_proj`, where it differs from that; None: as `attention_bias`.
        embedding_multiplier: what token embeddings are multiplied with.
        logits_scaling: what logits are divided by.
        residual_multiplier: what attention and feed-forward give is multiplied with, before it joins the stream.
        attention_multiplier: what products of queries and keys are multiplied with; None: `head_dim ** -0.5`.
        attn_logit_softcapping: c caps these products softly, as `c * tanh(product / c)`; None: as they are.
        final_logit_softcapping: the same for logits, after `logits_scaling`.
        norm: "rms" or "layer" (LayerNorm with bias), around attention and feed-forward and behind the last layer.
        norm_placement: norms "pre" (before attention and feed-forward), "post" (behind them) or "both".
        feed_forward: "gated" (SwiGLU, GEGLU), or "plain": `down_proj(activation(up_proj(x)))`.
        hidden_act: activation of the feed-forward's gate, or of the plain one.
        use_rotary: rotary position embedding on or off; or one per layer.
        rope_theta: rotary base; a list gives one per layer. A single base is kept in `rope_parameters`.
        rope_parameters: Hugging Face's form: rope_theta, rope_type ("default", "linear", "llama3", "yarn"), ...
        max_position_embeddings: the training length, for tools that ask; a window model has no limit.
        attention_backend: backend of `swat_lm.ops.window_attention`.

    Raises:
        ValueError: a value out of range or lists that do not fit the layers; the message names the argument.
    """

    model_type = MODEL_TYPE
    # Hugging Face reads these from the class
    keys_to_ignore_at_inference = ["past_key_values", "last_hidden_state", "carry", "auxiliary"]  # noqa: RUF012
    auto_map = AUTO_MAP

    vocab_size: int = 32_000
    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: Literal["silu", "gelu_pytorch_tanh"] = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    output_projection_init_scale: float | int = 1.0
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    embedding_multiplier: float | int = 1.0
    logits_scaling: float | int = 1.0
    residual_multiplier: float | int = 1.0
    norm: Literal["rms", "layer"] = "rms"
    norm_placement: Literal["pre", "post", "both"] = "pre"
    feed_forward: Literal["gated", "plain"] = "gated"
    attention_multiplier: float | int | None = None
    attn_logit_softcapping: float | int | None = None
    final_logit_softcapping: float | int | None = None
    attention_bias: bool = False
    output_bias: bool | None = None
    mlp_bias: bool = False
    rope_parameters: dict[str, Any] | None = None
    rope_theta: float | int | list[float | int] | None = None
    use_rotary: bool | list[bool] = True
    sliding_window: int | list[int | None] | None = 1024
    layer_types: list[str] | None = None
    layers: list[Any] | None = None
    score_function: str | list[str] = "sigmoid"
    slopes: str | list[str] = "balanced"
    slope_schedule: Literal["swat", "alibi", "window"] = "swat"
    slope_span: float | int | list[float | int] = field(default_factory=lambda: list(DEFAULT_SPAN))
    positive_slope_span: float | int | list[float | int] | None = None
    learned_slopes: bool = False
    score_bias: float | int | str | list[float | int | str] = 0.0
    learned_score_bias: bool = False
    qk_norm: bool = False
    qk_norm_over: Literal["head", "layer"] = "head"
    output_norm: bool = False
    output_gate: bool = False
    layer_scale: float | int | None = None
    learned_sink: bool = False
    sinks: int = 0
    sink_positions: Literal["cache", "absolute"] = "cache"
    attention_backend: str = "auto"

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill what was left open, check everything, then let Hugging Face do its part."""
        # what configurations were called that knew attention alone
        kinds = kwargs.pop("mixers", None)
        # as it was saved, or with the hub's name of the folder in front
        kwargs.pop("auto_map", None)
        if self.layers is not None and kinds is not None:
            raise ValueError(f"mixers: layers says what each layer is, mixers {kinds!r} too; drop mixers")
        if kinds is not None:
            self.layers = [kinds] if isinstance(kinds, str) else list(kinds)
            self.layers = None if set(self.layers) <= {AttentionLayer.name} else self.layers
        _check_extra(kwargs)
        self._check_sizes()
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.hidden_size % self.num_attention_heads == 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        self._settle_windows()
        self._settle_rotary(kwargs)
        plan = self.plan()
        if self.sinks and not any(getattr(entry.settings, "sinks", 0) for entry in plan):
            raise ValueError(f"sinks: {self.sinks} first tokens are kept beside a window, and no layer has one")
        self._check_used(plan)
        if self.layers is not None:
            self.layer_types = [entry.layer_type for entry in plan]
        super().__post_init__(**kwargs)

    @property
    def base_model_tp_plan(self) -> dict[str, str] | None:  # type: ignore[override]
        """How tensor parallelism cuts modules: attention by heads, the feed-forward by its width; None: it cannot."""
        attention = [settings for kind, settings in self.plan() if issubclass(kind, AttentionLayer)]
        if not attention:
            return None
        own = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "colwise") | {"o_proj": "rowwise"}
        # of every head the same weight, of which each process sees its heads' gradient
        shared = {"qk_norm": ("q_norm", "k_norm"), "output_norm": ("output_norm",)}
        for name, norms in shared.items():
            if any(getattr(settings, name) for settings in attention):
                own |= dict.fromkeys(norms, "replicated_with_grad_allreduce")
        # one entry per head
        per_head = {"learned_sink": "sink", "learned_slopes": "slopes", "learned_score_bias": "score_bias"}
        own |= {name: HEADS for setting, name in per_head.items() if any(getattr(s, setting) for s in attention)}
        if any(settings.output_gate for settings in attention):
            own["gate_proj"] = "colwise"
        cut = {"self_attn": HEADS} | {f"self_attn.{name}": style for name, style in own.items()}
        cut |= {"mlp.up_proj": "colwise", "mlp.down_proj": "rowwise"}
        if any(settings.feed_forward == "gated" for settings in attention):
            cut["mlp.gate_proj"] = "colwise"
        return {f"layers.*.{name}": style for name, style in cut.items()}

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `config.json`, with an `auto_map`, and beside it the module that this names."""
        # an attribute of its own for as long as it is written: manifests and comparisons know nothing of it
        self.auto_map = dict(AUTO_MAP)
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            del self.auto_map
        write_text(Path(save_directory, f"{AUTO_MODULE}.py"), AUTO_CODE)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoConfig") -> None:
        """Nothing to do: what is saved names this package, of which no file is copied."""

    @property
    def per_layer_config(self) -> LayerViews:
        """One view per layer, as Hugging Face's caches read them."""
        return LayerViews(self)

    def plan(self) -> list[LayerEntry]:
        """Every layer: its kind and all its settings. Raises ValueError for a plan that cannot be."""
        names = [name for name in RECIPE_KEYS if name != "layers"]
        values = {name: getattr(self, name) for name in names}
        lists = {name: self._per_layer(name) for name in PER_LAYER}
        flat = []
        for index in range(self.num_hidden_layers):
            own = {name: per_layer[index] for name, per_layer in lists.items()}
            if self.layers is None and self.layer_types is not None and self.layer_types[index] == "full_attention":
                own["sliding_window"] = None
            flat.append({**values, **own})
        return resolve_plan(self.layers, self.num_hidden_layers, self.hidden_size, flat)

    def window(self, layer_index: int) -> int | None:
        """Keys a query of this layer sees, itself included; None = all, or no attention that a window limits."""
        return getattr(self.plan()[layer_index].settings, "sliding_window", None)

    def rotary(self, layer_index: int) -> dict[str, Any] | None:
        """Rotary parameters of this layer (rope_theta, rope_type, ...), or None where rotary is off."""
        settings = self.plan()[layer_index].settings
        return settings.rope_parameters if getattr(settings, "use_rotary", False) else None

    def attention_settings(self, layer_index: int) -> AttentionSettings:
        """What defines the attention of one layer. Raises ValueError for a layer of another kind."""
        kind, settings = self.plan()[layer_index]
        if not issubclass(kind, AttentionLayer):
            raise ValueError(f"layer {layer_index} is {kind.name}, expected {AttentionLayer.name}")
        return settings

    def _per_layer(self, name: str) -> list[Any]:
        value = getattr(self, name)
        if not isinstance(value, list):
            return [value] * self.num_hidden_layers
        if len(value) != self.num_hidden_layers:
            raise ValueError(
                f"{name}: expected one value or one per layer ({self.num_hidden_layers}), got a list of {len(value)}"
            )
        return value

    def _check_used(self, plan: list[LayerEntry]) -> None:
        """Refuse what is set beside a plan of which no layer has it: two models would be one without a word."""
        for name in ("learned_slopes", "learned_score_bias", "output_gate", "layer_scale", "positive_slope_span"):
            if getattr(self, name) and not any(getattr(entry.settings, name, None) for entry in plan):
                kinds = ", ".join(dict.fromkeys(entry.kind.name for entry in plan))
                raise ValueError(f"{name}: it is set, and no layer of this plan ({kinds}) has it; leave it out")
        scheduled = any(getattr(entry.settings, "slope_schedule", None) == "window" for entry in plan)
        if self.slope_span not in (list(DEFAULT_SPAN), FORMER_SPAN) and not scheduled:
            raise ValueError(
                f"slope_span: {self.slope_span} belongs to slope_schedule='window', and no layer has that schedule; "
                "set it, or leave slope_span out"
            )

    def _check_sizes(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("embedding_multiplier", "logits_scaling"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        cap = self.final_logit_softcapping
        if cap is not None and not 0 < cap < math.inf:
            raise ValueError(f"final_logit_softcapping: expected a positive number, or None to cap nothing; got {cap}")

    def _settle_windows(self) -> None:
        windows = self._per_layer("sliding_window")
        for window in windows:
            if isinstance(window, bool):
                raise ValueError(f"sliding_window: expected at least 1 or None for full attention, got {window}")
        if self.layers is not None:
            # what each entry says decides; the flat field is no more than its default
            return
        given = self.layer_types
        if given is None:
            self.layer_types = ["full_attention" if window is None else "sliding_attention" for window in windows]
        else:
            self._check_layer_types(given, windows)
        # Hugging Face's tools understand a single integer: keep the list only where windows really differ
        assert self.layer_types is not None
        different = {
            window for window, kind in zip(windows, self.layer_types, strict=True) if kind == "sliding_attention"
        }
        if len(different) <= 1:
            self.sliding_window = different.pop() if different else None

    def _check_layer_types(self, given: list[str], windows: list[int | None]) -> None:
        if len(given) != self.num_hidden_layers:
            raise ValueError(f"layer_types: expected {self.num_hidden_layers} entries, one per layer, got {len(given)}")
        for index, (layer_type, window) in enumerate(zip(given, windows, strict=True)):
            if layer_type not in ("sliding_attention", "full_attention"):
                raise ValueError(
                    f"layer_types: layer {index} is {layer_type!r}; expected 'sliding_attention' or 'full_attention'"
                )
            if layer_type == "sliding_attention" and window is None:
                raise ValueError(f"layer_types: layer {index} is 'sliding_attention' but its sliding_window is None")
            if layer_type == "full_attention" and isinstance(self.sliding_window, list) and window is not None:
                raise ValueError(f"layer_types: layer {index} is 'full_attention' but its sliding_window is {window}")

    def _settle_rotary(self, kwargs: dict[str, Any]) -> None:
        # copied: a dictionary shared with another configuration must not change under it
        legacy = kwargs.pop("rope_scaling", None)
        parameters = {key: dict(value) if isinstance(value, Mapping) else value
                      for key, value in (self.rope_parameters or legacy or {}).items()}  # fmt: skip
        theta = self.rope_theta
        bases = self._per_layer("rope_theta") if isinstance(theta, list) else [] if theta is None else [theta]
        if any(not base > 0 for base in bases):
            raise ValueError(f"rope_theta: expected positive rotary bases, got {theta}")
        nested = [parameters[name] for name in ("sliding_attention", "full_attention") if name in parameters]
        for entry in nested or [parameters]:
            if theta is not None and not isinstance(theta, list):
                held = entry.setdefault("rope_theta", theta)
                if held != theta:
                    raise ValueError(f"rope_theta: {theta} contradicts rope_parameters, which says {held}")
            entry.setdefault("rope_theta", self.default_theta)
            rope_type = entry.setdefault("rope_type", entry.pop("type", "default"))
            if rope_type not in ROPE_TYPES:
                raise ValueError(
                    f"rope_parameters: rope_type {rope_type!r} depends on the length of the sequence or is unknown; "
                    f"expected one of {', '.join(ROPE_TYPES)}"
                )
            if entry.get("partial_rotary_factor") not in (None, 1, 1.0):
                raise ValueError("rope_parameters: partial_rotary_factor other than 1 is not supported")
        self.rope_parameters = parameters
        if not isinstance(theta, list):
            self.rope_theta = None


RECIPE_KEYS = tuple(field.name for field in fields(SwatConfig) if field.name in SwatConfig.__annotations__)  # type: ignore[arg-type]


# what others call our fields, or what is easily written instead
ALIASES = {
    "window": "sliding_window", "window_size": "sliding_window", "attention_window": "sliding_window",
    "num_heads": "num_attention_heads", "n_heads": "num_attention_heads", "n_head": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads", "n_kv_heads": "num_key_value_heads",
    "num_layers": "num_hidden_layers", "n_layers": "num_hidden_layers", "n_layer": "num_hidden_layers",
    "depth": "num_hidden_layers", "width": "hidden_size", "d_model": "hidden_size", "dim": "hidden_size",
    "n_embd": "hidden_size", "ffn_dim": "intermediate_size", "head_size": "head_dim", "vocabulary": "vocab_size",
    "attn_bias": "attention_bias", "rotary": "use_rotary", "rope": "use_rotary", "sink": "learned_sink",
    "bias": "score_bias", "backend": "attention_backend", "mixer": "layers", "alibi": "slopes", "layer": "layers",
}  # fmt: skip


def _check_extra(extra: Mapping[str, Any]) -> None:
    # Hugging Face keeps any unknown argument as an attribute; one that nearly is a setting of ours is a slip
    for key in extra:
        nearest = [ALIASES[key]] if key in ALIASES else difflib.get_close_matches(key, RECIPE_KEYS, n=1, cutoff=0.8)
        if owners := kinds_with(key):
            raise ValueError(f"SwatConfig has no argument {key!r}; {in_layers(key, owners)}")
        if nearest:
            raise ValueError(f"SwatConfig has no argument {key!r}; did you mean {nearest[0]!r}?")


def in_layers(key: str, owners: list[str]) -> str:
    """What to write where a key is a setting of these kinds."""
    return f"it is a setting of {' and '.join(owners)}: write it in layers, {{kind: {owners[0]}, {key}: ...}}"
