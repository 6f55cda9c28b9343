"""The model of every architecture here: Llama's skeleton around the mixers, as Hugging Face classes.

Parameter names and shapes are Llama's, so Llama and Mistral weights load unchanged. Attention is computed by
`swat_lm.ops` alone; Hugging Face's attention implementations would be softmax and are refused.
Legend: B batch, T tokens, M model width, V vocabulary.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.auto.modeling_auto import AutoModel, AutoModelForCausalLM
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from swat_lm.mixers import MIXERS, WindowAttention
from swat_lm.mixers.norm import RMSNorm
from swat_lm.mixers.protocol import Memory, Mixer, RingMemory, Visible
from swat_lm.model.cache import RingCache, StockMemory
from swat_lm.model.chunk import ChunkPlan, documents_from_lengths, plan_chunk
from swat_lm.model.configuration import SwatConfig
from swat_lm.model.loss import IGNORE, chunked_cross_entropy, chunked_cross_entropy_through
from swat_lm.model.rotary import LayerRotary
from swat_lm.model.streaming import Streaming

# what Hugging Face's tools pass along and this model has no use for
TOLERATED = {"cache_position", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "is_causal"}


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: SwatConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `[B, T, M]` to `[B, T, M]`."""
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class DecoderLayer(GradientCheckpointingLayer):
    """Pre-norm mixer and feed-forward, each added to the residual stream."""

    def __init__(self, config: SwatConfig, layer_index: int) -> None:
        super().__init__()
        assert isinstance(config.mixers, list)
        self.self_attn: Mixer = MIXERS[config.mixers[layer_index]].from_config(config, layer_index)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, hidden: Tensor, angles: tuple[Tensor, Tensor] | None, visible: Visible, memory: Memory | None = None
    ) -> tuple[Tensor, Memory | None]:
        """Process a chunk `[B, T, M]`; returns it and the memory for the next chunk."""
        mixed, memory = self.self_attn(self.input_layernorm(hidden), angles, visible, memory)
        hidden = hidden + mixed
        return hidden + self.mlp(self.post_attention_layernorm(hidden)), memory

    def step(self, hidden: Tensor, angles: tuple[Tensor, Tensor] | None, memory: RingMemory) -> Tensor:
        """Process one token per sequence, `[B, 1, M]`, in place over the rings."""
        hidden = hidden + self.self_attn.step(self.input_layernorm(hidden), angles, memory)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class SwatPreTrainedModel(PreTrainedModel):
    """What Hugging Face needs to know of these models."""

    config: SwatConfig
    config_class = SwatConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": DecoderLayer}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        scale = self.config.output_projection_init_scale
        std = self.config.initializer_range * scale
        if isinstance(module, WindowAttention):
            if module.sink is not None:
                init.zeros_(module.sink)
            if scale != 1:
                init.normal_(module.o_proj.weight, mean=0.0, std=std)
        elif isinstance(module, FeedForward) and scale != 1:
            init.normal_(module.down_proj.weight, mean=0.0, std=std)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Hugging Face asks here which attention to use; there is one answer.

        Raises:
            ValueError: anything but "eager" was asked for.
        """
        if requested_attention not in (None, "eager"):
            raise ValueError(
                f"attn_implementation={requested_attention!r} would compute softmax attention of another model; "
                f"{type(self).__name__} computes attention by its own operator: leave attn_implementation out, "
                "and choose its backend with config.attention_backend"
            )
        return "eager"

    def set_attn_implementation(self, attn_implementation: str | dict, allow_all_kernels: bool = False) -> None:
        """Refuse any other attention than this model's own; see `get_correct_attn_implementation`."""
        asked = attn_implementation.get("", "eager") if isinstance(attn_implementation, dict) else attn_implementation
        self.get_correct_attn_implementation(asked)

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, is_init_check: bool = False, allow_all_kernels: bool = False
    ) -> str:
        return self.get_correct_attn_implementation(attn_implementation, is_init_check)


