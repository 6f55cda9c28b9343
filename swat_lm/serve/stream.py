"""One stream of tokens: read a prompt of any length in pieces, then generate token by token, in constant memory.

What its tokens say is text.py's matter.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from swat_lm.model.modeling import SwatForCausalLM
from swat_lm.model.slots import Slots
from swat_lm.serve.sampler import StreamSampler
from swat_lm.serve.sampling import Sampling

__all__ = ["generate_tokens", "next_logits", "read_prompt"]


@torch.inference_mode()
def read_prompt(
    model: SwatForCausalLM, pieces: Iterable[Sequence[int]], state: Slots, chunk: int = 512
) -> Tensor | None:
    """Feed token ids, piece by piece, to a state of one stream; returns the logits `[1, V]` after the last token.

    The pieces may go on for ever; none is kept. None if there was no token at all.
    """
    logits = None
    for piece in pieces:
        if len(piece):
            tokens = torch.tensor([list(piece)], dtype=torch.int64, device=model.device)
            logits, _ = model.prefill(tokens, state, chunk=chunk)
    return logits


@torch.inference_mode()
def next_logits(model: SwatForCausalLM, token: int, state: Slots) -> Tensor:
    """Logits `[1, V]` after one more token of a stream."""
    return model.decode_step(torch.tensor([[token]], device=model.device), state)


def generate_tokens(
    model: SwatForCausalLM,
    logits: Tensor,
    state: Slots,
    sampling: Sampling,
    max_new_tokens: int | None,
    generator: torch.Generator | None = None,
    stop: Collection[int] = (),
) -> Iterator[int]:
    """Draw and feed back tokens of one stream, beginning from the logits after its prompt.

    Ends after `max_new_tokens` (None: never) or with a token of `stop`, which is yielded too. The state has read every
    token but the last one yielded, so the stream can go on by feeding that one. With a generator the draws are its own,
    one after another; without one they follow from the seed of `sampling`. Raises ValueError for logits that are not
    finite.
    """
    sampler = StreamSampler(sampling, generator=generator)
    count = 0
    while max_new_tokens is None or count < max_new_tokens:
        token = sampler.next_token(logits[0])
        yield token
        count += 1
        if token in stop or count == max_new_tokens:
            return
        logits = next_logits(model, token, state)
