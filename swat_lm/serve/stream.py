"""One stream of tokens: read a prompt of any length in pieces, then generate token by token, in constant memory.

Text appears as soon as its bytes are whole. Knows tokenizers only by `decode`.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from swat_lm.model.modeling import SwatForCausalLM
from swat_lm.model.slots import Slots
from swat_lm.serve.sampling import Sampling, sample

__all__ = ["TextAssembler", "generate_tokens", "next_logits", "read_prompt"]


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

    What it gives out together is the text of all tokens decoded at once, invalid bytes included, wherever a tokenizer
    decodes bytes as they come (byte-level ones do). Decodes against a few tokens of context, since some tokenizers
    decide by the token before whether a space belongs between two; the rest is forgotten, so a stream of any length
    needs constant memory.
    """

    # an unfinished UTF-8 character is at most three bytes, each shown as a replacement character
    MOST_OPEN = 3
    # tokens kept before some are sought that can be forgotten, and before all of them are given up as they are
    MANY_HELD, MOST_HELD = 4, 16

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = True) -> None:
        """A tokenizer is anything with Hugging Face's `decode(ids, skip_special_tokens=...)`."""
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._context: list[int] = []
        self._held: list[int] = []
        # what was given out of the held tokens' text
        self._given = ""

    def push(self, token: int) -> str:
        """The text that became whole with this token, maybe none."""
        self._held.append(token)
        text = self._text_of_held()
        if text is None:
            # the last bytes change how those before them read: wait for the next ones, but not for ever
            return "" if len(self._held) < self.MANY_HELD else self._give_up()
        if not text.endswith("\ufffd"):
            new = text[len(self._given) :]
            self._context, self._held, self._given = self._held, [], ""
            return new
        settled = text.rstrip("\ufffd")
        settled = text[: max(len(settled), len(text) - self.MOST_OPEN)]
        new = settled[len(self._given) :]
        self._given += new
        if len(self._held) > self.MANY_HELD:
            new += self._forget_some(text)
        return new if len(self._held) < self.MOST_HELD else new + self._give_up()

    def finish(self) -> str:
        """What is still held back; incomplete bytes come as replacement characters."""
        new = self._give_up() if self._held else ""
        self._context = []
        return new

    def _forget_some(self, text: str) -> str:
        """Forget the held tokens before the last character's beginning; returns what was not yet given of them."""
        for count in range(len(self._held) - 1, 0, -1):
            first, rest = self._held[:count], self._held[count:]
            first_text = self._decode(first)
            # two parts of one character would be replaced apart
            if first_text + self._decode(rest) == text:
                new = first_text[len(self._given) :]
                self._context, self._held, self._given = first, rest, self._given[len(first_text) :]
                return new
        return ""

    def _give_up(self) -> str:
        """Forget all held tokens; returns what was not yet given of them."""
        text = self._text_of_held()
        new = (self._decode(self._held) if text is None else text)[len(self._given) :]
        self._context, self._held, self._given = self._held, [], ""
        return new

    def _text_of_held(self) -> str | None:
        """What the held tokens add to the context's text; None if they change what was given out already."""
        before = self._decode(self._context)
        whole = self._decode(self._context + self._held)
        return whole[len(before) :] if whole.startswith(before + self._given) else None

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=self._skip)
