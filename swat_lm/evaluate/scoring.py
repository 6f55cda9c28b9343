"""Log-likelihoods of continuations under any causal model: batches that fit by themselves, long rows in streams.

Logits exist for some tokens at a time and only where something is predicted. Rows with the same input are read once.
Legend: B rows, T tokens, N places, M model width, V vocabulary.
"""

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from swat_lm.evaluate.reader import reader_for, split_model
from swat_lm.model.loss import default_chunk
from swat_lm.model.modeling import SwatForCausalLM

__all__ = ["Row", "Score", "Scorer"]

logger = logging.getLogger(__name__)

STREAM_ABOVE = 4096
"""Tokens of the longest row that is read in one pass; longer ones are streams."""
CHUNK = 1024
"""Tokens of a stream per pass."""
TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 65536}
"""Padded tokens of a batch to begin with; halved when memory runs out."""


class Row(NamedTuple):
    """Tokens to predict and the tokens before them, neither empty."""

    context: Sequence[int]
    continuation: Sequence[int]


class Score(NamedTuple):
    """What a model thinks of a continuation."""

    log_likelihood: float
    """In nats."""
    is_greedy: bool
    """Whether every token of it is the likeliest one."""


@dataclass
class Reading:
    """One input to read, and the continuations that are looked up in it; each ends one token after the input."""

    tokens: list[int]
    wanted: list[tuple[int, Sequence[int]]] = field(default_factory=list)
    """Index of the row, and its continuation."""


class Places(NamedTuple):
    """A stretch of hidden states and the tokens it should predict."""

    index: int
    hidden: Tensor
    targets: Sequence[int]


