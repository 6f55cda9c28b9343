"""Tasks drawn from numbers instead of text: rows whose answers stand at a known distance before their question.

A source of the trainer, `data.sources: ["synthetic:mqar?pairs=8"]`, where only answers are targets, and the rows by
which `swat-lm evaluate recall` measures what was learnt. A row is a pure function of (seed, split, number).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple
from urllib.parse import parse_qsl

import numpy as np
import torch

from swat_lm.data.batches import IGNORED, Batch, RowSource, noise_seeds
from swat_lm.data.list_operations import NUM_IDS, draw_expression
from swat_lm.data.sources import DataError
from swat_lm.words import counted, did_you_mean

__all__ = ["PREFIX", "Answer", "SyntheticRow", "SyntheticSource", "SyntheticTask", "is_synthetic", "synthetic_task"]

PREFIX = "synthetic:"
# ids: fillers, the mark, keys, values
FILLERS = 8
MARK = FILLERS
FIRST_KEY = FILLERS + 1
SPLITS = ("train", "held_out", "probe")
# rows of one pass over a split without end
ROWS = 1 << 16


class Answer(NamedTuple):
    """Tokens that can only be known from an earlier place."""

    start: int
    """Index of the first token of the answer; the token before it predicts it."""
    end: int
    distance: int
    """From the place that predicts to the token it must recall: a window of W reaches distance W - 1 in one layer."""


class SyntheticRow(NamedTuple):
    """One row of a task."""

    tokens: np.ndarray
    """int64 [T]."""
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class SyntheticTask:
    """One kind of rows.

    - `kv`: pairs of key and value throughout, and at the end one key again, whose newest value is wanted (Lost in the
      Middle, arXiv 2307.03172).
    - `mqar`: some pairs, filler, and every key again in another order, anywhere after them (arXiv 2312.04927).
    - `passkey`: a mark and a code somewhere in filler, and the mark again at the end (arXiv 2305.16300).
    - `copy`: random values and, after a lag of up to half a row, the same again; with `distance` always so far.
    - `flag`: a mark and a value at the very beginning, filler, and the mark again at the very end.
    - `selective`: values of which some stand behind a mark each, all of those within the first quarter, and at the end
      the marks again in their order. The first mark is always the same, and so on: what is worth keeping can be told
      when it is read, by the mark before it alone.
    - `listops`: nested operations on digits, each followed by a mark and its result, as many as fit
      (`swat_lm.data.list_operations`). Their distance is their length.
    """

    name: str
    pairs: int = 8
    """Pairs of `mqar`, marked values of `selective`."""
    keys: int = 64
    """Different keys; of `selective` the marks are the keys, as many as `pairs`."""
    values: int = 64
    """Different values; chance is one in so many for each token of an answer."""
    digits: int = 4
    """Values in the code of `passkey`."""
    depth: int = 3
    """Operations within each other of `listops`, at most."""
    arguments: int = 4
    """Arguments of an operation of `listops`, at most; at least 2."""
    distance: int = 0
    """Of every answer of `copy`; 0: each row draws its own."""

    @property
    def num_ids(self) -> int:
        """Token ids that the task uses, from 0."""
        if self.name == "listops":
            return FIRST_KEY + NUM_IDS
        return self.first_value + self.values

    @property
    def first_value(self) -> int:
        """The id after the last key."""
        return FIRST_KEY + (self.pairs if self.name == "selective" else self.keys)

    def __str__(self) -> str:
        held = {setting: getattr(self, setting) for setting in SETTINGS[self.name]}
        settings = "&".join(f"{setting}={number}" for setting, number in held.items() if number)
        return f"{PREFIX}{self.name}?{settings}"

    def row(self, random: np.random.Generator, length: int) -> SyntheticRow:
        """A row of exactly `length` tokens whose distances are drawn; raises DataError if it is too short."""
        self.check_length(length)
        if self.name == "mqar":
            return self.scattered(random, length)
        if self.name == "selective":
            return self.marked(random, length)
        if self.name == "listops":
            return self.operations(random, length)
        if self.name == "flag":
            return self.row_at(random, length - 3)
        longest = {"kv": length - 3, "passkey": length - self.digits - 2, "copy": length // 2 - 1}[self.name]
        shortest = {"kv": 1, "passkey": self.digits, "copy": min(2, longest)}[self.name]
        distance = self.distance or int(random.integers(shortest, longest + 1))
        if self.name == "kv":
            distance -= 1 - distance % 2
        row = self.row_at(random, distance)
        before = length - len(row.tokens)
        answers = tuple(Answer(start + before, end + before, distance) for start, end, distance in row.answers)
        return SyntheticRow(np.concatenate([self.filling(random, before), row.tokens]), answers)

    def row_at(self, random: np.random.Generator, distance: int) -> SyntheticRow:
        """The shortest row whose answers have exactly this distance; raises DataError if the task cannot have it."""
        if self.name == "listops":
            raise DataError(f"{self}: results depend on all of their operations, so they have no distance to ask for")
        together = 2 * self.pairs - 1
        low = {"mqar": together, "selective": together, "passkey": self.digits}.get(self.name, 1)
        if distance < low or (self.name == "kv" and distance % 2 == 0):
            which = "an odd number" if self.name == "kv" else "a number"
            raise DataError(f"{self}: expected {which} of at least {low} as distance, got {distance}")
        if self.name == "kv":
            return self.kv(random, distance)
        if self.name in ("mqar", "selective"):
            return self.gathered(random, distance)
        # the mark stands before both, so a copy lags by one more than the segment is long
        size = {"passkey": self.digits, "flag": 1}.get(self.name, distance)
        recalled, gap = self.draw_values(random, size), self.fillers(random, distance - size)
        tokens = np.concatenate([[MARK], recalled, gap, [MARK], recalled])
        return SyntheticRow(tokens, (Answer(len(tokens) - size, len(tokens), distance),))

    def kv(self, random: np.random.Generator, distance: int) -> SyntheticRow:
        """The wanted pair, pairs with other keys, and the wanted key."""
        others = (distance - 1) // 2
        wanted, *rest = random.choice(self.keys, 1 + min(others, self.keys - 1), replace=False)
        drawn = random.choice(rest, others, replace=others > len(rest)) if others else np.zeros(0, np.int64)
        pairs = self.with_values(random, np.concatenate([[wanted], drawn]))
        tokens = np.concatenate([pairs, pairs[:2]])
        return SyntheticRow(tokens, (Answer(len(tokens) - 1, len(tokens), distance),))

    def gathered(self, random: np.random.Generator, distance: int) -> SyntheticRow:
        """The pairs, filler, and the pairs again, so that all have the same distance."""
        pairs = self.draw_pairs(random)
        tokens = np.concatenate([pairs, self.filling(random, distance + 1 - len(pairs)), pairs])
        first = distance + 2
        return SyntheticRow(
            tokens, tuple(Answer(first + 2 * i, first + 2 * i + 1, distance) for i in range(self.pairs))
        )

    def scattered(self, random: np.random.Generator, length: int) -> SyntheticRow:
        """The pairs, and among filler each of them again, in another order and anywhere."""
        pairs = self.draw_pairs(random)
        tokens = np.concatenate([pairs, self.fillers(random, length - len(pairs))])
        free = (length - len(pairs)) // 2
        places = np.sort(random.choice(free, self.pairs, replace=False)) * 2 + len(pairs)
        answers = []
        for place, which in zip(places.tolist(), random.permutation(self.pairs).tolist(), strict=True):
            tokens[place : place + 2] = pairs[2 * which : 2 * which + 2]
            answers.append(Answer(place + 1, place + 2, place - (2 * which + 1)))
        return SyntheticRow(tokens, tuple(answers))

    def marked(self, random: np.random.Generator, length: int) -> SyntheticRow:
        """Marked values anywhere in the first quarter, unmarked ones, and the marked ones again at the end."""
        pairs = self.draw_pairs(random)
        tokens = np.concatenate([self.filling(random, length - len(pairs)), pairs])
        places = np.sort(random.choice(length // 8, self.pairs, replace=False)) * 2
        answers = []
        for which, place in enumerate(places.tolist()):
            asked = length - len(pairs) + 2 * which
            tokens[place : place + 2] = pairs[2 * which : 2 * which + 2]
            answers.append(Answer(asked + 1, asked + 2, asked - (place + 1)))
        return SyntheticRow(tokens, tuple(answers))

    def operations(self, random: np.random.Generator, length: int) -> SyntheticRow:
        """Operations with their results, and filler before them where no other fits."""
        rows, free, least = [], length, self.arguments + 4
        while free >= least:
            found = draw_expression(random, self.depth, self.arguments, free - 2)
            rows.append(found)
            free -= len(found.tokens) + 2
        parts, answers, end = [self.fillers(random, free)], [], free
        for tokens, value in rows:
            parts.append(np.array([*(FIRST_KEY + token for token in tokens), MARK, FIRST_KEY + value]))
            end += len(parts[-1])
            answers.append(Answer(end - 1, end, len(tokens)))
        return SyntheticRow(np.concatenate(parts), tuple(answers))

    def draw_pairs(self, random: np.random.Generator) -> np.ndarray:
        """Different keys, each followed by a value; the first keys in order where they are marks."""
        if self.name == "selective":
            return self.with_values(random, np.arange(self.pairs))
        return self.with_values(random, random.choice(self.keys, self.pairs, replace=False))

    def with_values(self, random: np.random.Generator, keys: np.ndarray) -> np.ndarray:
        """Keys, counted from 0, as tokens, each followed by a value."""
        return np.stack([FIRST_KEY + keys, self.draw_values(random, len(keys))], axis=1).ravel()

    def draw_values(self, random: np.random.Generator, count: int) -> np.ndarray:
        """So many values."""
        return random.integers(self.first_value, self.num_ids, count)

    def fillers(self, random: np.random.Generator, count: int) -> np.ndarray:
        """Tokens that mean nothing."""
        return random.integers(0, FILLERS, count)

    def filling(self, random: np.random.Generator, count: int) -> np.ndarray:
        """What stands around the part of a row that matters: of no use, where that can be more of the same."""
        if self.name == "selective":
            return self.draw_values(random, count)
        if self.name != "kv":
            return self.fillers(random, count)
        found = self.with_values(random, random.integers(0, self.keys, -(-count // 2)))
        return found[len(found) - count :]

    def check_length(self, length: int) -> None:
        """Raise DataError for rows that are too short for the task."""
        least = {
            "kv": 6, "mqar": 4 * self.pairs, "passkey": 2 * self.digits + 3, "flag": 4,
            "copy": max(6, 2 * self.distance + 2), "selective": 8 * self.pairs, "listops": self.arguments + 4,
        }[self.name]  # fmt: skip
        if length < least:
            raise DataError(f"{self}: needs data.sequence_length of at least {least}, got {length}")


# what each task knows of its dataclass
DEEPEST = 100
"""Operations within each other; Long Range Arena (arXiv 2011.04006) has 10."""
SETTINGS = {
    "kv": ("keys", "values"),
    "mqar": ("pairs", "keys", "values"),
    "passkey": ("digits", "values"),
    "copy": ("values", "distance"),
    "flag": ("values",),
    "selective": ("pairs", "values"),
    "listops": ("depth", "arguments"),
}


def is_synthetic(sources: tuple[str, ...]) -> bool:
    """Whether a recipe's sources are a task; raises DataError if a task stands beside something else."""
    found = [source for source in sources if source.startswith(PREFIX)]
    if found and len(sources) > 1:
        raise DataError(f"{found[0]}: a task is the only source of its run; got {len(sources)} sources")
    return bool(found)


