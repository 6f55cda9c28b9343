"""Choosing the next token of each stream of a batch, so that no stream's choice depends on its mates.

A draw is a function of (seed, sample number, step): nothing of a generator is kept, and a replay draws the same.

Legend: B streams, V vocabulary.
"""

import hashlib
import math
import secrets
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from swat_lm.serve.sampling import Sampling

__all__ = [
    "Choice",
    "NoTokenError",
    "SamplingError",
    "StreamSampler",
    "TokenConstraint",
    "choose",
    "token_logprobs",
    "uniform",
]


class SamplingError(ValueError):
    """One stream has no next token, and others go on: its logits are not numbers, its constraint allows none or failed,
    or its bias is of tokens that the model has not.
    """

    @classmethod
    def of(cls, error: Exception) -> "SamplingError":
        """Whatever went wrong in one stream, as this; the error itself is the cause."""
        if isinstance(error, SamplingError):
            return error
        made = cls(f"{type(error).__name__}: {error}")
        made.__cause__ = error
        return made


class NoTokenError(SamplingError):
    """The request's own constraint is why: it allows no token, or cannot go on."""


@dataclass(frozen=True)
class Choice:
    """A token, and on request log-probabilities under the model's own distribution.

    That is the one before bias, penalties, temperature and constraints, over the whole vocabulary.
    """

    token: int
    logprob: float | None = None
    """Natural logarithm; None where the request asked for none."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens, most likely first, with theirs. The chosen one need not be among them."""


class TokenConstraint(Protocol):
    """What the sampler needs of a constraint; constraints.py has one."""

    def allowed(self, size: int) -> Tensor:
        """Which of `size` tokens may come next: bool `[V]` on the CPU."""
        ...

    def accept(self, token: int) -> None:
        """Take a chosen token in."""
        ...

    @property
    def finished(self) -> bool:
        """Whether nothing but an end token may come."""
        ...

    def copy(self) -> Self:
        """The same place, for another reply."""
        ...


def uniform(seed: int, sample: int, step: int) -> float:
    """A number in [0, 1) as a function of three integers, the same on every machine: 52 bits of a BLAKE2b hash.

    52, so that its product with a float64 is always below it.
    """
    numbers = struct.pack("<qQQ", seed, sample, step)
    return (int.from_bytes(hashlib.blake2b(numbers, digest_size=8).digest(), "little") >> 12) * 2.0**-52


