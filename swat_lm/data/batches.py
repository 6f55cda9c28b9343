"""Packed batches as a pure function of (seed, step): resume and any number of processes see the same data."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from swat_lm.data.mixing import mix, permute
from swat_lm.data.sources import DataError
from swat_lm.data.store import TokenStore
from swat_lm.words import counted

IGNORED = -100
# rows of a step that may come more than once, for trials on little text; far more are a slip that would fill the memory
MOST_REPEATED = 1024


@dataclass(frozen=True)
class Batch:
    """Rows for a model, in Hugging Face's convention: the model shifts the labels."""

    input_ids: Tensor
    """int64 [B, T]."""
    labels: Tensor
    """int64 [B, T]: the input ids, -100 where a token is no target (each row's first, documents' first, repeats)."""
    position_ids: Tensor
    """int64 [B, T], from 0 at each row's start and, if documents are separate, at each document's start."""
    document_ids: Tensor | None
    """int32 [B, T], non-decreasing from 0 in each row; None if documents are concatenated."""
    loss_mask: Tensor | None = None
    """bool [B, T]: tokens that are marked, which are answers; None where the data marks nothing."""
    noise_seed: Tensor | None = None
    """int64 [B]: in training, what layers draw each row's noise from: a function of (seed, step, row)."""

    @property
    def num_targets(self) -> int:
        """Tokens that are predicted."""
        return int((self.labels != IGNORED).sum())

    def prefix_lengths(self) -> Tensor | None:
        """int32 [B, T]: of each token's document, as far as its row holds it, the tokens before the first marked one.

        That is the part which an objective may let the model read in both directions; all of a document in which
        nothing is marked. None where the data marks nothing.
        """
        if self.loss_mask is None:
            return None
        rows, length = self.input_ids.shape
        places = torch.arange(length, device=self.input_ids.device).expand(rows, length)
        documents = torch.zeros_like(places) if self.document_ids is None else self.document_ids.long()
        # per document of a row: where it begins, where it ends, and where it is first marked
        nowhere = torch.full_like(places, length)
        begin = nowhere.scatter_reduce(1, documents, places, "amin")
        end = torch.zeros_like(places).scatter_reduce(1, documents, places + 1, "amax")
        marked = nowhere.scatter_reduce(1, documents, places.masked_fill(~self.loss_mask, length), "amin")
        return (torch.minimum(marked, end) - begin).gather(1, documents).to(torch.int32)

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device."""
        return self.each(lambda tensor: tensor.to(device))

    def split(self, rows: int) -> Iterator["Batch"]:
        """Micro-batches of at most `rows` rows, in order; views."""
        for first in range(0, len(self.input_ids), rows):
            yield self.each(lambda tensor, part=slice(first, first + rows): tensor[part])

    def each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with each tensor changed."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(tensor) for name, tensor in held.items() if tensor is not None})


def noise_seeds(places: np.ndarray, seed: int) -> Tensor:
    """int64 [B], at least 0: one for each row by its number in the whole run, which no step repeats."""
    return torch.from_numpy((mix(places, seed) >> np.uint64(1)).astype(np.int64))


class RowSource:
    """Numbered rows in global batches."""

    def __init__(self, num_rows: int, batch_size: int) -> None:
        """`num_rows` of one pass. Raises DataError for batches without a row."""
        if batch_size < 1:
            raise DataError(f"need batch_size >= 1; got {batch_size}")
        self.num_rows, self.batch_size = num_rows, batch_size

    @property
    def num_batches(self) -> int:
        """Batches of one pass; the last may be filled up."""
        return -(-self.num_rows // self.batch_size)

    def steps(self, num_batches: int | None) -> range:
        """The first steps of a pass, all if None or more than there are."""
        return range(self.num_batches)[:num_batches]

    def checked(self, rows: range | None) -> np.ndarray:
        """Row numbers within the global batch, int64; raises DataError for others."""
        rows = range(self.batch_size) if rows is None else rows
        if not rows or min(rows[0], rows[-1]) < 0 or max(rows[0], rows[-1]) >= self.batch_size:
            raise DataError(f"rows must be a non-empty part of range({self.batch_size}); got {rows}")
        return np.arange(rows.start, rows.stop, rows.step, dtype=np.int64)


class BatchSource(RowSource):
    """The rows of one split, in an order drawn from the seed, anew for each epoch.

    The split's documents, laid end to end, are cut into rows of `sequence_length` tokens, each beginning with the last
    token of the row before, so that every token after the first is a target exactly once in an epoch; the last row ends
    at the end, and what it repeats of the row before is ignored in its labels. Every row is used once per epoch.

    With documents `separate`, `document_ids` and positions keep the documents of a row apart and a document's first
    token is no target, since only another document stands before it. With `concatenate` (as SWAT's authors train) the
    stream is plain. A document longer than a row goes on in the next one, without memory of the row before.
    """

    def __init__(
        self,
        store: TokenStore,
        split: str,
        sequence_length: int,
        documents: Literal["separate", "concatenate"],
        seed: int,
        *,
        batch_size: int,
        shuffle: bool = True,
    ) -> None:
        """Raises DataError if the split is too small for one row, or a training batch far larger than the data."""
        if documents not in ("separate", "concatenate"):
            raise DataError(f"documents must be separate or concatenate; got {documents!r}")
        if sequence_length < 2:
            raise DataError(f"need sequence_length >= 2; got {sequence_length}")
        self.store = store
        self.documents = store.split(split)
        self.sequence_length, self.separate = sequence_length, documents == "separate"
        self.seed, self.shuffle = seed, shuffle
        lengths = self.documents.spans[:, 1] - self.documents.spans[:, 0]
        # where each document begins in the stream
        self.starts = np.concatenate([[0], np.cumsum(lengths)])
        self.num_tokens = int(self.starts[-1])
        if self.num_tokens < sequence_length:
            advice = "add text, lower data.sequence_length"
            advice += " or raise data.held_out (0 holds out none)" if split == "held_out" else ""
            raise DataError(
                f"the {split} split has {counted(self.num_tokens, 'token')} in {counted(len(lengths), 'document')}; "
                "one row needs "
                f"{sequence_length}: {advice}"
            )
        # a row brings sequence_length - 1 targets
        super().__init__(-(-(self.num_tokens - 1) // (sequence_length - 1)), batch_size)
        if split == "train" and batch_size > max(self.num_rows, MOST_REPEATED):
            raise DataError(
                f"train.batch_size ({batch_size}) is more than the {counted(self.num_rows, 'row')} of "
                f"{counted(sequence_length, 'token')} "
                f"that the data has per epoch, and more than {MOST_REPEATED}: lower it, or add text"
            )
        # neighbouring documents that are also neighbours on disk are copied as one
        firsts = np.flatnonzero(np.r_[True, self.documents.spans[1:, 0] != self.documents.spans[:-1, 1]])
        self.run_starts, self.run_places = self.starts[firsts], self.documents.spans[firsts, 0]
        self.marks = store.marks

    def batch(self, step: int, rows: range | None = None) -> Batch:
        """Rows `rows` (all if None) of the global batch of a step, 0 for the first; epochs follow without a seam."""
        places = step * self.batch_size + self.checked(rows)
        drawn = noise_seeds(places, self.seed)
        epochs, places = np.divmod(places, self.num_rows)
        for epoch in np.unique(epochs) if self.shuffle else ():
            here = epochs == epoch
            places[here] = permute(places[here], self.num_rows, (self.seed << 32) + int(epoch))
        return replace(self.rows(places), noise_seed=drawn)

    def pass_over(self, rows: range | None = None, num_batches: int | None = None) -> Iterator[Batch]:
        """Each row once, for evaluation: `num_batches` batches (all if None or more than there are), each rows `rows`.

        The order is that of epoch 0, so that the first batches are a fair sample. The last batch is filled up with
        rows without targets, so that each process gets as many batches as the others.
        """
        chosen = self.checked(rows)
        for step in self.steps(num_batches):
            places = step * self.batch_size + chosen
            real = places < self.num_rows
            order = np.where(real, places, 0)
            batch = self.rows(permute(order, self.num_rows, self.seed << 32) if self.shuffle else order)
            batch.labels[torch.from_numpy(~real)] = IGNORED
            yield batch

    def rows(self, numbers: np.ndarray) -> Batch:
        """The rows of these numbers, `0 .. num_rows - 1` in the order of the text."""
        T, stride = self.sequence_length, self.sequence_length - 1
        wanted = numbers * stride
        begins = np.minimum(wanted, self.num_tokens - T)
        input_ids = np.empty((len(numbers), T), dtype=np.int64)
        document_ids = np.zeros((len(numbers), T), dtype=np.int32)
        position_ids = np.tile(np.arange(T, dtype=np.int64), (len(numbers), 1))
        labels = np.empty_like(input_ids)
        marked = None if self.marks is None else np.zeros(input_ids.shape, dtype=bool)
        for i, begin in enumerate(begins):
            self.copy_tokens(int(begin), input_ids[i], None if marked is None else marked[i])
            labels[i] = input_ids[i]
            # the row's first token has nothing before it; a last row moved back repeats targets of the row before
            labels[i, : 1 + wanted[i] - begin] = IGNORED
            if self.separate:
                low, high = np.searchsorted(self.starts, [begin, begin + T], side="left")
                openings = self.starts[low:high] - begin
                labels[i, openings] = IGNORED
                # a document that goes on from the row before is the first; one that opens at the row's start is too
                later = openings[openings > 0]
                document_ids[i, later] = 1
                document_ids[i] = np.cumsum(document_ids[i], dtype=np.int32)
                position_ids[i] -= np.concatenate([[0], later])[document_ids[i]]
        self.store.check(input_ids)
        return Batch(
            torch.from_numpy(input_ids),
            torch.from_numpy(labels),
            torch.from_numpy(position_ids),
            torch.from_numpy(document_ids) if self.separate else None,
            None if marked is None else torch.from_numpy(marked),
        )

    def copy_tokens(self, begin: int, into: np.ndarray, marked: np.ndarray | None = None) -> None:
        """Fill a row with the stream's tokens from `begin` on, run by run, and say which of them are marked."""
        filled = 0
        run = int(np.searchsorted(self.run_starts, begin, side="right")) - 1
        while filled < len(into):
            within = begin + filled - self.run_starts[run]
            run_end = self.run_starts[run + 1] if run + 1 < len(self.run_starts) else self.num_tokens
            count = min(len(into) - filled, int(run_end - self.run_starts[run] - within))
            place = self.run_places[run] + within
            into[filled : filled + count] = self.documents.tokens[place : place + count]
            if marked is not None and self.marks is not None:
                low = np.searchsorted(self.marks[:, 1], place, side="right")
                high = np.searchsorted(self.marks[:, 0], place + count, side="left")
                for first, end in self.marks[low:high] - place:
                    marked[filled : filled + count][max(first, 0) : end] = True
            filled, run = filled + count, run + 1