def synthetic_task(name: str) -> SyntheticTask:
    """`synthetic:NAME?setting=number&...`; raises DataError for an unknown task or setting."""
    kind, _, settings = name.removeprefix(PREFIX).partition("?")
    if kind not in SETTINGS:
        raise DataError(f"{name}: no task of that name; known: {', '.join(PREFIX + task for task in SETTINGS)}")
    task = replace(SyntheticTask(kind), **settings_of(name, settings, SETTINGS[kind]))
    if {"pairs", "keys"} <= {*SETTINGS[kind]} and task.pairs > task.keys:
        raise DataError(f"{name}: {task.pairs} pairs need as many keys; got {task.keys}")
    return task


def settings_of(name: str, text: str, known: Sequence[str]) -> Mapping[str, int]:
    """The numbers after the question mark."""
    try:
        pairs = parse_qsl(text, keep_blank_values=True, strict_parsing=bool(text))
    except ValueError:
        raise DataError(f"{name}: write settings as {PREFIX}NAME?pairs=8&keys=64; got {text!r}") from None
    for key, value in pairs:
        if key not in known:
            hint = did_you_mean(key, known, f"; known: {', '.join(known)}")
            raise DataError(f"{name}: no setting {key!r}{hint}")
        least = 2 if key in ("keys", "values", "arguments") else 1
        if not value.isdigit() or int(value) < least:
            raise DataError(f"{name}: {key} must be a whole number of at least {least}; got {value!r}")
        if key == "depth" and int(value) > DEEPEST:
            raise DataError(
                f"{name}: depth must be at most {DEEPEST}, which rows of few tokens never reach; got {value}"
            )
    return {key: int(value) for key, value in pairs}


