"""Reading turns again exactly as they were read, bit for bit: what a journal is for after a crash."""

from collections.abc import Iterable, Sequence

import torch

from swat_lm.model.packing import Reading, extend_packed, may_pack
from swat_lm.serve.engine import Engine
from swat_lm.serve.reading import read_alone
from swat_lm.serve.sessions.record import SessionError, Turn

__all__ = ["replay"]


@torch.inference_mode()
def replay(engine: Engine, turns: Iterable[Turn]) -> None:
    """Read the turns, as their journal says, into slot 0 of an engine in which nothing runs.

    The slot holds what the session had before them; what other slots hold is lost.

    Raises:
        SessionError: `damaged`, where a turn does not follow on what was before it.
    """
    if not engine.is_idle or engine.scheduler.kept:
        raise ValueError("engine: expected one that is idle and keeps no slot; a replay writes into all of them")
    for turn in turns:
        read = 0
        for fed in turn.fed:
            tokens = turn.tokens[read : read + fed.count]
            if fed.kind == "piece":
                read_piece(engine, tokens, fed.size, fed.place)
            else:
                read_steps(engine, tokens, fed.size, fed.place)
            read += fed.count
        held = int(engine.slots.position[0])
        if held != turn.after.held:
            raise SessionError(
                "damaged", f"after turn {turn.after.turns} its state has read {held} tokens, not {turn.after.held}"
            )


def read_piece(engine: Engine, tokens: Sequence[int], total: int, place: int) -> None:
    """In one call, at its place in a row of so many tokens, as the engine reads the pieces of a step."""
    if not 0 <= place <= total - len(tokens):
        raise SessionError("damaged", f"{len(tokens)} tokens were read from place {place} on in a row of {total}")
    reading = Reading(tokens, 0, int(engine.slots.position[0]))
    if may_pack(engine.model):
        extend_packed(engine.model, [reading], engine.slots, [place], total)
    else:
        read_alone(engine.model, engine.slots, reading)


def read_steps(engine: Engine, tokens: Sequence[int], size: int, place: int) -> None:
    """One after the other, in a row of a batch; slot 0 has that row, and others fill the batch up."""
    if not 0 <= place < size <= engine.slots.num_slots:
        raise SessionError(
            "damaged",
            f"tokens were read in row {place} of {size}, and there are {engine.slots.num_slots} slots here: start the "
            "server with as many slots as before",
        )
    device = engine.slots.position.device
    others = torch.arange(1, size, device=device)
    slot = (
        torch.cat((others[:place], torch.zeros_like(others[:1]), others[place:])) if size > 1 else others.new_zeros(1)
    )
    batch = torch.zeros(size, 1, dtype=torch.int64, device=device)
    for token in tokens:
        engine.slots.position[others] = 0
        batch[place] = token
        engine.model.decode_step(batch, engine.slots, slot, batch_invariant=True)
