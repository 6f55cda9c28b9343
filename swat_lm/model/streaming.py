"""Endless streams: prefill in chunks and a lean decode step over slots; and training chunk by chunk.

Legend: N slots, B rows, T tokens, M model width, V vocabulary.
"""

from typing import TYPE_CHECKING, Any, Literal
from weakref import ref

import torch
from torch import Tensor, nn

from swat_lm.layers.base import by_name
from swat_lm.layers.chunk import Chunk
from swat_lm.model.decoding import DecodingPlan, arrange, contiguous_state_dict
from swat_lm.model.execution import check_chunk, run_layers, step_layers
from swat_lm.model.fingerprint import fingerprint
from swat_lm.model.inputs import check_mask, plan_stream
from swat_lm.model.pasts import Carry, CarryPast, Rows
from swat_lm.model.slots import Slots
from swat_lm.model.state import made_by

if TYPE_CHECKING:
    from swat_lm.model.configuration import SwatConfig
    from swat_lm.model.modeling import SwatModel


class Streaming:
    """Mixed into the language model: slots, prefill, the decode step, and chunks with a carry."""

    _decoding_plan: DecodingPlan | None = None
    _is_arranged = False
    _known_fingerprint: tuple[bytes, str] | None = None

    if TYPE_CHECKING:
        model: SwatModel
        lm_head: nn.Linear
        config: SwatConfig
        register_state_dict_post_hook: Any

    def init_state(
        self,
        batch_size: int = 1,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        capacity: int | None = None,
    ) -> Slots:
        """Empty slots for B streams; dtype and device are the model's unless given.

        Args:
            capacity: tokens that a layer without a window may keep per slot; more are refused. None: it grows.

        Raises:
            ValueError: a batch size below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        weight = self.model.embed_tokens.weight
        specs = [layer.state_spec() for layer in self.model.stack]
        slots = Slots(specs, batch_size, dtype or weight.dtype, device or weight.device, capacity)
        slots.fits = ref(self)
        return slots

    def arrange_for_decoding(self) -> None:
        """Lay the weights out in memory as decoding on a CPU reads them fastest: most by input channel, and joined.

        Shapes, names, values and bytes do not change, and whatever the model does still works; only the order of sums
        does. A product with one row streams through such a matrix, where rows of dot products wait for memory: 18 to
        22 GB/s instead of 12 on one core that reads 25 GB/s (width 768, 2,304 to 16,384 outputs; docs/experiments.md).
        `decode_step` then takes a shorter way, but for layers of which a module is replaced or a weight is moved later.

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
    def extend(
        self,
        input_ids: Tensor,
        state: Slots,
        attention_mask: Tensor | None = None,
        *,
        slot: Tensor | None = None,
        lengths: Tensor | None = None,
        num_past: int | None = None,
    ) -> Tensor:
        """Feed one chunk `[B, T]` of any length; returns the hidden states `[B, T, M]` after the final norm.

        Args:
            state: changed in place.
            attention_mask: `[B, T]`: left padding in rows that have not begun; a hole is a token that nobody sees.
            slot: int64 `[B]`, the slots of the rows, each at its own position; None: all slots in order.
            lengths: int64 `[B]`, how many tokens of each row are real, from the left; the rest is padding. A row of 0
                stays as it is.
            num_past: tokens that the row has read which has read most of them. None: a bound that the slots know, which
                is as right, but looks farther back, and then rounds otherwise, where other slots have read more.

        Raises:
            ValueError: rows that are not the slots', lengths beyond the chunk, padding that a stream has no place for,
                or another `num_past` than the rows have (looked at where they lie on the CPU); nothing is read then.
        """
        rows, hidden_tokens = self._stream_rows(input_ids, state, attention_mask, slot, lengths)
        if num_past is not None:
            self._look_back(rows, num_past)
        state.logits = None
        hidden = self.model.embed_tokens(input_ids)
        chunk = plan_stream(state, rows, hidden_tokens)
        hidden, _, _ = run_layers(self.model.stack, hidden, chunk, state.pasts(rows))
        state.advance(rows, None if hidden_tokens is None else hidden_tokens.sum(dim=1))
        return self.model.norm(hidden)

    @torch.no_grad()
    def prefill(
        self,
        input_ids: Tensor,
        state: Slots,
        chunk: int = 512,
        attention_mask: Tensor | None = None,
        *,
        slot: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Slots]:
        """Feed a prompt `[B, T]` in chunks; returns the logits after each row's last token, `[B, V]`, and the state.

        Args:
            state: changed in place.
            chunk: tokens per chunk, any size; only speed and memory depend on it.
            attention_mask, slot, lengths: see `extend`.

        Raises:
            ValueError: an empty prompt or a chunk below 1, and what `extend` refuses.
        """
        if chunk < 1:
            raise ValueError(f"chunk: expected at least 1 token, got {chunk}")
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError(
                f"input_ids: expected [batch, tokens] with at least one token, got {list(input_ids.shape)}"
            )
        # all of it, so that nothing is read where a later chunk would be refused
        self._stream_rows(input_ids, state, attention_mask, slot, lengths)
        last = None
        for start in range(0, input_ids.shape[1], chunk):
            part = input_ids[:, start : start + chunk]
            mask = None if attention_mask is None else attention_mask[:, start : start + chunk]
            left = None if lengths is None else (lengths - start).clamp(0, part.shape[1])
            hidden = self.extend(part, state, mask, slot=slot, lengths=left)
            if left is None:
                last = hidden[:, -1]
                continue
            # of rows that have ended, what they ended with
            own = hidden[torch.arange(len(left), device=left.device), (left - 1).clamp(min=0)]
            last = own if last is None else torch.where((left > 0)[:, None], own, last)
        assert last is not None
        return self.lm_head(last), state

    @torch.no_grad()
    def decode_step(
        self, token: Tensor, state: Slots, slot: Tensor | None = None, *, batch_invariant: bool = False
    ) -> Tensor:
        """Feed one token per row, `[B, 1]`; returns the logits `[B, V]`. The state is changed in place.

        Args:
            slot: int64 `[B]`, the slots of the rows; None: all slots in order.
            batch_invariant: let a row come out bit for bit the same whatever the others of a batch of this size hold,
                and whichever slots they have. A CPU then attends row by row.

        Raises:
            ValueError: another number of tokens, slots that are not there or that two rows name (looked at where they
                lie on the CPU), the state of another model, or `batch_invariant` where tokens are hidden in the slots
                or passes are recorded.
        """
        num_rows = state.num_slots if slot is None else len(slot)
        if token.shape != (num_rows, 1):
            raise ValueError(f"token: expected [{num_rows}, 1], one per stream; got {list(token.shape)}")
        self._check_state(state)
        if slot is not None:
            if slot.device.type == "cpu":
                # elsewhere looking at them would make every step wait for the device
                check_slots(slot, state)
            state.ragged = True
        state.logits = None
        if state.has_holes or state.passed is not None:
            # a step cannot see which of the items it reads are hidden, nor take them back
            if batch_invariant:
                raise ValueError(
                    "batch_invariant: tokens are hidden in these slots, or passes are recorded to be taken back, and "
                    "then a step looks as far back as the fullest row has read; leave it out, or use slots without"
                )
            return self.lm_head(self.extend(token, state, slot=slot)[:, -1])
        plan, model = self._decoding_plan, self.model
        # cheaper per operation than no_grad; the logits are formed outside of it, so that callers may change them
        with torch.inference_mode():
            hidden = model.embed_tokens(token.squeeze(1))
            if slot is None:
                pasts, positions = state.step_pasts(), state.position
            else:
                rows = state.rows(1, slot)
                pasts, positions = state.pasts(rows), rows.position
            if plan is None:
                chunk = Chunk(positions[:, None], batch_invariant=batch_invariant)
                hidden = model.norm(step_layers(model.stack, hidden, chunk, pasts))
            else:
                may_share = slot is None and not batch_invariant
                hidden = plan.step(model.stack, hidden, positions, pasts, model.norm, may_share, batch_invariant)
            if slot is None:
                state.position += 1
                state.count(1)
            else:
                state.advance(rows)
        return self.lm_head(hidden) if plan is None else plan.logits(self.lm_head, hidden)

    def init_carry(self, mode: Literal["exact", "detached"] = "exact") -> Carry:
        """An empty carry for `forward_chunk`.

        Raises:
            ValueError: an unknown mode.
        """
        if mode not in ("exact", "detached"):
            raise ValueError(f"mode: expected 'exact' or 'detached', got {mode!r}")
        return Carry(mode, tuple(CarryPast(by_name(layer.state_spec())) for layer in self.model.stack))

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
        outputs = self(input_ids, document_ids=document_ids, carry=carry, return_logits=False)  # type: ignore[operator]
        return outputs.last_hidden_state, outputs.carry

    def check_state(self, state: Slots) -> None:
        """Raise ValueError unless this model can go on with the state: one of its plan, dtype, device and weights.

        Every call that takes a state does so when it first meets it; a state that has read nothing has no weights yet.
        """
        state.check_specs([layer.state_spec() for layer in self.model.stack])
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

    def _check_kind(self, state: Slots) -> None:
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

    def _check_state(self, state: Slots) -> None:
        if state.fits is None or state.fits() is not self:
            self.check_state(state)
        else:
            # the model may have been cast or moved meanwhile
            self._check_kind(state)

    def _rows_after(self, input_ids: Tensor, state: Slots, slot: Tensor, num_past: int) -> Rows:
        """The rows of a chunk of real tokens, after so many; raises before anything is read."""
        rows, _ = self._stream_rows(input_ids, state, None, slot, None)
        self._look_back(rows, num_past)
        return rows

    @staticmethod
    def _look_back(rows: Rows, num_past: int) -> None:
        if rows.position.device.type == "cpu" and num_past != int(rows.position.max()):
            raise ValueError(
                f"num_past: the row that has read most has read {int(rows.position.max())} tokens, got {num_past}"
            )
        rows.num_past = num_past

    def _stream_rows(
        self,
        input_ids: Tensor,
        state: Slots,
        attention_mask: Tensor | None,
        slot: Tensor | None,
        lengths: Tensor | None,
    ) -> tuple[Rows, Tensor | None]:
        """The rows of a chunk, and which of their tokens are hidden, bool `[B, T]`; raises before anything is read."""
        num_rows = state.num_slots if slot is None else len(slot)
        if input_ids.dim() != 2 or input_ids.shape[0] != num_rows:
            raise ValueError(f"input_ids: expected [{num_rows}, tokens], got {list(input_ids.shape)}")
        self._check_state(state)
        check_chunk(self.model.stack, Chunk(input_ids), has_past=True)
        num_tokens = input_ids.shape[1]
        if slot is not None:
            check_slots(slot, state)
            state.ragged = True
        begin = end = hidden = None
        if lengths is not None:
            if attention_mask is not None:
                raise ValueError("lengths: give either lengths or attention_mask")
            check_lengths(lengths, num_rows, num_tokens)
            end, state.ragged = lengths.to(state.position.device), True
        if attention_mask is not None:
            begin, hidden = masked_rows(attention_mask, input_ids, state, slot)
            state.ragged = state.ragged or begin is not None
        return state.rows(num_tokens, slot, begin, end), hidden