class Scorer:
    """Scores rows with one model; remembers how large a batch fits.

    Args:
        model: any causal model; used in evaluation mode, without gradients.
        batch_size: rows per batch; None: as many as fit, beginning with `TOKENS_PER_BATCH`.
    """

    def __init__(self, model: PreTrainedModel, batch_size: int | None = None) -> None:
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, or None to let it fit by itself; got {batch_size}")
        self.model = model.eval()
        self.batch_size = batch_size
        # its state is its own business: of another type for each kind of model
        self.reader: Any = reader_for(model)
        self._body, self._head = split_model(model)
        self._streams: bool | None = None
        self._budget = TOKENS_PER_BATCH.get(model.device.type, TOKENS_PER_BATCH["cuda"])

    @property
    def is_endless(self) -> bool:
        """Whether reading on costs no more memory, however long the text: one of our models, with windows only."""
        model = self.model
        if not isinstance(model, SwatForCausalLM):
            return False
        return None not in [model.config.window(layer) for layer in range(model.config.num_hidden_layers)]

    def can_stream(self) -> bool:
        """Whether the model reads in chunks as in one pass; some recurrent models of transformers do not."""
        if self._streams is None:
            try:
                self.reader.start(1)
                self._streams = True
            except ValueError as error:
                logger.info("long texts are read in one pass: %s", error)
                self._streams = False
        return self._streams

    def score(
        self,
        rows: Sequence[Row],
        on_progress: Callable[[int, int], None] | None = None,
        *,
        stream_above: int = STREAM_ABOVE,
    ) -> list[Score]:
        """The score of every row, in order.

        Args:
            rows: nothing in them is cut; what is too long for the model is the caller's to decide.
            on_progress: called with tokens read and tokens in all.
            stream_above: inputs of more tokens are read in chunks, where the model can; 0: all of them.

        Raises:
            ValueError: a row without context or continuation, a token the model does not know, or one row that does
                not fit into memory.
        """  # fmt: skip
        readings = sorted(self._readings(rows), key=lambda reading: -len(reading.tokens))
        total, done = sum(len(reading.tokens) for reading in readings), 0
        sums = [(0.0, True)] * len(rows)
        start = 0
        while start < len(readings):
            streamed = len(readings[start].tokens) > stream_above and self.can_stream()
            count = self._fitting(readings, start, streamed, stream_above)
            batch = readings[start : start + count]
            try:
                found = list(self._stream(batch) if streamed else self._one_pass(batch))
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self._shrink(batch, count)
                continue
            for index, value, greedy in found:
                sums[index] = (sums[index][0] + value, sums[index][1] and greedy)
            start += count
            done += sum(len(reading.tokens) for reading in batch)
            if on_progress:
                on_progress(done, total)
        return [Score(*one) for one in sums]

    def _readings(self, rows: Sequence[Row]) -> list[Reading]:
        """Rows with the same input together, as in multiple choice between single tokens."""
        known: dict[tuple[int, ...], Reading] = {}
        for index, (context, continuation) in enumerate(rows):
            if not len(context) or not len(continuation):
                raise ValueError(f"row {index}: expected at least one token of context and one to predict")
            tokens = [*context, *continuation]
            largest = max(tokens)
            if largest >= self.reader.vocab_size or min(tokens) < 0:
                raise ValueError(
                    f"row {index}: token {largest} is not among the {self.reader.vocab_size} of the model: "
                    "tokenizer and model do not belong together"
                )
            inputs = tuple(tokens[:-1])
            known.setdefault(inputs, Reading(tokens[:-1])).wanted.append((index, continuation))
        return list(known.values())

    def _fitting(self, readings: Sequence[Reading], start: int, streamed: bool, stream_above: int) -> int:
        """How many readings make the next batch; the first is the longest."""
        longest = min(len(readings[start].tokens), CHUNK) if streamed else len(readings[start].tokens)
        count = self.batch_size or max(1, self._budget // longest)
        count = min(count, len(readings) - start)
        if streamed:
            while len(readings[start + count - 1].tokens) <= stream_above:
                count -= 1
        return count

    def _shrink(self, batch: Sequence[Reading], count: int) -> None:
        """Half the batch next time; raises ValueError where that does not help."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self.batch_size is not None or count == 1:
            raise ValueError(
                f"out of memory with {count} rows of {len(batch[0].tokens)} tokens: "
                + ("use a smaller --batch-size, or auto" if count > 1 else "shorten the texts, or use another device")
            )  # fmt: skip
        self._budget = max(1, count // 2) * len(batch[0].tokens)

    def _one_pass(self, batch: Sequence[Reading]) -> Iterator[tuple[int, float, bool]]:
        tokens = self._stack(batch, 0, len(batch[0].tokens))
        with torch.inference_mode():
            outputs = self._body(input_ids=tokens, use_cache=False)
        hidden = outputs.logits if self._head is None else outputs[0]
        places = []
        for row, reading in enumerate(batch):
            end = len(reading.tokens)
            for index, targets in reading.wanted:
                places.append(Places(index, hidden[row, end - len(targets) : end], targets))
        yield from self._look_up(places)

    def _stream(self, batch: Sequence[Reading]) -> Iterator[tuple[int, float, bool]]:
        state = self.reader.start(len(batch))
        longest = len(batch[0].tokens)
        for start in range(0, longest, CHUNK):
            end = min(start + CHUNK, longest)
            hidden = self.reader.extend(self._stack(batch, start, end), state)
            places = []
            for row, reading in enumerate(batch):
                for index, targets in reading.wanted:
                    first = len(reading.tokens) - len(targets)
                    low, high = max(start, first), min(end, len(reading.tokens))
                    if low < high:
                        part = targets[low - first : high - first]
                        places.append(Places(index, hidden[row, low - start : high - start], part))
            yield from self._look_up(places)

    def _stack(self, batch: Sequence[Reading], start: int, end: int) -> Tensor:
        """The tokens `start .. end` of each reading, int64 `[B, T]`, padded on the right, where none looks."""
        rows = torch.zeros(len(batch), end - start, dtype=torch.int64)
        for row, reading in enumerate(batch):
            part = reading.tokens[start:end]
            rows[row, : len(part)] = torch.tensor(part, dtype=torch.int64)
        return rows.to(self.model.device)

    @torch.inference_mode()
    def _look_up(self, places: Sequence[Places]) -> Iterator[tuple[int, float, bool]]:
        """Summed log-probability, and whether all are the likeliest, of each stretch; logits some places at a time."""
        if not places:
            return
        hidden = torch.cat([place.hidden for place in places])
        targets = torch.tensor(list(itertools.chain.from_iterable(place.targets for place in places)))
        values, greedy = [], []
        size = default_chunk(self.reader.vocab_size)
        for part, target in zip(hidden.split(size), targets.to(hidden.device).split(size), strict=True):
            logits = self.reader.logits(part)
            of_target = logits.gather(-1, target.unsqueeze(-1)).squeeze(-1)
            values.append((of_target - logits.logsumexp(-1)).double())
            greedy.append(logits.argmax(-1) == target)
        lengths = [len(place.targets) for place in places]
        by_place = zip(torch.cat(values).cpu().split(lengths), torch.cat(greedy).cpu().split(lengths), strict=True)
        for place, (value, hit) in zip(places, by_place, strict=True):
            yield place.index, math.fsum(value.tolist()), bool(hit.all())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch says that memory ran out, on a GPU or a CPU."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or any(one in str(error) for one in words)
