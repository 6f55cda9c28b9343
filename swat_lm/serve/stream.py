"""One stream through the engine: a pool of one slot, which is the stream's state; its prompt may never end.

What is read is forgotten, so memory is that of the state. Requests to the one slot follow each other: parts of a prompt
that are only read, then one that draws from the logits after them.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from swat_lm.model.modeling import SwatForCausalLM
from swat_lm.model.slots import Slots
from swat_lm.serve.engine import Engine
from swat_lm.serve.generation import Event, Generation
from swat_lm.serve.requests import Limits
from swat_lm.serve.sampling import Sampling

__all__ = ["Stream"]

READ = Sampling(max_tokens=0)


class Stream:
    """Reads and writes one sequence. For one thread at a time."""

    def __init__(
        self,
        model: SwatForCausalLM,
        tokenizer: Any,
        state: Slots | None = None,
        chunk: int = 512,
        end_tokens: Collection[int] = (),
    ) -> None:
        """Go on from a state of one stream, which is changed in place, or begin.

        Args:
            tokenizer: anything with Hugging Face's `decode`.
            chunk: tokens of a prompt per pass; only speed and memory depend on it.
            end_tokens: ids that end a text.

        Raises:
            ValueError: a state of another model, or of several streams.
        """
        self.state = model.init_state() if state is None else state
        self.logits: Tensor | None = self.state.logits
        """`[1, V]` after the last token; None where nothing is read, or where tokens were drawn."""
        self.last: int | None = None
        """The token drawn last, which the state has not read; None where there is none."""
        self._model = model
        self._engine = Engine(model, Limits(1, chunk + 1, chunk), tokenizer, end_tokens, slots=self.state)
        self._adopt()

    def read(self, pieces: Iterable[Sequence[int]]) -> None:
        """Read token ids, piece by piece. The pieces may go on for ever; none is kept."""
        self.stop()
        for piece in pieces:
            if not piece:
                continue
            before, self.last = [] if self.last is None else [self.last], None
            for event in self._serve([*before, *piece], READ, return_logits=True):
                self.logits = None if event.logits is None else event.logits[None]

    def write(self, sampling: Sampling) -> Iterator[Event]:
        """Draw tokens, an event for each; whoever has enough leaves, and calls `stop` for text that was held back.

        Raises ValueError where nothing was read before, or the logits are not finite.
        """
        self._settle()
        logits = self.logits
        if logits is None:
            raise ValueError("stream: nothing to go on from; read a token before drawing one")
        if sampling.max_tokens == 0:
            return
        self.logits = None
        for event in self._serve((), sampling, logits=logits[0]):
            if event.choice is not None:
                self.last = event.choice.token
            yield event

    def stop(self) -> str:
        """End what is being written; the text that was held back, maybe none."""
        if self._engine.is_idle:
            return ""
        text = self._engine._requests[0].replies[0].text.finish("stopped")
        self._engine.abort(0)
        # between two steps a slot holds what was read
        self._adopt()
        return text

    def close(self) -> None:
        """Read what was drawn last, and put the logits after it into the state, which is whole then.

        By a step as it would have come, so that a stream that is saved now goes on bit for bit.
        """
        self._settle()
        self.state.logits = self.logits

    @torch.inference_mode()
    def _settle(self) -> None:
        self.stop()
        if self.last is not None:
            token = torch.tensor([[self.last]], device=self.state.position.device)
            self.logits, self.last = self._model.decode_step(token, self.state), None
            self._engine.scheduler.release(0)
            self._adopt()

    def _adopt(self) -> None:
        self._engine.scheduler.adopt(0, int(self.state.position))

    def _serve(self, tokens: Sequence[int], sampling: Sampling, **more: Any) -> Iterator[Event]:
        held = self._engine.scheduler.kept[0]
        self._engine.submit(Generation(0, tokens, sampling, held=held, slot=0, **more))
        while not self._engine.is_idle:
            for event in self._engine.step():
                if event.cause is not None:
                    raise event.cause
                yield event
