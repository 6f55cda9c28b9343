"""Recall against distance: whether a model still knows what stood so many tokens ago; intervals, JSON.

An item holds its tokens and where its answers are; they are read as streams, each answer scored by the tokens that the
model itself would have written (all of them the likeliest). Legend: B items side by side, T tokens, M model width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from swat_lm.data.synthetic import Answer
from swat_lm.evaluate.figures import JsonRecord
from swat_lm.evaluate.limits import check_length
from swat_lm.evaluate.partial import PartialResults
from swat_lm.evaluate.standard_errors import mean_and_error
from swat_lm.evaluate.streaming_model import StreamingModel, evaluating, padded, streaming_model
from swat_lm.evaluate.windows import model_window, theoretical_reach

__all__ = ["RecallCurve", "RecallItem", "RecallPoint", "measure_recall", "wilson"]

Z = 1.959964
"""Of the 95 % interval."""


class RecallItem(NamedTuple):
    """A text with something to recall."""

    tokens: np.ndarray
    """int64 [T]."""
    answers: tuple[Answer, ...]
    group: int
    """Items of a group make one point of the curve."""


@dataclass(frozen=True)
class RecallPoint:
    """Recall at one distance."""

    distance: int
    """Mean distance of the answers in tokens, from the place that predicts to what it must recall."""
    num_items: int
    num_answers: int
    accuracy: float
    """Share of answers all of whose tokens are the likeliest."""
    low: float
    """Of the 95 % interval of Wilson over items (each weighs as its share of right answers)."""
    high: float
    loss: float
    """Nats per token of the answers."""
    loss_error: float | None
    """Standard error over items."""


@dataclass(frozen=True)
class RecallCurve(JsonRecord):
    """Recall of one model in one task."""

    task: str
    points: tuple[RecallPoint, ...]
    window: int | None
    """Widest window of the model; None: a layer sees everything."""
    reach: int | None
    """Tokens, its own included, that a place can depend on: 1 + sum of (window - 1)."""
    chance: float | None = None
    """Share of answers that guessing among all possible ones gets right; None where that is not known."""


class Scored(NamedTuple):
    """What a model made of one item."""

    right: list[bool]
    """Per answer."""
    loss: float
    """Nats per token over all answers."""


def measure_recall(
    model: PreTrainedModel,
    items: Sequence[RecallItem],
    task: str,
    *,
    chunk: int = 512,
    batch_size: int = 8,
    partial: PartialResults | None = None,
    chance: float | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> RecallCurve:
    """Read every item and score its answers; one point for each group, by rising distance.

    `partial` keeps each batch's scores, and what it holds already is not measured again; `chance` is kept with it.

    Raises:
        ValueError: no items, an item without an answer or with tokens that the model does not know, or one too long.
    """
    streaming = streaming_model(model)
    check_items(items, streaming.vocab_size, chunk, batch_size)
    # of like length side by side, the longest first, so that what does not fit fails at once
    order = sorted(range(len(items)), key=lambda index: -len(items[index].tokens))
    check_length(streaming, len(items[order[0]].tokens), min(batch_size, len(items)))
    scored = {int(index): Scored(*kept) for index, kept in (partial.known if partial else {}).items()}
    left = [index for index in order if index not in scored]
    total = sum(len(item.tokens) for item in items)
    with evaluating(model):
        for begin in range(0, len(left), batch_size):
            rows = left[begin : begin + batch_size]
            found = score_batch(streaming, [items[index] for index in rows], chunk)
            scored.update(zip(rows, found, strict=True))
            if partial is not None:
                partial.add({str(index): list(score) for index, score in zip(rows, found, strict=True)})
            if on_progress:
                on_progress(sum(len(items[index].tokens) for index in scored), total)
    groups: dict[int, list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(item.group, []).append(index)
    points = [summary([items[i] for i in members], [scored[i] for i in members]) for members in groups.values()]
    points.sort(key=lambda point: point.distance)
    return RecallCurve(task, tuple(points), model_window(model), theoretical_reach(model), chance)


def check_items(items: Sequence[RecallItem], vocab_size: int, chunk: int, batch_size: int) -> None:
    """Raise ValueError for what cannot be scored."""
    if not items:
        raise ValueError("recall: expected at least one item")
    if chunk < 1 or batch_size < 1:
        raise ValueError(f"recall: expected chunk and batch_size of at least 1, got {chunk} and {batch_size}")
    for index, item in enumerate(items):
        if not item.answers or any(not 0 < a.start < a.end <= len(item.tokens) for a in item.answers):
            raise ValueError(f"item {index}: expected answers within its {len(item.tokens)} tokens, after the first")
        if item.tokens.max() >= vocab_size:
            raise ValueError(
                f"item {index}: token {item.tokens.max()} is not among the {vocab_size} of the model: task and model, "
                "or tokenizer and model, do not belong together"
            )


def score_batch(streaming: StreamingModel, items: Sequence[RecallItem], chunk: int) -> list[Scored]:
    """Read items side by side, padded on the right, and look only at places before answers."""
    tokens = padded(item.tokens for item in items)
    wanted, hits = torch.zeros(2, *tokens.shape, dtype=torch.bool)
    for row, item in enumerate(items):
        for answer in item.answers:
            wanted[row, answer.start : answer.end] = True
    losses = torch.zeros(tokens.shape, dtype=torch.float64)
    state = streaming.start(len(items))
    for start in range(0, tokens.shape[1], chunk):
        hidden = streaming.extend(tokens[:, start : start + chunk], state)
        # each place predicts the token after it
        after = slice(start + 1, start + chunk + 1)
        here = wanted[:, after]
        if not here.any():
            continue
        chosen = hidden[:, : here.shape[1]][here.to(hidden.device)].unsqueeze(0)
        targets = tokens[:, after][here].unsqueeze(0).to(hidden.device)
        losses[:, after][here] = streaming.losses(chosen, targets)[0].double().cpu()
        hits[:, after][here] = streaming.hits(chosen, targets)[0].cpu()
    right = [[bool(hits[row, start:end].all()) for start, end, _ in item.answers] for row, item in enumerate(items)]
    return [Scored(right[row], losses[row][wanted[row]].mean().item()) for row in range(len(items))]


def summary(items: Sequence[RecallItem], scored: Sequence[Scored]) -> RecallPoint:
    """One point of the curve."""
    distances = [answer.distance for item in items for answer in item.answers]
    right = [sum(score.right) / len(score.right) for score in scored]
    accuracy = math.fsum(right) / len(right)
    low, high = wilson(accuracy, len(right))
    return RecallPoint(
        round(sum(distances) / len(distances)), len(items), len(distances), accuracy, low, high,
        *mean_and_error([score.loss for score in scored]),
    )  # fmt: skip


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count` trials (Wilson, 1927), which holds also near 0 and 1."""
    if count < 1 or not 0 <= share <= 1:
        raise ValueError(f"wilson: expected a share of at least one trial, got {share} of {count}")
    square = Z * Z
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = Z * math.sqrt(share * (1 - share) / count + square / (4 * count * count)) / (1 + square / count)
    return max(0.0, middle - half), min(1.0, middle + half)