class TopP(LogitsProcessor):
    """Keeps the fewest most likely tokens whose probabilities reach a sum.

    The library's TopPLogitsWarper sorts the whole vocabulary, which takes longer than all the rest of a choice. The
    rule is the same, but of equally likely tokens at the edge others may stay: here the first tokens that topk gives.
    """

    MANY = 256

    def __init__(self, top_p: float) -> None:
        self._top_p = top_p

    def __call__(self, input_ids: Any, scores: Tensor) -> Tensor:
        """Scores `[1, V]` with those of dropped tokens at minus infinity; `input_ids` is not looked at."""
        probabilities, size = scores.softmax(dim=-1), scores.shape[1]
        ordered, places, reached = self._likeliest(probabilities, min(self.MANY, size))
        if float(reached[0, -1]) < self._top_p:
            # all tokens below this share together stay below what need not be reached
            count = int((probabilities >= (1 - self._top_p) / size).sum())
            ordered, places, reached = self._likeliest(probabilities, max(1, count))
        # a token stays while those before it have not reached the sum, so the first always does
        kept = places[:, : int(((reached - ordered) < self._top_p).sum())]
        return torch.full_like(scores, -torch.inf).scatter(-1, kept, scores.gather(-1, kept))

    @staticmethod
    def _likeliest(probabilities: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The first probabilities in order, their tokens and their sums so far, each `[1, count]`."""
        ordered, places = probabilities.topk(count, dim=-1)
        return ordered, places, ordered.cumsum(dim=-1, dtype=torch.float64)


class StreamSampler:
    """Chooses the tokens of one stream; `choose` does it for a batch.

    Keeps counts of the reply's distinct tokens where a penalty asks for them, and a step: constant memory. Raises
    ValueError where options contradict each other.
    """

    def __init__(
        self,
        sampling: Sampling,
        sample: int = 0,
        constraint: TokenConstraint | None = None,
    ) -> None:
        """`sample` is the number among a request's `n` replies."""
        if constraint is not None and sampling.ignore_end:
            raise ValueError("ignore_end: expected false with a schema or an expression, which end the text; got true")
        self.sampling, self.sample, self.constraint = sampling, sample, constraint
        self.seed = sampling.seed if sampling.seed is not None else secrets.randbits(63)
        self.step = 0
        self._counts: dict[int, int] = {}
        self._seen: set[int] = set()
        self._warpers = _warpers(sampling)
        self._repetition = None
        if sampling.repetition_penalty != 1:
            self._repetition = RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty))
        self.plain = sampling.greedy and not sampling.remembers and not sampling.logit_bias and constraint is None
        """Whether the choice is nothing but the likeliest token."""

    def read(self, tokens: Iterable[int]) -> None:
        """Note tokens of the prompt for the repetition penalty; keeps the distinct ones, and nothing without it."""
        if self._repetition is not None:
            self._seen.update(tokens)

    def accept(self, token: int) -> None:
        """Go one step on with a token: what `choose` does, and who replays a reply does without choosing.

        Raises NoTokenError if a constraint does not allow it.
        """
        if self.constraint is not None:
            try:
                self.constraint.accept(token)
            except SamplingError as error:
                raise NoTokenError(str(error)) from error
        if self.sampling.remembers:
            self._counts[token] = self._counts.get(token, 0) + 1
        self.step += 1

    def state(self) -> dict[str, Any]:
        """Everything but options and constraint as integers and lists of them, for JSON. See `restored`."""
        return {
            "seed": self.seed,
            "sample": self.sample,
            "step": self.step,
            "counts": [list(pair) for pair in self._counts.items()],
            "seen": sorted(self._seen),
        }

    @classmethod
    def restored(cls, sampling: Sampling, state: dict[str, Any], constraint: TokenConstraint | None = None) -> Self:
        """A sampler that goes on bit for bit. The constraint must have accepted the reply's tokens already."""
        sampler = cls(sampling, state["sample"], constraint)
        sampler.seed, sampler.step = state["seed"], state["step"]
        sampler._counts = dict(state["counts"])
        sampler._seen = set(state["seen"])
        return sampler

    @torch.inference_mode()
    def next_token(self, logits: Tensor) -> int:
        """Choose from one row of logits `[V]` and accept; always by itself, so its shapes never depend on others.

        Raises SamplingError.
        """
        token = self._pick(self._adjusted(logits))
        self.accept(token)
        return token

    def _adjusted(self, logits: Tensor) -> Tensor:
        """Float32 logits `[1, V]` after constraint, bias and penalties."""
        # a copy: what follows changes it in place
        row = logits[: self.sampling.vocab_size].to(torch.float32, copy=True)
        if self.constraint is not None:
            try:
                allowed = self.constraint.allowed(len(row))
            except SamplingError as error:
                raise NoTokenError(str(error)) from error
            row.masked_fill_(~allowed.to(row.device), -torch.inf)
        if self.sampling.logit_bias:
            try:
                self.sampling.check_token_ids(len(row))
            except ValueError as error:
                raise SamplingError(str(error)) from None
            row.index_add_(0, *_pairs(self.sampling.logit_bias, row))
        if self._repetition is not None:
            ids = torch.tensor([sorted(self._seen.union(self._counts))], dtype=torch.int64, device=row.device)
            row = self._repetition(ids, row[None])[0] if ids.shape[1] else row  # type: ignore
        presence, frequency = self.sampling.presence_penalty, self.sampling.frequency_penalty
        if self._counts and (presence or frequency):
            ids, counts = _pairs(self._counts, row)
            row.index_add_(0, ids, -(counts * frequency + presence))
        return row[None]

    def _pick(self, scores: Tensor) -> int:
        """A token from scores `[1, V]`."""
        self._check(float(scores.max()))
        if self.sampling.greedy:
            return int(scores.argmax(dim=-1))
        for warper in self._warpers:
            scores = warper(None, scores)  # type: ignore[arg-type]
        sums = scores.softmax(dim=-1)[0].cumsum(dim=-1, dtype=torch.float64)
        whole = float(sums[-1])
        # a temperature near 0 can take great logits beyond float32
        self._check(whole)
        drawn = torch.tensor([uniform(self.seed, self.sample, self.step) * whole], dtype=torch.float64)
        # the first token whose sum is above what was drawn, so never one of probability 0
        return int(torch.searchsorted(sums, drawn.to(sums.device), right=True))

    def _check(self, value: float) -> None:
        """Raise SamplingError if the greatest logit (NaN counts as such) or the sum of odds is not finite."""
        if math.isfinite(value):
            return
        if self.constraint is not None and value == -math.inf:
            raise NoTokenError("no token may come next: the constraint and the logits leave none")
        raise SamplingError(
            "the model's logits are not finite numbers; load the weights in a wider dtype or check the checkpoint"
        )


