"""The pieces of prompts of one step, read in one call, and the logits that are asked for, in one product.

Legend: t tokens of a piece, n of them whose logits are wanted, M model width, V vocabulary.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from swat_lm.model.modeling import SwatForCausalLM
from swat_lm.model.packing import Reading, extend_packed, may_pack
from swat_lm.model.slots import Slots
from swat_lm.serve.generation import Event
from swat_lm.serve.requests import Piece
from swat_lm.serve.sampler import SamplingError, token_logprobs

if TYPE_CHECKING:
    from swat_lm.serve.running import Running

__all__ = ["Place", "Read", "read_again", "read_together", "take_in"]


class Place(NamedTuple):
    """Where a piece lay in the row of its call, on which its rounding depends (`extend_packed` repeats it)."""

    total: int
    """Tokens of the row."""
    offset: int
    count: int


class Read(NamedTuple):
    """What came of a piece."""

    hidden: Tensor
    """`[t, M]` after the final norm."""
    logits: Tensor
    """`[n, V]` of the last n tokens."""
    place: Place


def read_together(model: SwatForCausalLM, slots: Slots, pieces: Sequence[tuple["Running", Piece]]) -> list[Read]:
    """Let slots read the pieces of their requests.

    A pool of one slot, and a model that cannot pack (hooks in its layers), read one piece after the other.
    """
    readings = [
        Reading(
            running.tokens[piece.start : piece.start + piece.count], piece.slot, running.generation.held + piece.start
        )
        for running, piece in pieces
    ]
    counts, wanted = [piece.count for _, piece in pieces], [num_wanted(*one) for one in pieces]
    if reads_together(model, slots):
        hidden = extend_packed(model, readings, slots)
        total, offsets = sum(counts), [0, *accumulate(counts)]
        places = [Place(total, offset, count) for offset, count in zip(offsets, counts, strict=False)]
    else:
        hidden = [read_alone(model, slots, reading) for reading in readings]
        places = [Place(count, 0, count) for count in counts]
    rows = torch.cat([each[len(each) - count :] for each, count in zip(hidden, wanted, strict=True)])
    logits = model.lm_head(rows) if len(rows) else rows.new_empty(0, model.config.vocab_size)
    return [Read(*one) for one in zip(hidden, logits.split(wanted), places, strict=True)]


def reads_together(model: SwatForCausalLM, slots: Slots) -> bool:
    """Whether pieces share a call."""
    return slots.num_slots > 1 and may_pack(model)


def read_again(model: SwatForCausalLM, slots: Slots, reading: Reading, place: Place) -> Tensor:
    """Let a slot read a piece once more as it was read in its place, bit for bit, whoever was beside it; `[t, M]`.

    Raises ValueError for a place that is not the piece's, or that a model which cannot pack does not know.
    """
    if len(reading.tokens) != place.count:
        raise ValueError(f"place: expected {len(reading.tokens)} tokens, those of the reading; got {place.count}")
    if reads_together(model, slots):
        return extend_packed(model, [reading], slots, [place.offset], place.total)[0]
    if place.total != place.count:
        raise ValueError(
            f"place: {place.count} tokens of {place.total} were read together, and here pieces are read one by one: "
            "take the hooks out of the model's layers, and a pool of as many slots as before"
        )
    return read_alone(model, slots, reading)


def num_wanted(running: "Running", piece: Piece) -> int:
    """Of how many of a piece's last tokens the logits are needed."""
    generation = running.generation
    if generation.prompt_logprobs is not None:
        return piece.count
    return int(piece.is_last and (generation.sampling.max_tokens != 0 or generation.return_logits))


def read_alone(model: SwatForCausalLM, slots: Slots, reading: Reading) -> Tensor:
    """One piece in a call of its own, `[t, M]`."""
    device = slots.position.device
    slot = None if slots.num_slots == 1 else torch.tensor([reading.slot], device=device)
    ids = torch.tensor([list(reading.tokens)], device=device)
    return model.extend(ids, slots, slot=slot, num_past=reading.num_past)[0]


def take_in(running: "Running", piece: Piece, read: Read) -> list[Event]:
    """What a piece brought to its request; its logits are kept where they are needed."""
    generation, events = running.generation, []
    if generation.embedding:
        running.sum = running.sum + read.hidden.float().sum(dim=0)
    if generation.prompt_logprobs is not None:
        logits = read.logits
        if not torch.isfinite(logits).all():
            raise not_finite("logits")
        before = logits[:-1] if running.logits is None else torch.cat((running.logits, logits[:-1]))
        part = running.tokens[piece.start : piece.start + piece.count]
        weighed = part[len(part) - len(before) :]
        vocabulary = generation.sampling.vocab_size
        choices = token_logprobs(before, weighed, generation.prompt_logprobs, vocabulary) if weighed else []
        events.append(Event(piece.key, prompt=tuple(choices)))
    # those of the whole call would be held with them
    running.logits = read.logits[-1:].clone() if len(read.logits) else None
    if piece.is_last and generation.sampling.max_tokens == 0:
        logits = running.logits[0] if generation.return_logits and running.logits is not None else None
        found = None
        if generation.embedding:
            total = torch.as_tensor(running.sum)
            if not torch.isfinite(total).all():
                raise not_finite("hidden states")
            found = tuple(F.normalize(total, dim=0).tolist())
        running.logits = None
        events.append(Event(piece.key, ended="read", logits=logits, embedding=found))
    return events


def not_finite(what: str) -> SamplingError:
    """Of weights that no score can be formed with."""
    return SamplingError(
        f"the model's {what} are not finite numbers; load the weights in a wider dtype or check the checkpoint"
    )
