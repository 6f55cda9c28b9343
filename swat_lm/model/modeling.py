"""The model of every plan of layers, as Hugging Face classes.

Parameter names and shapes of attention layers are Llama's, so Llama and Mistral weights load unchanged. Attention is
computed by `swat_lm.ops` alone; Hugging Face's attention implementations would be softmax and are refused.
Legend: B batch, T tokens, M model width, V vocabulary.
"""

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

import swat_lm.model.tensor_parallel  # noqa: F401 registers the style that the configuration's plan names
from swat_lm.layers.base import NOTHING, Auxiliary, Layer
from swat_lm.layers.chunk import Chunk
from swat_lm.layers.norm import NORMS
from swat_lm.model.absorbing import Absorbing
from swat_lm.model.building import build_layers, shared_by
from swat_lm.model.cache import SlotCache
from swat_lm.model.configuration import SwatConfig
from swat_lm.model.embeddings import ScaledHead, output_embedding, token_embedding
from swat_lm.model.execution import check_chunk, is_hooked, run_layers, step_layers, stepped_over
from swat_lm.model.execution.base import Execution
from swat_lm.model.execution.chunks import ReverseChunks
from swat_lm.model.execution.table import Executable, Plain
from swat_lm.model.inputs import documents_from_lengths, draws_noise, plan_carry, plan_chunk, refuse_unknown, row_seeds
from swat_lm.model.kept import check_kept
from swat_lm.model.loss import PLAIN_WEIGHTS, chunked_cross_entropy, chunked_cross_entropy_through
from swat_lm.model.outputs import SwatCausalLMOutput, SwatModelOutput
from swat_lm.model.paged import PAGED, check_paged, run_paged
from swat_lm.model.pasts import CachePast, Carry, check_foreign
from swat_lm.model.streaming import Streaming
from swat_lm.model.targets import next_tokens, of_those_handed_on


