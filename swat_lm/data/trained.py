"""What text a model was trained on, kept beside it: hashes of documents and samples of passages, no text.

Text is recognised by its content, wherever it lies and whatever it is called: whole documents by their hash, others
(a part of a document, several joined, with another end of line) by the passages they share with what was trained on.
"""

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from swat_lm.data.passages import EVERYTHING, MOST_DOCUMENTS
from swat_lm.data.sources import DataError
from swat_lm.data.store import TokenStore

__all__ = ["Recognised", "TrainedText", "read_trained_text"]

# a document of whose passages more than this share was trained on counts as trained on
MOST_KNOWN = 1 / 3
FORMAT = 1
CUT = np.dtype([("content", np.uint64), ("tokens", np.int64), ("all_tokens", np.int64), ("bytes", np.int64)])
FIELDS = {"documents": np.uint64, "held_out": np.uint64, "passages": np.uint64, "common": np.uint64, "cut": CUT}


class Recognised(NamedTuple):
    """What of the documents of a store a model knows; one entry for each document."""

    trained: np.ndarray
    """Whether the model was trained on it, bool."""
    held_out: np.ndarray
    """Whether it is a document that the model's run held out, or one of which it held out the end, bool."""
    first: np.ndarray
    """The first token that the model was not trained on, int64: above 0 where it was on a document's beginning."""
    shared: np.ndarray
    """Of the others: share of their telling passages that the model was trained on, float; 0 where there is none."""
    silent: np.ndarray
    """Whether nothing can be told of a document: it is no known one, has no passage, and stands among others, bool."""


@dataclass(frozen=True)
class TrainedText:
    """The text of one or more runs, as sorted hashes."""

    documents: np.ndarray
    """Of the documents trained on whole, uint64."""
    held_out: np.ndarray
    """Of the documents held out whole, uint64."""
    passages: np.ndarray
    """Of a sample of passages trained on, uint64."""
    common: np.ndarray
    """Of passages that held-out text has too, or many documents, uint64: set phrases, which say nothing of a text."""
    below: int
    """All passages of the text with hashes below are in one of the samples; 0: none were taken."""
    cut: np.ndarray
    """Documents trained on up to a place, CUT: hash, tokens trained on, all tokens, bytes trained on (-1: unknown)."""
    whole: bool = True
    """Whether passages were taken of all of it; a store prepared by an earlier version has none."""
    split_seed: int = 0
    """Of the draw of the held-out documents."""

    @classmethod
    def of_store(cls, store: TokenStore) -> "TrainedText":
        """What a run trains on that reads the store's `train` split."""
        passages, cut = store.passages, np.empty(0, dtype=CUT)
        if store.num_documents == 1 and store.held_out:
            part = store.split("train")
            num_bytes = -1 if part.num_bytes is None else part.num_bytes
            cut = np.array([(store.content[0], part.num_tokens, store.num_tokens, num_bytes)], dtype=CUT)
            share = part.num_tokens / store.num_tokens
            learnt = passages["byte"] < (store.num_bytes * share if num_bytes < 0 else num_bytes)
            documents = held_out = np.empty(0, dtype=np.uint64)
        else:
            held = store.held_out_documents()
            documents, held_out = np.unique(store.content[~held]), np.unique(store.content[held])
            learnt = ~held[document_numbers(store, passages)]
        hashes, counts = np.unique(passages["hash"], return_counts=True)
        known, not_known = passages["hash"][learnt], passages["hash"][~learnt]
        common = np.union1d(hashes[counts >= MOST_DOCUMENTS], np.intersect1d(known, not_known))
        known = np.setdiff1d(known, common)
        below = store.passages_below
        return cls(documents, held_out, known, common, below, cut, below > 0, store.split_seed)

    @classmethod
    def unknown(cls) -> "TrainedText":
        """Of a run whose text nobody knows any more."""
        nothing = np.empty(0, dtype=np.uint64)
        return cls(nothing, nothing, nothing, nothing, 0, np.empty(0, dtype=CUT), False)

    def joined(self, earlier: "TrainedText") -> "TrainedText":
        """The text of a run that goes on from an earlier one's model."""
        documents = np.union1d(self.documents, earlier.documents)
        below = min(self.below or EVERYTHING, earlier.below or EVERYTHING) if self.below or earlier.below else 0
        common = np.union1d(self.common, earlier.common)
        passages = np.setdiff1d(np.union1d(self.passages, earlier.passages), common)
        return TrainedText(
            documents,
            np.setdiff1d(np.union1d(self.held_out, earlier.held_out), documents),
            passages[passages < np.uint64(below)],
            common[common < np.uint64(below)],
            below,
            np.unique(np.concatenate([self.cut, earlier.cut])),
            self.whole and earlier.whole,
            self.split_seed,
        )

    def to_bytes(self) -> bytes:
        """The record as a file's content, equal for equal text."""
        content = io.BytesIO()
        numbers = np.array([FORMAT, self.below, self.whole, self.split_seed], dtype=np.uint64)
        np.savez(content, numbers=numbers, **{name: getattr(self, name) for name in FIELDS})
        return content.getvalue()

    def recognise(self, store: TokenStore) -> Recognised:
        """What of a store's documents the model was trained on."""
        count = store.num_documents
        whole = np.isin(store.content, self.documents)
        first = np.zeros(count, dtype=np.int64)
        for number in np.flatnonzero(np.isin(store.content, self.cut["content"]) & ~whole):
            for cut in self.cut[self.cut["content"] == store.content[number]]:
                first[number] = max(first[number], first_unknown(store, int(number), cut))
        known = (first > 0) | (np.isin(store.content, self.held_out) & ~whole)
        passages = store.passages
        passages = passages[passages["hash"] < np.uint64(min(self.below, store.passages_below))]
        passages = passages[~np.isin(passages["hash"], self.common)]
        numbers = document_numbers(store, passages)
        hits = np.bincount(numbers[np.isin(passages["hash"], self.passages)], minlength=count)
        taken = np.bincount(numbers, minlength=count)
        shared = np.where(known | whole, 0.0, hits / np.maximum(taken, 1))
        parts = shared > MOST_KNOWN
        silent = ~(known | whole) & (taken == 0)
        parts |= silent & surrounded(parts, silent)
        trained = whole | parts
        lengths = np.diff(store.offsets)
        # nothing of a document is left where the model knows it to its end
        trained |= first >= lengths
        return Recognised(trained, known, first, shared, silent & ~parts)


