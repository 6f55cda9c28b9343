"""Endless streams: prefill in chunks and a lean decode step over a constant state; and training chunk by chunk.

Legend: B sequences, T tokens, M model width, V vocabulary, W window.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from weakref import ref

import torch
from torch import Tensor, nn

from swat_lm.mixers.protocol import FARTHEST, CarryMemory, Visible
from swat_lm.model.decoding import DecodingPlan, arrange, contiguous_state_dict
from swat_lm.model.fingerprint import fingerprint
from swat_lm.model.state import StreamState, empty_rings, made_by
from swat_lm.ops.visibility import from_attention_mask, from_document_ids

if TYPE_CHECKING:
    from swat_lm.model.configuration import SwatConfig
    from swat_lm.model.modeling import SwatModel


@dataclass(frozen=True)
class Carry:
    """What one chunk hands to the next in training: functional, never changed in place.

    `exact` lets gradients flow to older chunks; `detached` cuts them.
    """

    mode: Literal["exact", "detached"]
    memories: tuple[CarryMemory, ...]
    num_tokens: int = 0
    """Tokens before the next chunk."""
    document: Tensor | None = None
    """int64 `[B]`: id of the document that the last token belongs to; None where no ids are given."""
    document_length: Tensor | None = None
    """int64 `[B]`: tokens of that document so far."""

    def repeated(self, counts: Tensor) -> "Carry":
        """Each sequence so many times (int64 `[B]`), in order: several continuations go on from one beginning."""

        def rows(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.repeat_interleave(counts, dim=0)

        memories = tuple(CarryMemory(one.keep, rows(one.key), rows(one.value)) for one in self.memories)
        return Carry(self.mode, memories, self.num_tokens, rows(self.document), rows(self.document_length))


class Streaming:
    """Mixed into the language model: states, prefill, the decode step, and chunks with a carry."""

    _decoding_plan: DecodingPlan | None = None
    _is_arranged = False
    _known_fingerprint: tuple[bytes, str] | None = None

    if TYPE_CHECKING:
        model: SwatModel
        lm_head: nn.Linear
        config: SwatConfig
        register_state_dict_post_hook: Any

    def init_state(
        self, batch_size: int = 1, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> StreamState:
        """Empty state for B streams; dtype and device are the model's unless given.

        Raises:
            ValueError: a batch size below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        weight = self.model.embed_tokens.weight
        dtype, device = dtype or weight.dtype, torch.device(device or weight.device)
        # never inference tensors, so that a state made under inference_mode can be used outside it
        with torch.inference_mode(False):
            specs = (layer.self_attn.state_spec() for layer in self.model.stack)
            rings = empty_rings(specs, batch_size, dtype, device)
            position = torch.zeros(batch_size, dtype=torch.int64, device=device)
        windows = tuple(self.config.window(index) for index in range(self.config.num_hidden_layers))
        return StreamState(rings, windows, position, fits=ref(self))

    def arrange_for_decoding(self) -> None:
        """Lay the weights out in memory as decoding on a CPU reads them fastest: most by input channel, and joined.

        Shapes, names, values and bytes do not change, and whatever the model does still works; only the order of sums
        does. A product with one row streams through such a matrix, where rows of dot products wait for memory: 18 to
        22 GB/s instead of 12 on one core that reads 25 GB/s (width 768, 2,304 to 16,384 outputs; docs/experiments.md).
        `decode_step` then takes a shorter way, unless a module is replaced or a weight is moved later.

        Raises:
            ValueError: the model is not on a CPU.
        """
        if self.lm_head.weight.device.type != "cpu":
            raise ValueError(
                f"arrange_for_decoding serves models on a CPU; this one is on {self.lm_head.weight.device}"
            )
        self._decoding_plan = arrange(self)  # type: ignore[arg-type]
        if not self._is_arranged:
            self._is_arranged = True
            self.register_state_dict_post_hook(contiguous_state_dict)

    @torch.no_grad()
    def extend(self, input_ids: Tensor, state: StreamState, attention_mask: Tensor | None = None) -> Tensor:
        """Feed one chunk `[B, T]` of any length; returns the hidden states `[B, T, M]` after the final norm.

        Args:
            state: changed in place.
            attention_mask: `[B, T]`, left padding, allowed for streams that have not begun.

        Raises:
            ValueError: a batch that is not the state's, right padding, padding in a stream that has begun, or a state
                that `check_state` refuses.
        """
        self._check_rows(input_ids, state)
        state.logits = None
        num_tokens = input_ids.shape[1]
        num_real = _left_padding(attention_mask, input_ids, state)
        state.ragged = state.ragged or num_real is not None
        hidden = self.model.embed_tokens(input_ids)
        padding = 0 if num_real is None else num_tokens - num_real
        start = state.position - padding
        positions = (start[:, None] + torch.arange(num_tokens, device=start.device)).clamp(min=0)
        visible = Visible()
        if state.ragged:
            # what stands before a stream's first token is not there; padding has moved that token to the right
            first = (-start).clamp(min=FARTHEST).to(torch.int32)
            visible = Visible(first[:, None].expand(-1, num_tokens).contiguous())
        angles = self.model.rotary.angles(positions, hidden.dtype)
        memories = state.chunk_memories(num_tokens, num_real)
        for layer, layer_angles, memory in zip(self.model.stack, angles, memories, strict=True):
            hidden, _ = layer(hidden, layer_angles, visible, memory)
        state.position += num_tokens if num_real is None else num_real
        state.num_columns += num_tokens
        return self.model.norm(hidden)

    @torch.no_grad()
    def prefill(
        self, input_ids: Tensor, state: StreamState, chunk: int = 512, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, StreamState]:
        """Feed a prompt `[B, T]` in chunks; returns the logits after its last token, `[B, V]`, and the state.

        Args:
            state: changed in place.
            chunk: tokens per chunk, any size; only speed and memory depend on it.
            attention_mask: `[B, T]`, left padding.

        Raises:
            ValueError: an empty prompt or a chunk below 1, and what `extend` refuses.
        """
        if chunk < 1:
            raise ValueError(f"chunk: expected at least 1 token, got {chunk}")
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError(
                f"input_ids: expected [batch, tokens] with at least one token, got {list(input_ids.shape)}"
            )
        masks: Sequence[Tensor | None] = [None] * -(-input_ids.shape[1] // chunk)
        if attention_mask is not None:
            from_attention_mask(attention_mask)
            masks = attention_mask.split(chunk, dim=1)
        hidden = None
        for part, mask in zip(input_ids.split(chunk, dim=1), masks, strict=True):
            hidden = self.extend(part, state, mask)
        assert hidden is not None
        return self.lm_head(hidden[:, -1]), state

    @torch.no_grad()
    def decode_step(self, token: Tensor, state: StreamState) -> Tensor:
        """Feed one token per stream, `[B, 1]`; returns the logits `[B, V]`. The state is changed in place.

        Raises:
            ValueError: another number of tokens, or the state of another model.
        """
        if token.shape != (state.batch_size, 1):
            raise ValueError(f"token: expected [{state.batch_size}, 1], one per stream; got {list(token.shape)}")
        self._check_rows(token, state)
        state.logits = None
        model, plan = self.model, self._decoding_plan
        if plan is not None and not plan.describes_the_model():
            plan = None
        # cheaper per operation than no_grad; the logits are formed outside of it, so that callers may change them
        with torch.inference_mode():
            hidden = model.embed_tokens(token)
            if plan is not None:
                hidden = plan.step(hidden.squeeze(1), model.rotary, state)
            else:
                angles = model.rotary.step_angles(state.position, hidden.dtype)
                for layer, layer_angles, memory in zip(model.stack, angles, state.step_memories(), strict=True):
                    hidden = layer.step(hidden, layer_angles, memory)
                hidden = model.norm(hidden).squeeze(1)
            state.position += 1
        state.num_columns += 1
        return self.lm_head(hidden) if plan is None else plan.head.times(hidden)

    def init_carry(self, mode: Literal["exact", "detached"] = "exact") -> Carry:
        """An empty carry for `forward_chunk`.

        Raises:
            ValueError: an unknown mode.
        """
        if mode not in ("exact", "detached"):
            raise ValueError(f"mode: expected 'exact' or 'detached', got {mode!r}")
        keeps = [self.config.window(index) for index in range(self.config.num_hidden_layers)]
        return Carry(mode, tuple(CarryMemory(None if keep is None else keep - 1) for keep in keeps))

    def forward_chunk(
        self, input_ids: Tensor, carry: Carry, document_ids: Tensor | None = None
    ) -> tuple[Tensor, Carry]:
        """Run one chunk `[B, T]` after the carry; all chunks together equal one pass.

        Args:
            document_ids: integers `[B, T]`; a change, also from the previous chunk's last id, begins a document.
                Give them for every chunk of a stream or for none.

        Returns:
            Hidden states `[B, T, M]` after the final norm (for `model.loss`), and the carry for the next chunk.
        """
        if carry.mode == "exact" and any(_is_reentrant(layer) for layer in self.model.stack):
            raise ValueError(
                "gradient checkpointing with use_reentrant=True would lose the gradients that flow through the carry: "
                "enable it with use_reentrant=False, or take a detached carry"
            )
        if document_ids is not None or carry.document is not None:
            positions, visible, document, length = _document_chunk(input_ids, document_ids, carry)
        else:
            start, end = carry.num_tokens, carry.num_tokens + input_ids.shape[1]
            positions, visible = torch.arange(start, end, device=input_ids.device).unsqueeze(0), Visible()
            document = length = None
        hidden = self.model.embed_tokens(input_ids)
        angles = self.model.rotary.angles(positions, hidden.dtype)
        memories = []
        for layer, layer_angles, memory in zip(self.model.stack, angles, carry.memories, strict=True):
            hidden, after = layer(hidden, layer_angles, visible, memory)
            memories.append(after.detached() if carry.mode == "detached" else after)
        num_tokens = carry.num_tokens + input_ids.shape[1]
        return self.model.norm(hidden), Carry(carry.mode, tuple(memories), num_tokens, document, length)

    def check_state(self, state: StreamState) -> None:
        """Raise ValueError unless this model can go on with the state: one of its shape, dtype, device and weights.

        Every call that takes a state does so when it first meets it; a state that has read nothing has no weights yet.
        """
        if len(state.rings) != len(self.model.stack):
            raise ValueError(
                f"state: expected {len(self.model.stack)} layers, it holds {len(state.rings)}; it belongs to another "
                "model"
            )
        for index, (layer, rings) in enumerate(zip(self.model.stack, state.rings, strict=True)):
            for tensor in layer.self_attn.state_spec():
                held = tuple(rings[tensor.name].shape[1:]) if tensor.name in rings else None
                if held is None or any(want not in (None, have) for want, have in zip(tensor.shape, held, strict=True)):
                    raise ValueError(
                        f"state: layer {index} keeps {tensor.name} as {list(tensor.shape)}, the state holds "
                        f"{'none' if held is None else list(held)}; it belongs to another model"
                    )
        self._check_kind(state)
        if state.num_columns:
            maker, own = made_by(state), fingerprint(self)  # type: ignore[arg-type]
            if maker not in (None, own):
                raise ValueError(
                    f"state: it was made by other weights of the same shape (fingerprint {maker}, here {own}): go on "
                    "with the very weights that made it (training on, merging an adapter and casting make others), or "
                    "read its text again with these"
                )
        state.fits = ref(self)

    def _check_kind(self, state: StreamState) -> None:
        weight = self.model.embed_tokens.weight
        held, device = state.dtype, state.position.device
        if device != weight.device:
            raise ValueError(
                f"state: it is on {device}, the model on {weight.device}: load it there (load_state(path, device)), "
                "or move the model"
            )
        # under autocast the keys are not of the weights' dtype, and either serves
        if held != weight.dtype and not torch.is_autocast_enabled(device.type):
            short, own = (str(dtype).removeprefix("torch.") for dtype in (held, weight.dtype))
            raise ValueError(
                f"state: it holds {short}, the model's weights are {own}: go on with the model in {short}, as it made "
                f"the state, or read the text again in {own}"
            )

    def _check_rows(self, input_ids: Tensor, state: StreamState) -> None:
        if input_ids.dim() != 2 or input_ids.shape[0] != state.batch_size:
            raise ValueError(f"input_ids: expected [{state.batch_size}, tokens], got {list(input_ids.shape)}")
        if state.fits is None or state.fits() is not self:
            self.check_state(state)
        else:
            # the model may have been cast or moved meanwhile
            self._check_kind(state)


def _is_reentrant(layer: nn.Module) -> bool:
    options = getattr(getattr(layer, "_gradient_checkpointing_func", None), "keywords", {})
    return bool(layer.training and getattr(layer, "gradient_checkpointing", False) and options.get("use_reentrant"))


def _left_padding(attention_mask: Tensor | None, input_ids: Tensor, state: StreamState) -> Tensor | None:
    """Real tokens per row, int64 `[B]`, or None where there is no padding."""
    if attention_mask is None:
        return None
    if attention_mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask: expected {list(input_ids.shape)}, got {list(attention_mask.shape)}")
    if from_attention_mask(attention_mask).first_visible is None:
        return None
    num_real = (attention_mask != 0).sum(dim=1)
    on_the_right = ((attention_mask[:, -1] == 0) & (num_real > 0)).nonzero()
    if on_the_right.numel():
        raise ValueError(f"attention_mask: row {int(on_the_right[0])} is padded on the right; pad streams on the left")
    begun = ((num_real < input_ids.shape[1]) & (state.position > 0)).nonzero()
    if begun.numel():
        raise ValueError(f"attention_mask: row {int(begun[0])} has begun, so padding would be a hole in its stream")
    return num_real


def _document_chunk(
    input_ids: Tensor, document_ids: Tensor | None, carry: Carry
) -> tuple[Tensor, Visible, Tensor, Tensor]:
    """Positions, visibility, and the last document's id and length, where a document may begin in an older chunk."""
    if document_ids is None or (carry.document is None and carry.num_tokens):
        raise ValueError("document_ids: give them for every chunk of a stream or for none")
    if document_ids.shape != input_ids.shape:
        raise ValueError(f"document_ids: expected {list(input_ids.shape)}, got {list(document_ids.shape)}")
    ids = document_ids.long()
    before, length = carry.document, carry.document_length
    if before is None or length is None:
        before, length = torch.full_like(ids[:, 0], -1), torch.zeros_like(ids[:, 0])
    joined = torch.cat((before.unsqueeze(1), ids), dim=1)
    # numbered by their changes: ids need to differ between neighbours only
    numbers = (joined[:, 1:] != joined[:, :-1]).cumsum(1)
    numbers = torch.cat((torch.zeros_like(numbers[:, :1]), numbers), dim=1).masked_fill(joined < 0, -1)
    first = from_document_ids(numbers).first_visible
    own = torch.arange(ids.shape[1], device=ids.device)
    if first is None:
        start = (-length).unsqueeze(1).expand_as(ids)
    else:
        # index 0 is the carried document, which began `length` tokens before this chunk
        start = torch.where(first[:, 1:] == 0, -length.unsqueeze(1), first[:, 1:].long() - 1)
    positions = (own - start).clamp(min=0)
    after = torch.where(ids[:, -1] < 0, 0, ids.shape[1] - start[:, -1])
    return positions, Visible(start.clamp(min=FARTHEST).to(torch.int32)), ids[:, -1], after