@torch.inference_mode()
def choose(samplers: Sequence[StreamSampler], logits: Tensor) -> list[Choice | SamplingError]:
    """The next token of each stream from logits `[B, V]`, accepted by its sampler.

    Rows that take the likeliest token as it is go together, others each by itself: either way a row's choice is bit for
    bit that of the row alone. A row that has no next token, or whose constraint raises anything, gets a SamplingError
    in its place, and the others go on.
    """
    if logits.dim() != 2 or logits.shape[0] != len(samplers):
        raise ValueError(f"logits: expected [{len(samplers)}, V], a row per sampler, got {list(logits.shape)}")
    found: list[int | SamplingError] = [0] * len(samplers)
    plain: dict[int | None, list[int]] = {}
    for row, sampler in enumerate(samplers):
        if sampler.plain:
            plain.setdefault(sampler.sampling.vocab_size, []).append(row)
        else:
            try:
                found[row] = sampler.next_token(logits[row])
            except Exception as error:
                # a constraint may be anybody's
                found[row] = SamplingError.of(error)
    for size, rows in plain.items():
        for row, best, value in zip(rows, *_likeliest(logits, rows, size), strict=True):
            try:
                samplers[row]._check(value)
                samplers[row].accept(best)
                found[row] = best
            except SamplingError as error:
                found[row] = error
    return _with_logprobs(samplers, logits, found)


@torch.inference_mode()
def token_logprobs(logits: Tensor, tokens: Sequence[int], top: int, vocab_size: int | None = None) -> list[Choice]:
    """Log-probabilities of one token per row of logits `[B, V]`, with the `top` likeliest ones below `vocab_size`.

    Also of a prompt's own tokens: row by row what the model said before each.
    """
    spread = logits.float().log_softmax(dim=-1)
    ids = torch.tensor(list(tokens), dtype=torch.int64, device=spread.device)
    own = spread.gather(1, ids[:, None])[:, 0].tolist()
    best = spread[:, :vocab_size].topk(min(top, spread[:, :vocab_size].shape[1]), dim=-1)
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    alternatives = [tuple(zip(*row, strict=True)) for row in rows]
    return [Choice(*row) for row in zip(ids.tolist(), own, alternatives, strict=True)]


def _likeliest(logits: Tensor, rows: list[int], size: int | None) -> tuple[list[int], list[float]]:
    """The likeliest tokens of some rows of logits `[B, V]`, and their logits."""
    part = logits if len(rows) == logits.shape[0] else logits[rows]
    best = part[:, :size].argmax(dim=-1)
    return best.tolist(), part.gather(1, best[:, None])[:, 0].tolist()


def _with_logprobs(
    samplers: Sequence[StreamSampler], logits: Tensor, found: list[int | SamplingError]
) -> list[Choice | SamplingError]:
    """Choices with log-probabilities where they were asked for; rows that ask alike go together."""
    choices: list[Choice | SamplingError] = [one if isinstance(one, SamplingError) else Choice(one) for one in found]
    asked: dict[tuple[int, int | None], dict[int, int]] = {}
    for row, (sampler, token) in enumerate(zip(samplers, found, strict=True)):
        wanted = sampler.sampling.logprobs
        if wanted is not None and not isinstance(token, SamplingError):
            asked.setdefault((wanted, sampler.sampling.vocab_size), {})[row] = token
    for (top, size), tokens in asked.items():
        rows = list(tokens)
        for row, choice in zip(rows, token_logprobs(logits[rows], list(tokens.values()), top, size), strict=True):
            choices[row] = choice
    return choices


def _warpers(sampling: Sampling) -> list[LogitsProcessor]:
    """What narrows the choice, in the library's order."""
    if sampling.greedy:
        return []
    warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(float(sampling.temperature))]
    if sampling.top_k is not None:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopP(sampling.top_p))
    if sampling.min_p > 0:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return warpers


def _pairs(values: Any, row: Tensor) -> tuple[Tensor, Tensor]:
    """A mapping from token ids to numbers as two tensors `[count]` beside a row."""
    ids = torch.tensor(list(values), dtype=torch.int64, device=row.device)
    return ids, torch.tensor(list(values.values()), dtype=torch.float32, device=row.device)
