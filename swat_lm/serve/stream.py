"""One stream of tokens: read a prompt of any length in pieces, then generate token by token, in constant memory.

Text appears as soon as its bytes are whole. Knows tokenizers only by `decode`.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from swat_lm.model.modeling import SwatForCausalLM
from swat_lm.model.state import StreamState
from swat_lm.serve.sampling import Sampling, sample

__all__ = ["TextAssembler", "generate_tokens", "read_prompt"]


@torch.inference_mode()
def read_prompt(
    model: SwatForCausalLM, pieces: Iterable[Sequence[int]], state: StreamState, chunk: int = 512
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
def next_logits(model: SwatForCausalLM, token: int, state: StreamState) -> Tensor:
    """Logits `[1, V]` after one more token of a stream."""
    return model.decode_step(torch.tensor([[token]], device=model.device), state)


def generate_tokens(
    model: SwatForCausalLM,
    logits: Tensor,
    state: StreamState,
    sampling: Sampling,
    max_new_tokens: int | None,
    generator: torch.Generator | None = None,
    stop: Collection[int] = (),
) -> Iterator[int]:
    """Draw and feed back tokens of one stream, beginning from the logits after its prompt.

    Ends after `max_new_tokens` (None: never) or with a token of `stop`, which is yielded too. The state has read every
    token but the last one yielded, so the stream can go on by feeding that one.
    """
    count = 0
    while max_new_tokens is None or count < max_new_tokens:
        token = int(sample(logits, sampling, generator)[0])
        yield token
        count += 1
        if token in stop or count == max_new_tokens:
            return
        logits = next_logits(model, token, state)


class TextAssembler:
    """Turns tokens into text one at a time, holding back bytes that do not yet make a character.

    Decodes against a few tokens of context, since some tokenizers decide by the token before whether a space belongs
    between two; the rest is forgotten, so a stream of any length needs constant memory.
    """

    # no UTF-8 character is longer than four bytes: what is not whole after that will never be
    MOST_HELD = 4

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = True) -> None:
        """A tokenizer is anything with Hugging Face's `decode(ids, skip_special_tokens=...)`."""
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._context: list[int] = []
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """The text that became whole with this token, maybe none."""
        self._held.append(token)
        text = self._new_text()
        if text.endswith("\ufffd") and len(self._held) < self.MOST_HELD:
            return ""
        self._context, self._held = self._held, []
        return text

    def finish(self) -> str:
        """What is still held back; incomplete bytes come as replacement characters."""
        text = self._new_text() if self._held else ""
        self._context, self._held = [], []
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._context, skip_special_tokens=self._skip)
        return self._tokenizer.decode(self._context + self._held, skip_special_tokens=self._skip)[len(before) :]
