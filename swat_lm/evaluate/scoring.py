"""Log-likelihoods of continuations under any causal model: batches that fit by themselves, long rows in streams.

Logits exist for some tokens at a time and only where something is predicted. What rows have in common is read once.
Legend: B rows, T tokens, N places, M model width, V vocabulary.
"""

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from swat_lm.evaluate.prefixes import ModelInput, PrefixGroup, Request, distinct_inputs, prefix_groups
from swat_lm.evaluate.streaming_model import padded, streaming_model
from swat_lm.model.loss import default_chunk
from swat_lm.model.modeling import SwatForCausalLM
from swat_lm.words import counted

__all__ = ["Score", "Scorer"]

logger = logging.getLogger(__name__)

STREAM_ABOVE = 4096
"""Tokens of the longest row that is read in one pass; longer ones are streams."""
CHUNK = 1024
"""Tokens of a stream per pass."""
TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 65536}
"""Padded tokens of a batch to begin with; halved when memory runs out."""

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
"""What torch's errors say where memory ran out, on a GPU or a CPU."""


class Score(NamedTuple):
    """What a model thinks of a continuation."""

    log_likelihood: float
    """In nats."""
    is_greedy: bool
    """Whether every token of it is the likeliest one."""


Answer = tuple[int, float, bool]
"""A row's index; log-likelihood of a stretch of its continuation; whether all of it are the likeliest tokens."""
Work = Callable[[Sequence[PrefixGroup]], Iterator[Answer]]


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
        self.streaming = streaming_model(model)
        self._budget = TOKENS_PER_BATCH.get(model.device.type, TOKENS_PER_BATCH["cuda"])

    @property
    def is_endless(self) -> bool:
        """Whether reading on costs no more memory, however long the text: one of our models, where no layer grows."""
        if not isinstance(self.model, SwatForCausalLM):
            return False
        return all(kept.kind != "growing" for layer in self.model.model.stack for kept in layer.state_spec())

    @cached_property
    def can_stream(self) -> bool:
        """Whether the model reads in chunks as in one pass; some recurrent models of transformers do not."""
        try:
            self.streaming.start(1)
        except ValueError as error:
            logger.info("long texts are read in one pass: %s", error)
            return False
        return True

    def score(
        self,
        rows: Sequence[Request],
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
        found = prefix_groups(distinct_inputs(rows, self.streaming.vocab_size))
        if not isinstance(self.model, SwatForCausalLM):
            # what others keep of a beginning cannot be repeated for each member without knowing its kind
            found = alone(found)
        sums = [(0.0, True)] * len(rows)
        done, total = 0, sum(group.num_tokens for group in found)
        for work, waiting in self._plans(found, stream_above):
            start = 0
            while start < len(waiting):
                batch = self._fitting(waiting, start, CHUNK if work == self._stream else None)
                try:
                    answers = list(work(batch))
                except RuntimeError as error:
                    if not any(words in str(error) for words in OUT_OF_MEMORY):
                        raise
                    self._shrink(batch)
                    continue
                for index, value, greedy in answers:
                    sums[index] = (sums[index][0] + value, sums[index][1] and greedy)
                start += len(batch)
                done += sum(group.num_tokens for group in batch)
                if on_progress:
                    on_progress(done, total)
        return [Score(*score) for score in sums]

    def _plans(self, found: Sequence[PrefixGroup], stream_above: int) -> list[tuple[Work, list[PrefixGroup]]]:
        """Ways to read, and what is read so, the longest first."""
        plans: dict[Work, list[PrefixGroup]] = {self._stream: [], self._shared: [], self._one_pass: []}
        for group in found:
            if group.longest > stream_above and self.can_stream:
                plans[self._stream] += alone([group])
            else:
                plans[self._shared if group.num_shared else self._one_pass].append(group)
        # first by beginnings of about one length, so that neither these nor the rests are padded much
        return [
            (work, sorted(some, key=lambda group: (-(group.num_shared // 16), -group.longest)))
            for work, some in plans.items()
        ]

    def _fitting(self, waiting: Sequence[PrefixGroup], start: int, at_once: int | None) -> list[PrefixGroup]:
        """The next batch, at least one; `at_once` bounds the tokens of a row that count."""
        batch = [waiting[start]]
        for group in waiting[start + 1 :]:
            more = [*batch, group]
            if self.batch_size is not None:
                if len(members_of(more)) > self.batch_size:
                    break
            elif padded_tokens(more, at_once) > self._budget:
                break
            batch = more
        return batch

    def _shrink(self, batch: Sequence[PrefixGroup]) -> None:
        """Half the batch next time; raises ValueError where that does not help."""
        torch.cuda.empty_cache()
        if self.batch_size is not None or len(batch) == 1:
            advice = (
                "use a smaller --batch-size, or auto" if len(batch) > 1 else "shorten the texts, or use another device"
            )
            longest = max(group.num_shared + group.longest for group in batch)
            raise ValueError(
                f"out of memory with {counted(len(members_of(batch)), 'row')} of {counted(longest, 'token')}: {advice}"
            )
        self._budget = padded_tokens(batch, None) // 2

    def _one_pass(self, batch: Sequence[PrefixGroup]) -> Iterator[Answer]:
        """Rows on their own, whole."""
        members = members_of(batch)
        tokens = padded(member.tokens for member in members).to(self.model.device)
        with torch.inference_mode():
            outputs = self.streaming.body(input_ids=tokens, use_cache=False)
        hidden = outputs.logits if self.streaming.head is None else outputs[0]
        yield from self._look_up(places(members, hidden, 0))

    def _stream(self, batch: Sequence[PrefixGroup]) -> Iterator[Answer]:
        """Rows on their own, chunk by chunk in constant memory."""
        members = members_of(batch)
        state = self.streaming.start(len(members))
        for start in range(0, max(len(member.tokens) for member in members), CHUNK):
            tokens = padded(member.tokens[start : start + CHUNK] for member in members)
            yield from self._look_up(places(members, self.streaming.extend(tokens, state), start))

    def _shared(self, batch: Sequence[PrefixGroup]) -> Iterator[Answer]:
        """Beginnings once, then the rest of every member after its own."""
        model: Any = self.model
        # padded on the left, so that all end together
        shared = [torch.tensor(group.members[0].tokens[: group.num_shared]) for group in batch]
        tokens = pad_sequence(shared, batch_first=True, padding_side="left").to(model.device)
        lengths = torch.tensor([group.num_shared for group in batch], device=model.device)
        ahead = torch.arange(tokens.shape[1], device=model.device) < tokens.shape[1] - lengths[:, None]
        documents = -ahead.long()
        with torch.inference_mode():
            carry = model.init_carry("detached")
            for part, ids in zip(tokens.split(CHUNK, dim=1), documents.split(CHUNK, dim=1), strict=True):
                _, carry = model.forward_chunk(part, carry, ids)
            counts = torch.tensor([len(group.members) for group in batch], device=model.device)
            rest = [member.tokens[group.num_shared :] for group in batch for member in group.members]
            later = padded(rest).to(model.device)
            hidden, _ = model.forward_chunk(later, carry.repeated(counts), torch.zeros_like(later))
        starts = [group.num_shared for group in batch for _ in group.members]
        yield from self._look_up(places(members_of(batch), hidden, starts))

    @torch.inference_mode()
    def _look_up(self, found: Sequence[Places]) -> Iterator[Answer]:
        """Summed log-probability, and whether all are the likeliest, of each stretch; logits some places at a time."""
        if not found:
            return
        hidden = torch.cat([place.hidden for place in found])
        targets = torch.tensor(list(itertools.chain.from_iterable(place.targets for place in found)))
        values, greedy = [], []
        size = default_chunk(self.streaming.vocab_size)
        for part, target in zip(hidden.split(size), targets.to(hidden.device).split(size), strict=True):
            logits = self.streaming.logits(part)
            of_target = logits.gather(-1, target.unsqueeze(-1)).squeeze(-1)
            values.append((of_target - logits.logsumexp(-1)).double())
            greedy.append(logits.argmax(-1) == target)
        lengths = [len(place.targets) for place in found]
        by_place = zip(torch.cat(values).cpu().split(lengths), torch.cat(greedy).cpu().split(lengths), strict=True)
        for place, (value, hit) in zip(found, by_place, strict=True):
            yield place.index, math.fsum(value.tolist()), bool(hit.all())


def places(members: Sequence[ModelInput], hidden: Tensor, start: int | Sequence[int]) -> list[Places]:
    """Where in hidden states `[B, T, M]`, of tokens from `start` on, something is looked up."""
    found = []
    starts = [start] * len(members) if isinstance(start, int) else start
    for row, (member, begin) in enumerate(zip(members, starts, strict=True)):
        end = min(begin + hidden.shape[1], len(member.tokens))
        for index, targets in member.wanted:
            first = len(member.tokens) - len(targets)
            low = max(begin, first)
            if low < end:
                found.append(Places(index, hidden[row, low - begin : end - begin], targets[low - first : end - first]))
    return found


def members_of(groups: Sequence[PrefixGroup]) -> list[ModelInput]:
    """The inputs of all groups, in order."""
    return [member for group in groups for member in group.members]


def alone(groups: Sequence[PrefixGroup]) -> list[PrefixGroup]:
    """Every member by itself."""
    return [PrefixGroup(0, [member]) for member in members_of(groups)]


def padded_tokens(batch: Sequence[PrefixGroup], at_once: int | None) -> int:
    """Tokens of a batch with its padding."""
    longest = max(group.longest for group in batch)
    most_shared = max(group.num_shared for group in batch)
    return len(batch) * most_shared + len(members_of(batch)) * min(longest, at_once or longest)
