"""Loss against evaluation length: long token streams read in constant memory, each token's loss counted once.

Table 2 of SWAT (arXiv 2502.18845). What is measured is defined in curves.py.
Legend: B streams read side by side, T tokens of a chunk, M model width, V vocabulary.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from swat_lm.evaluate.curves import LengthCurve, summarise
from swat_lm.evaluate.limits import check_length
from swat_lm.evaluate.partial import PartialResults
from swat_lm.evaluate.streaming_model import StreamingModel, evaluating, padded, streaming_model
from swat_lm.evaluate.windows import kept_first_tokens, model_window, with_window
from swat_lm.words import counted

__all__ = [
    "loss_by_length",
    "loss_on_same_text",
    "position_losses",
    "segments",
    "windowed_streaming_model",
    "with_window",
]


def loss_by_length(
    model: PreTrainedModel,
    documents: Sequence[np.ndarray | Tensor | Sequence[int]],
    lengths: Iterable[int],
    *,
    chunk: int = 512,
    batch_size: int = 8,
    window: int | None = None,
    num_sinks: int = 0,
    partial: PartialResults | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> LengthCurve:
    """Read every document up to the greatest length and average its losses up to each length; see LengthPoint.

    Memory does not depend on the lengths (beyond the state of full-attention layers, which grows), nor does the result
    depend on `chunk` or `batch_size` beyond rounding.

    Args:
        model: any causal language model; evaluated in `eval` mode, without gradients, on its own device.
        documents: token ids of each document. `segments` cuts a stream of short documents into long ones.
        lengths: evaluation lengths in tokens, each at least 2.
        chunk: tokens of each stream per forward pass.
        batch_size: streams read side by side.
        window: evaluate with this window in every layer instead of the model's own; see `with_window`.
        num_sinks: first tokens of each stream kept beside the windows; 0: the model's own.
        partial: keeps each batch's sums, and what it holds already is not measured again.
        on_progress: called with tokens done and tokens in all.

    Raises:
        ValueError: no document reaches a length, an argument is out of range, or a length that the model cannot hold.
    """
    sizes = check_arguments(lengths, documents, chunk, batch_size)
    streaming = windowed_streaming_model(model, window, num_sinks)
    check_length(streaming, sizes[-1], min(batch_size, len(documents)))
    # of like length side by side, so that few rows are padded
    order = sorted(
        (i for i in range(len(documents)) if len(documents[i]) >= sizes[0]), key=lambda i: -len(documents[i])
    )
    taken = {index: min(len(documents[index]), sizes[-1]) for index in order}
    bounds = sorted({1, *sizes, *(max(1, size // 2) for size in sizes)})
    known = partial.known if partial else {}
    sums: dict[int, list[float]] = {index: known.get(str(index), [0.0] * (len(bounds) - 1)) for index in order}
    state_bytes = {int(size): kept for size, kept in known.get("state bytes", {}).items()}
    left = [index for index in order if str(index) not in known]
    total = sum(count - 1 for count in taken.values())
    done = total - sum(taken[index] - 1 for index in left)
    for begin in range(0, len(left), batch_size):
        rows = left[begin : begin + batch_size]
        tokens = padded(documents[index][: taken[index]] for index in rows)
        for piece in position_losses(streaming, tokens, chunk, cuts=sizes):
            for row, index in enumerate(rows):
                # beyond the document's own end a row is padding
                losses = piece.losses[row, : max(0, taken[index] - piece.start)]
                add_to_buckets(sums[index], bounds, piece.start, losses)
                done += len(losses)
            state_bytes.setdefault(piece.tokens_read, piece.state_bytes)
            if on_progress:
                on_progress(done, total)
        if partial is not None:
            reached = {str(size): state_bytes[size] for size in sizes if size in state_bytes}
            partial.add({**{str(index): sums[index] for index in rows}, "state bytes": reached})

    def mean(index: int, low: int, high: int) -> float | None:
        if len(documents[index]) < high:
            return None
        return math.fsum(sums[index][bounds.index(low) : bounds.index(high)]) / (high - low)

    return summarise(
        sizes,
        [[mean(index, 1, size) for size in sizes] for index in range(len(documents))],
        [[mean(index, max(1, size // 2), size) for size in sizes] for index in range(len(documents))],
        [state_bytes[size] for size in sizes],
        total,
        model_window(streaming.model),
        same_text=False,
        num_sinks=kept_first_tokens(streaming.model.config),
    )


def loss_on_same_text(
    model: PreTrainedModel,
    documents: Sequence[np.ndarray | Tensor | Sequence[int]],
    lengths: Iterable[int],
    *,
    chunk: int = 512,
    batch_size: int = 8,
    window: int | None = None,
    num_sinks: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> LengthCurve:
    """The same text at every length: for each N the documents are cut into pieces of N, each read from a fresh start.

    This is the paper's measurement. It costs one pass over the text per length, and its differences between lengths are
    far more exact than those of `loss_by_length`, since no length has easier text. Arguments as there, but every length
    must divide the greatest, of which each document's whole multiples are used; `batch_size` streams of `chunk` tokens
    set the size of a forward pass also where pieces are shorter. `num_sinks` first tokens of each piece are kept beside
    the windows; 0: the model's own.

    Raises:
        ValueError: a length that does not divide the greatest, no document that reaches it, an argument out of range.
    """
    sizes = check_arguments(lengths, documents, chunk, batch_size)
    for size in sizes:
        if sizes[-1] % size:
            raise ValueError(
                f"lengths: expected divisors of the greatest, {sizes[-1]}, so that all see the same text; got {size}"
            )
    streaming = windowed_streaming_model(model, window, num_sinks)
    check_length(streaming, sizes[-1], batch_size)
    chosen = [index for index in range(len(documents)) if len(documents[index]) >= sizes[-1]]
    used = {index: len(documents[index]) // sizes[-1] * sizes[-1] for index in chosen}
    done, total = 0, sum(used.values()) * len(sizes)
    means, tails, state_bytes = [], [], []
    for size in sizes:
        pieces = [(index, start) for index in chosen for start in range(0, used[index], size)]
        sums = np.zeros((len(documents), 2))
        kept = 0
        together = batch_size * max(1, chunk // size)
        for begin in range(0, len(pieces), together):
            part = pieces[begin : begin + together]
            tokens = padded(documents[index][start : start + size] for index, start in part)
            heads_and_tails, kept = piece_sums(streaming, tokens, chunk)
            for (index, _), both in zip(part, heads_and_tails, strict=True):
                sums[index] += both
            done += tokens.numel()
            if on_progress:
                on_progress(done, total)
        state_bytes.append(kept)
        for found, column, count in ((means, 0, size - 1), (tails, 1, size - max(1, size // 2))):
            found.append([
                float(sums[index, column]) / (used[index] // size * count) if index in used else None
                for index in range(len(documents))
            ])  # fmt: skip
    predicted = sum(count // size * (size - 1) for count in used.values() for size in sizes)
    return summarise(
        sizes,
        list(zip(*means, strict=True)),
        list(zip(*tails, strict=True)),
        state_bytes,
        predicted,
        model_window(streaming.model),
        same_text=True,
        num_sinks=kept_first_tokens(streaming.model.config),
    )


def windowed_streaming_model(model: PreTrainedModel, window: int | None, num_sinks: int) -> StreamingModel:
    """The model read in chunks behind another window than its own, with first tokens kept beside it, or as it is."""
    if num_sinks < 0:
        raise ValueError(f"num_sinks: expected a number of first tokens to keep, or 0, got {num_sinks}")
    if window is None and not num_sinks:
        return streaming_model(model)
    return streaming_model(with_window(model, "keep" if window is None else window, num_sinks or None))


class Piece(NamedTuple):
    """What one forward pass of `position_losses` found."""

    start: int
    """Index in the stream of the first token that has a loss here."""
    losses: Tensor
    """float32 `[B, t]` on the CPU; `[:, i]` belongs to the token at index `start + i`."""
    tokens_read: int
    state_bytes: int
    """What one stream keeps of its past after `tokens_read` tokens."""


def position_losses(
    streaming: StreamingModel, tokens: Tensor, chunk: int = 512, cuts: Iterable[int] = ()
) -> Iterator[Piece]:
    """Stream `tokens` int64 `[B, T]` through any causal model; yields the loss of every token but the first, in order.

    Each chunk's hidden states predict the token after each of its own; chunks also end at the token numbers `cuts`.
    """
    length = tokens.shape[1]
    tokens = tokens.to(streaming.model.device)
    edges = sorted({*range(0, length, chunk), *(cut for cut in cuts if cut < length), length})
    with evaluating(streaming.model):
        state = streaming.start(len(tokens))
        for start, end in itertools.pairwise(edges):
            hidden = streaming.extend(tokens[:, start:end], state)
            losses = streaming.losses(hidden, tokens[:, start + 1 : end + 1])
            yield Piece(start + 1, losses.cpu(), end, streaming.state_bytes(state))


def segments(documents: Iterable[np.ndarray], length: int, most: int | None = None) -> list[np.ndarray]:
    """The documents one after the other, cut into pieces of exactly `length` tokens; a shorter rest is left out.

    Pieces begin anywhere in a text, so what a piece holds at its start and at its end is alike but for its context.
    `most` takes that many pieces, spread evenly over the whole. Raises ValueError if there is less than one piece.
    """
    stream = np.concatenate([np.asarray(document) for document in documents] or [np.zeros(0, np.int64)])
    count = len(stream) // length
    if count == 0:
        raise ValueError(
            f"the documents hold {counted(len(stream), 'token')} together, less than one piece of {length}: "
            "evaluate at shorter lengths or on more text"
        )
    chosen = range(count) if most is None or most >= count else [i * count // most for i in range(most)]
    return [stream[i * length : (i + 1) * length] for i in chosen]


def check_arguments(lengths: Iterable[int], documents: Sequence[Any], chunk: int, batch_size: int) -> list[int]:
    """The lengths, rising and distinct; raises ValueError for what cannot be measured."""
    sizes = sorted(set(lengths))
    if not sizes or sizes[0] < 2:
        raise ValueError(f"lengths: expected whole numbers of tokens, each at least 2; got {sizes or 'none'}")
    for name, value in (("chunk", chunk), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    longest = max((len(document) for document in documents), default=0)
    if longest < sizes[-1]:
        raise ValueError(
            f"lengths: no document has {counted(sizes[-1], 'token')}; the longest of {len(documents):,} has "
            f"{longest:,}. Evaluate at shorter lengths, or join short documents into long pieces"
        )
    return sizes


def add_to_buckets(sums: list[float], bounds: Sequence[int], start: int, losses: Tensor) -> None:
    """Add the losses of the tokens at index `start ..` to the buckets `bounds[b] <= index < bounds[b + 1]`."""
    for bucket, (low, high) in enumerate(itertools.pairwise(bounds)):
        part = losses[max(0, low - start) : max(0, high - start)]
        sums[bucket] += part.double().sum().item()


def piece_sums(streaming: StreamingModel, tokens: Tensor, chunk: int) -> tuple[np.ndarray, int]:
    """Of each row of `tokens` `[B, N]` the summed loss of tokens 2 .. N and N/2+1 .. N, float64; bytes kept at last."""
    middle, kept = max(1, tokens.shape[1] // 2), 0
    sums = torch.zeros(len(tokens), 2, dtype=torch.float64)
    for piece in position_losses(streaming, tokens, chunk):
        losses = piece.losses.double()
        sums[:, 0] += losses.sum(dim=1)
        sums[:, 1] += losses[:, max(0, middle - piece.start) :].sum(dim=1)
        kept = piece.state_bytes
    return sums.numpy(), kept