class SwatPreTrainedModel(Absorbing, PreTrainedModel):
    """What Hugging Face needs to know of these models."""

    config: SwatConfig
    config_class = SwatConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": Layer}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Layer):
            module.init_weights(shared_by(self.config))

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # as custom code, modules without parameters of their own would be passed over, layers among them;
        # what layers draw respects what was loaded, parameter by parameter
        super()._initialize_weights(module, is_custom_code=False)

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoModel") -> None:
        """Nothing to do: what is saved names this package, of which no file is copied."""

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Hugging Face asks here which attention to use; there is one answer, and its name with a paged cache.

        Raises:
            ValueError: anything but "eager" was asked for, or a paged cache that cannot hold what layers keep.
        """
        if requested_attention == PAGED:
            check_paged(self.config)
            return PAGED
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
        self.config._attn_implementation = self.get_correct_attn_implementation(asked)

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, is_init_check: bool = False, allow_all_kernels: bool = False
    ) -> str:
        return self.get_correct_attn_implementation(attn_implementation, is_init_check)


class SwatModel(SwatPreTrainedModel):
    """Embedding, layers and the final norm."""

    def __init__(self, config: SwatConfig) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.embed_tokens = token_embedding(
            config.vocab_size, config.hidden_size, config.pad_token_id, config.embedding_multiplier
        )
        self.layers, shared = build_layers(config)
        if shared:
            self.shared = shared
        self._stepped_over = stepped_over(self.layers)
        self.norm = NORMS[config.norm](config.hidden_size, config.rms_norm_eps)
        # the model's own kinds and no others: accelerate refuses a name that it does not find
        self._no_split_modules = sorted({type(layer).__name__ for layer in self.layers})
        self.gradient_checkpointing, self.execution = False, cast(Execution, Plain())
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
        carry: Carry | None = None,
        windows: tuple[int | None, ...] | None = None,
        noise_seed: int | Tensor | None = None,
        **kwargs: Any,
    ) -> SwatModelOutput:
        """Run all layers over `[B, T]` tokens.

        Args:
            input_ids: `[B, T]`; or give `inputs_embeds` `[B, T, M]`, what `embed_tokens` makes of ids.
            attention_mask: `[B, past + T]`, 1 = real token; padding on either side, and holes, which nobody sees.
            position_ids: `[B or 1, T]` for rotary; without a mask, a break in them begins a packed document.
            past_key_values: a `SlotCache`, or for attention layers a cache of `transformers`.
            use_cache: keep a cache; by default in inference only, where nothing is compiled.
            document_ids: integers `[B, T]`; a change begins a document, which does not see the one before;
                negative ids are padding.
            cu_seq_lens_q: `[documents + 1]`, the same for one flattened row, as Hugging Face's collators give it.
            carry: what the chunk before handed on (`init_carry`), in training chunk by chunk.
            windows: one per layer, drawn for this call; None where a layer has none.
            noise_seed: in training, what layers that draw noise draw it from, one for all rows or int64 `[B]`; drawn
                anew where none is given. Chunks of one sequence take the same.

        Returns:
            Normed `last_hidden_state` `[B, T, M]`, fewer where a layer shortens; `past_key_values` where a cache is.

        Raises:
            ValueError: inputs that contradict each other; the message names them.
        """
        paged = kwargs.keys() >= {"cache", "read_index"}
        if not paged:
            refuse_unknown(kwargs, type(self).__name__, self.config)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids: give exactly one of input_ids and inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if paged:
            assert position_ids is not None
            given = {**kwargs, "cu_seq_lens_q": cu_seq_lens_q}
            hidden = run_paged(self.stack, self.config, hidden, position_ids, given)
            return SwatModelOutput(last_hidden_state=self.norm(hidden))  # type: ignore[arg-type]
        if use_cache is None:
            # nor does a graph that is compiled make one by itself
            use_cache = self.config.use_cache and not self.training and not torch.compiler.is_compiling()
            use_cache &= not any(layer.refuses_past() for layer in self.stack)
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            if past_key_values is not None:
                raise ValueError("past_key_values: activation checkpointing would fill the cache twice; pass none")
            use_cache = False
        batch, num_tokens, _ = hidden.shape
        seed = row_seeds(noise_seed, batch, hidden.device) if draws_noise(self.stack, self.training) else None
        if cu_seq_lens_q is not None and document_ids is None:
            document_ids = documents_from_lengths(cu_seq_lens_q, batch, num_tokens)
        if carry is not None:
            given = {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": past_key_values}
            return self._run_after(carry, hidden, document_ids, windows, seed, given)
        if past_key_values is not None and not isinstance(past_key_values, SlotCache):
            check_foreign(self.stack)
        # caches of fixed size count in a tensor, which they change in place
        num_past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        chunk = plan_chunk(
            batch, num_tokens, num_past, hidden.device, attention_mask, position_ids, document_ids,
            goes_on=past_key_values is not None or use_cache,
            # whoever asks without gradients may read what stands behind a row's padding, and finds it as with a cache
            ends_hidden=not torch.is_grad_enabled(),
        )  # fmt: skip
        chunk.windows, chunk.seed = windows, seed
        packed = chunk.first is not None and (document_ids is not None or attention_mask is None)
        if past_key_values is None and use_cache and not packed:
            past_key_values = SlotCache(self.config)
        if packed and past_key_values is not None:
            raise ValueError("packed documents cannot be decoded from: pass use_cache=False, or one document a row")
        if isinstance(past_key_values, SlotCache):
            hidden, said = self._run_in_slots(hidden, chunk, past_key_values, attention_mask)
        else:
            pasts = None
            if past_key_values is not None:
                pasts = [CachePast(past_key_values, index, num_past) for index in range(len(self.layers))]
            hidden, _, said = run_layers(self.stack, hidden, chunk, pasts)
        return SwatModelOutput(
            last_hidden_state=self.norm(hidden),  # type: ignore[arg-type]
            past_key_values=past_key_values if use_cache else None,
            auxiliary=_worth_saying(said),
        )

    @property
    def stack(self) -> list[Layer]:
        """The layers, typed."""
        return cast(list[Layer], self.layers)

    def _run_after(
        self, carry: Carry, hidden: Tensor, document_ids: Tensor | None, windows: tuple[int | None, ...] | None,
        seed: Tensor | None, given: dict[str, Any],
    ) -> SwatModelOutput:  # fmt: skip
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name}: a carry knows where its rows stand; give document_ids, or nothing")
        check_kept([past.spec for past in carry.pasts], [layer.state_spec() for layer in self.stack], "carry")
        if carry.mode == "exact" and any(_is_reentrant(layer) for layer in self.stack):
            raise ValueError(
                "gradient checkpointing with use_reentrant=True would lose the gradients that flow through the carry: "
                "enable it with use_reentrant=False, or take a detached carry"
            )
        chunk, after = plan_carry(hidden, document_ids, carry)
        chunk.windows, chunk.seed = windows, seed
        hidden, pasts, said = run_layers(self.stack, hidden, chunk, carry.pasts)
        after = replace(after, pasts=tuple(pasts))
        return SwatModelOutput(
            last_hidden_state=self.norm(hidden),  # type: ignore[arg-type]
            carry=after.detached() if carry.mode == "detached" else after,
            auxiliary=_worth_saying(said),
        )

    def _run_in_slots(
        self, hidden: Tensor, chunk: Chunk, cache: SlotCache, attention_mask: Tensor | None
    ) -> tuple[Tensor, list[Auxiliary]]:
        # before anything is kept of the chunk
        check_chunk(self.stack, chunk, has_past=True)
        batch, num_tokens, _ = hidden.shape
        specs = [layer.state_spec() for layer in self.stack]
        slots = cache.prepare(specs, batch, hidden.dtype, hidden.device)
        if batch != slots.num_slots:
            raise ValueError(f"past_key_values: holds {slots.num_slots} sequences, got a batch of {batch}")
        rows = cache.begin(chunk, num_tokens, attention_mask)
        pasts = slots.pasts(rows)
        is_step = (
            num_tokens == 1
            and rows.begin is None
            and chunk.hidden_items(0) is None
            and slots.passed is None
            and chunk.windows is None
            and not torch.is_grad_enabled()
            and not any(map(is_hooked, self._stepped_over))
        )
        said: list[Auxiliary] = []
        if is_step:
            hidden = step_layers(self.stack, hidden.squeeze(1), chunk, pasts).unsqueeze(1)
        else:
            hidden, _, said = run_layers(self.stack, hidden, chunk, pasts)
        slots.advance(rows)
        return hidden, said


def _is_reentrant(layer: Layer) -> bool:
    options = getattr(getattr(layer, "_gradient_checkpointing_func", None), "keywords", {})
    return bool(layer.training and layer.gradient_checkpointing and options.get("use_reentrant"))


def _worth_saying(said: list[Auxiliary]) -> tuple[Auxiliary, ...] | None:
    return tuple(said) if any(auxiliary is not NOTHING for auxiliary in said) else None


class SwatForCausalLM(Streaming, Executable, SwatPreTrainedModel, GenerationMixin):
    """The language model: SwatModel and an output embedding, with `generate()` and streaming."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: SwatConfig) -> None:
        super().__init__(config)
        self.model = SwatModel(config)
        self.vocab_size = config.vocab_size
        self.set_output_embeddings(nn.Linear(config.hidden_size, config.vocab_size, bias=False))
        self.post_init()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Take an output embedding; a plain one, as resizing makes it, divides and caps as the configuration says."""
        scaling, cap = self.config.logits_scaling, self.config.final_logit_softcapping
        self.lm_head = output_embedding(cast(nn.Linear, new_embeddings), scaling, cap)

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
        return_logits: bool | None = None,
        carry: Carry | None = None,
        **kwargs: Any,
    ) -> SwatCausalLMOutput:
        """Predict the next token of every place.

        Args:
            labels: `[B, T]`, the input ids with -100 where nothing is learnt; shifted here. A label in another document
                than its predictor (by `document_ids`) is ignored.
            shift_labels: `[B, T]`, labels that are shifted already; instead of `labels`.
            num_items_in_batch: what the summed loss is divided by; the labels of this call when None.
            logits_to_keep: logits of the last n places only (0 = all), or of the given places.
            return_logits: whether to form logits; by default always but while training, where the loss needs none.
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, document_ids, carry: see
                `SwatModel.forward`, which also takes `windows` and `noise_seed`.

        Returns:
            `loss` in nats when labels are given, `logits` `[B, kept, V]`, `past_key_values`; with a carry the next one
            and `last_hidden_state` `[B, T, M]`.
        """
        # by keyword alone: the Trainer takes every parameter with "label" in its name for one that must be there
        targets: Tensor | None = kwargs.pop("shift_labels", None)
        if targets is None and labels is not None:
            targets = next_tokens(labels, document_ids)
        learning = targets is not None
        given = {
            "input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids,
            "past_key_values": past_key_values, "inputs_embeds": inputs_embeds, "document_ids": document_ids, **kwargs,
        }  # fmt: skip
        execution = self.execution
        if carry is None and isinstance(execution, ReverseChunks) and execution.takes(self, targets, return_logits):
            assert targets is not None
            return execution.loss(self, targets, num_items_in_batch, given)
        use_cache = False if learning and use_cache is None and past_key_values is None else use_cache
        outputs = self.model(use_cache=use_cache, carry=carry, **given)
        hidden, loss, logits = outputs.last_hidden_state, None, None
        if targets is not None:
            targets = of_those_handed_on(targets, hidden.shape[1], num_items_in_batch is not None)
            loss = self.loss(hidden, targets, num_items_in_batch)
        if return_logits or (return_logits is None and not (learning and self.training)):
            logits = self.lm_head(slice_logits_to_keep(hidden, logits_to_keep))
        return SwatCausalLMOutput(
            loss=loss,  # type: ignore[arg-type]
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            last_hidden_state=None if carry is None else hidden,
            carry=outputs.carry,
            auxiliary=outputs.auxiliary,
        )

    def loss(self, hidden: Tensor, targets: Tensor, num_items: Tensor | float | None = None) -> Tensor:
        """Mean cross-entropy in nats of hidden states `[B, T, M]` against the next tokens `[B, T]`, in chunks."""
        hidden, targets = hidden.flatten(0, -2), targets.flatten().to(hidden.device)
        head = self.lm_head
        # a weight of another type is quantised or sharded, and its module knows how to multiply with it
        is_plain = type(head) in (nn.Linear, ScaledHead) and head.bias is None and type(head.weight) in PLAIN_WEIGHTS
        if is_plain and not is_hooked(head):
            # what divides logits may as well divide what they are formed of
            hidden = hidden / head.divisor if isinstance(head, ScaledHead) else hidden
            cap = head.softcap if isinstance(head, ScaledHead) else None
            return chunked_cross_entropy(hidden, head.weight, targets, num_items, softcap=cap)
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
        ours = (
            generation_config.use_cache is not False
            and generation_config.cache_implementation in (None, "dynamic")
            and model_kwargs.get("past_key_values") is None
        )
        if ours:
            cache = SlotCache(self.config, max_length=max_cache_length)
            if generation_config.is_assistant:
                cache.activate_past_recording()
            model_kwargs["past_key_values"] = cache
            return None  # type: ignore[return-value]
        return super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