class SwatModel(SwatPreTrainedModel):
    """Embedding, layers and the final norm."""

    def __init__(self, config: SwatConfig) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([DecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = LayerRotary(config)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        document_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run all layers over `[B, T]` tokens.

        Args:
            input_ids: `[B, T]`; or give `inputs_embeds` `[B, T, M]`.
            attention_mask: `[B, past + T]`, 1 = real token; left or right padding, no holes.
            position_ids: `[B or 1, T]` for rotary; without a mask, a break in them begins a packed document.
            past_key_values: a cache of `transformers` or a `RingCache`.
            use_cache: keep a cache; by default in inference only.
            document_ids: integers `[B, T]`; a change begins a document, which does not see the one before;
                negative ids are padding.
            cu_seq_lens_q: `[documents + 1]`, the same for one flattened row, as Hugging Face's collators give it.

        Returns:
            `last_hidden_state` `[B, T, M]` after the final norm, and `past_key_values` when a cache is used.

        Raises:
            ValueError: inputs that contradict each other; the message names them.
        """
        _refuse_unknown(kwargs, type(self).__name__, self.config)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids: give exactly one of input_ids and inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            if past_key_values is not None:
                raise ValueError("past_key_values: activation checkpointing would fill the cache twice; pass none")
            use_cache = False
        # caches of fixed size count in a tensor, which they change in place
        num_past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        batch, num_tokens, _ = hidden.shape
        if cu_seq_lens_q is not None and document_ids is None:
            document_ids = documents_from_lengths(cu_seq_lens_q, batch, num_tokens)
        plan = plan_chunk(batch, num_tokens, num_past, hidden.device, attention_mask, position_ids, document_ids)
        if past_key_values is None and use_cache and not plan.packed:
            past_key_values = DynamicCache(config=self.config)
        hidden = self._run(hidden, plan, past_key_values, num_past)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden),  # type: ignore[arg-type]
            past_key_values=past_key_values if use_cache else None,
        )

    @property
    def stack(self) -> list[DecoderLayer]:
        """The layers, typed."""
        return cast(list[DecoderLayer], self.layers)

    def _run(self, hidden: Tensor, plan: ChunkPlan, cache: Cache | None, num_past: int) -> Tensor:
        num_tokens, visible = hidden.shape[1], plan.visible
        memories: list[Memory] | list[None] = [None] * len(self.layers)
        if isinstance(cache, RingCache):
            memories = cache.memories(plan, num_tokens, hidden)
            visible = cache.visible(plan, num_tokens)
        elif cache is not None:
            if plan.packed:
                raise ValueError("packed documents cannot be decoded from: pass use_cache=False, or one document a row")
            memories = [StockMemory(cache, index, num_past) for index in range(len(self.layers))]
        angles = self.rotary.angles(plan.positions, hidden.dtype)
        for layer, layer_angles, memory in zip(self.stack, angles, memories, strict=True):
            hidden, _ = layer(hidden, layer_angles, visible, memory)
        if isinstance(cache, RingCache):
            cache.advance(plan, num_tokens)
        return hidden


class SwatForCausalLM(Streaming, SwatPreTrainedModel, GenerationMixin):
    """The language model: SwatModel and an output embedding, with `generate()` and streaming."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: SwatConfig) -> None:
        super().__init__(config)
        self.model = SwatModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        document_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        shift_labels: Tensor | None = None,
        return_logits: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predict the next token of every place.

        Args:
            labels: `[B, T]`, the input ids with -100 where nothing is learnt; shifted here. A label in another document
                than its predictor (by `document_ids`) is ignored.
            shift_labels: `[B, T]`, labels that are shifted already; instead of `labels`.
            num_items_in_batch: what the summed loss is divided by; the labels of this call when None.
            logits_to_keep: logits of the last n places only (0 = all), or of the given places.
            return_logits: whether to form logits; by default only without labels, since the loss does not need them.
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, document_ids: see
                `SwatModel.forward`.

        Returns:
            `loss` in nats when labels are given, `logits` `[B, kept, V]`, `past_key_values`.
        """
        learning = labels is not None or shift_labels is not None
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=False if learning and use_cache is None and past_key_values is None else use_cache,
            document_ids=document_ids,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        loss = logits = None
        if learning:
            targets = next_tokens(labels, document_ids) if shift_labels is None else shift_labels  # type: ignore[arg-type]
            loss = self.loss(hidden, targets, num_items_in_batch)
        if return_logits or (return_logits is None and not learning):
            logits = self.lm_head(slice_logits_to_keep(hidden, logits_to_keep))
        return CausalLMOutputWithPast(
            loss=loss,  # type: ignore[arg-type]
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def loss(self, hidden: Tensor, targets: Tensor, num_items: Tensor | float | None = None) -> Tensor:
        """Mean cross-entropy in nats of hidden states `[B, T, M]` against the next tokens `[B, T]`, in chunks."""
        hidden, targets = hidden.flatten(0, -2), targets.flatten().to(hidden.device)
        head = self.lm_head
        if type(head) is nn.Linear and head.bias is None and not head._forward_hooks and not head._forward_pre_hooks:
            return chunked_cross_entropy(hidden, head.weight, targets, num_items)
        return chunked_cross_entropy_through(head, hidden, targets, self.config.vocab_size, num_items)

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """Hugging Face would form four-dimensional masks for caches of fixed size here; padding is all we need."""
        return attention_mask

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict,
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> bool:
        windows = [self.config.window(index) for index in range(self.config.num_hidden_layers)]
        ours = (
            generation_config.use_cache is not False
            and generation_config.cache_implementation is None
            and model_kwargs.get("past_key_values") is None
            # rolled back by the assistant, which rings cannot do
            and generation_mode != GenerationMode.ASSISTED_GENERATION
            and not generation_config.is_assistant
            and None not in windows
        )
        if ours:
            model_kwargs["past_key_values"] = RingCache(self.config, max_length=max_cache_length)
            return None  # type: ignore[return-value]
        return super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )


def next_tokens(labels: Tensor, document_ids: Tensor | None = None) -> Tensor:
    """Labels `[B, T]` moved one place to the left; -100 at the end and where the next token begins another document."""
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    if document_ids is not None:
        ends = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (0, 1), value=True)
        targets = targets.masked_fill(ends.to(targets.device), IGNORE)
    return targets


def _refuse_unknown(kwargs: dict[str, Any], name: str, config: SwatConfig) -> None:
    if kwargs.pop("output_attentions", None) or config.output_attentions:
        raise ValueError("output_attentions: windowed attention never forms its weights, so they cannot be returned")
    kwargs.pop("output_hidden_states", None)
    unknown = kwargs.keys() - TOLERATED
    if unknown:
        raise TypeError(f"{name}.forward got unexpected keyword arguments: {', '.join(sorted(unknown))}")


AutoModel.register(SwatConfig, SwatModel, exist_ok=True)
AutoModelForCausalLM.register(SwatConfig, SwatForCausalLM, exist_ok=True)