def surrounded(parts: np.ndarray, silent: np.ndarray) -> np.ndarray:
    """Whether of the documents that are not silent the nearest before and behind are parts of trained text, bool.

    A text of lines may have been trained on as one of pages; lines too short to tell are then known by those around.
    """
    told = np.flatnonzero(~silent)
    if not len(told):
        return np.zeros(len(silent), dtype=bool)
    behind = np.searchsorted(told, np.arange(len(silent)))
    return parts[told[np.maximum(behind - 1, 0)]] & parts[told[np.minimum(behind, len(told) - 1)]]


def document_numbers(store: TokenStore, passages: np.ndarray) -> np.ndarray:
    """Which document each passage is of."""
    return np.searchsorted(store.byte_offsets, passages["byte"], side="right") - 1


def first_unknown(store: TokenStore, number: int, cut: np.void) -> int:
    """The first token of a document, of which a beginning was trained on, that was not.

    By bytes where both tokenizers let them be counted, so that the tokens may be others; else by the share of tokens.
    """
    tokens = store.document(number)
    if len(tokens) == cut["all_tokens"]:
        return int(cut["tokens"])
    if store.token_bytes is None or cut["bytes"] < 0:
        return int(-(-len(tokens) * int(cut["tokens"]) // int(cut["all_tokens"])))
    store.check(tokens)
    ends = np.cumsum(store.token_bytes[tokens])
    # a token across the place was trained on in part
    return int(np.searchsorted(ends - store.token_bytes[tokens], int(cut["bytes"]), side="left"))


def read_trained_text(path: Path) -> TrainedText:
    """Read what `to_bytes` made; DataError for anything else."""
    try:
        with np.load(path, allow_pickle=False) as file:
            form, below, whole, split_seed = (int(number) for number in file["numbers"])
            fields = {name: file[name] for name in FIELDS}
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: damaged: {error}; train the run on to write it again, or remove it") from None
    if form != FORMAT:
        raise DataError(f"{path}: written as format {form}, expected {FORMAT}: it is of another version of swat-lm")
    for name, kind in FIELDS.items():
        if fields[name].dtype != kind or fields[name].ndim != 1:
            raise DataError(f"{path}: damaged: {name} is {fields[name].dtype} {list(fields[name].shape)}")
    return TrainedText(**fields, below=below, whole=bool(whole), split_seed=split_seed)
