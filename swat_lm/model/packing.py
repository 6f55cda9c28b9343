"""Several sequences read in one call: their tokens lie one after the other in a row, and each has a past of its own.

What is computed token by token is computed for the whole row, without padding; what mixes tokens, for each sequence.
Legend: T tokens of the row, t tokens of one sequence, M model width.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from swat_lm.layers.base import Part
from swat_lm.model.execution import is_hooked
from swat_lm.model.inputs import plan_stream
from swat_lm.model.slots import Slots

if TYPE_CHECKING:
    from swat_lm.model.modeling import SwatForCausalLM

__all__ = ["Reading", "extend_packed", "may_pack"]


class Reading(NamedTuple):
    """Tokens that a slot reads."""

    tokens: Sequence[int]
    """t of them, at least one."""
    slot: int
    num_past: int
    """Tokens that the slot has read before."""


def may_pack(model: "SwatForCausalLM") -> bool:
    """Whether nobody waits for the call of a layer (a hook), and no layer hands on fewer tokens than it gets."""
    return not any(layer.shortens for layer in model.model.stack) and not any(map(is_hooked, model.model._stepped_over))


def places_of(readings: Sequence[Reading], places: Sequence[int] | None, total: int | None) -> tuple[list[slice], int]:
    """Where each lies in the row, and T. Raises ValueError where they do not fit."""
    counts = [len(reading.tokens) for reading in readings]
    if not counts or min(counts) < 1:
        raise ValueError(f"readings: expected at least one, with at least one token each; got {counts} tokens")
    if places is None:
        places = [sum(counts[:index]) for index in range(len(counts))]
    if len(places) != len(counts):
        raise ValueError(f"places: expected {len(counts)}, one for each reading; got {len(places)}")
    found = [slice(place, place + count) for place, count in zip(places, counts, strict=True)]
    ends = sorted((one.start, one.stop) for one in found)
    length = ends[-1][1] if total is None else total
    if ends[0][0] < 0 or ends[-1][1] > length or any(one[1] > two[0] for one, two in pairwise(ends)):
        raise ValueError(f"places: expected the readings side by side in a row of {length} tokens, got {ends}")
    return found, length


@torch.no_grad()
def extend_packed(
    model: "SwatForCausalLM",
    readings: Sequence[Reading],
    state: Slots,
    places: Sequence[int] | None = None,
    total: int | None = None,
) -> list[Tensor]:
    """Let slots read tokens, in one call; returns the hidden states `[t, M]` of each after the final norm.

    What one comes out as depends on T and on its place in the row, by the rounding of products of other sizes, but not
    on what lies beside it. So a call can be repeated bit for bit for one of them alone.

    Args:
        state: changed in place.
        places: where each begins in the row; None: one after the other.
        total: T; places of no reading are filled up with tokens that nobody sees. None: up to the last one's end.

    Raises:
        ValueError: readings that do not fit the row or the slots, or `may_pack` says no; nothing is read then.
    """
    if not may_pack(model):
        raise ValueError("extend_packed: a layer is hooked, or hands on fewer tokens than it gets; use extend for each")
    if state.passed is not None:
        raise ValueError("extend_packed: passes are recorded to be taken back; use extend, or slots that record none")
    slots = [reading.slot for reading in readings]
    if len(set(slots)) != len(slots):
        raise ValueError(f"readings: expected different slots, got {slots}")
    tokens, length = places_of(readings, places, total)
    device = state.position.device
    ids = torch.zeros(1, length, dtype=torch.int64)
    for reading, place in zip(readings, tokens, strict=True):
        ids[0, place] = torch.tensor(reading.tokens)
    # all of them before anything is kept
    all_rows = [
        model._rows_after(ids[:, place], state, torch.tensor([reading.slot], device=device), reading.num_past)
        for reading, place in zip(readings, tokens, strict=True)
    ]
    state.logits = None
    chunks = [plan_stream(state, rows) for rows in all_rows]
    pasts = [state.pasts(rows) for rows in all_rows]
    hidden = model.model.embed_tokens(ids.to(device))
    for index, layer in enumerate(model.model.stack):
        parts = [Part(place, chunk, past[index]) for place, chunk, past in zip(tokens, chunks, pasts, strict=True)]
        hidden = layer.forward_packed(hidden, parts)
    for rows in all_rows:
        state.advance(rows)
    hidden = model.model.norm(hidden)[0]
    return [hidden[place] for place in tokens]