class SyntheticSource(RowSource):
    """The rows of one split of a task, without end; used like a `BatchSource`."""

    def __init__(
        self, task: SyntheticTask, split: str, sequence_length: int, seed: int, *, batch_size: int, vocab_size: int
    ) -> None:
        """Raises DataError if the rows are too short for the task, or the vocabulary too small."""
        task.check_length(sequence_length)
        if task.num_ids > vocab_size:
            raise DataError(
                f"{task}: needs {counted(task.num_ids, 'token id')}, the tokenizer has {vocab_size:,}: use fewer keys "
                "or values, or "
                "another data.tokenizer"
            )
        super().__init__(ROWS, batch_size)
        self.task, self.sequence_length = task, sequence_length
        self.seed = (seed, SPLITS.index(split))

    def batch(self, step: int, rows: range | None = None) -> Batch:
        """Rows `rows` (all if None) of the global batch of a step."""
        places = step * self.batch_size + self.checked(rows)
        drawn = [self.row(number) for number in places.tolist()]
        ids = torch.from_numpy(np.stack([row.tokens for row in drawn]))
        labels = torch.full_like(ids, IGNORED)
        for place, row in enumerate(drawn):
            for answer in row.answers:
                labels[place, answer.start : answer.end] = ids[place, answer.start : answer.end]
        positions = torch.arange(self.sequence_length).expand_as(ids).contiguous()
        return Batch(ids, labels, positions, None, labels != IGNORED, noise_seeds(places, self.seed[0]))

    def pass_over(self, rows: range | None = None, num_batches: int | None = None) -> Iterator[Batch]:
        """The first `num_batches` batches, always the same."""
        for step in self.steps(num_batches):
            yield self.batch(step, rows)

    def row(self, number: int) -> SyntheticRow:
        """The row of this number."""
        return self.task.row(np.random.default_rng((*self.seed, number)), self.sequence_length)