def check_slots(slot: Tensor, state: Slots) -> None:
    """Raise ValueError for slots that are not there, or that two rows name."""
    found = slot.tolist()
    if slot.dim() != 1 or len(set(found)) != len(found) or not all(0 <= number < state.num_slots for number in found):
        raise ValueError(f"slot: expected different numbers from 0 to {state.num_slots - 1}, one per row; got {found}")


def check_lengths(lengths: Tensor, num_rows: int, num_tokens: int) -> None:
    """Raise ValueError for lengths that do not fit the rows."""
    if lengths.shape != (num_rows,) or bool(((lengths < 0) | (lengths > num_tokens)).any()):
        raise ValueError(
            f"lengths: expected {num_rows} numbers from 0 to {num_tokens}, the real tokens of each row; "
            f"got {lengths.tolist()}"
        )


def masked_rows(
    attention_mask: Tensor, input_ids: Tensor, state: Slots, slot: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Columns of padding before each row's first token, int64 `[B]`, and hidden tokens, bool `[B, T]`; None: none.

    What is not real is padding in rows that have not begun, and hidden in those that have.
    """
    check_mask(attention_mask, *input_ids.shape)
    real = attention_mask != 0
    if attention_mask.dtype != torch.bool and bool((real & (attention_mask != 1)).any()):
        raise ValueError("attention_mask: expected only 0 (padding) and 1 (real token); additive masks have no meaning")
    if bool(real.all()):
        return None, None
    position = state.position if slot is None else state.position[slot]
    begun = (real.cumsum(dim=1) > 0) | (position > 0)[:, None]
    hidden, padding = begun & ~real, (~begun).sum(dim=1)
    return padding if bool(padding.any()) else None, hidden if bool(hidden.any()) else None
