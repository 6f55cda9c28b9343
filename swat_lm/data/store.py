"""Tokens on disk, opened as a memory map, with the table of their documents and what `index.json` says of them.

A document is its tokens including the separators around it. The held-out split is drawn here, when a store is opened,
from each document's content: no other document, order or tokenizer changes it, and equal documents stay together.
"""

import json
import logging
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np

from swat_lm.data.mixing import mix
from swat_lm.data.passages import PASSAGE
from swat_lm.data.sources import DataError
from swat_lm.words import counted

TABLE = np.dtype([("token", np.int64), ("byte", np.int64), ("content", np.uint64)])
TOKENS, DOCUMENTS, TOKEN_BYTES, INDEX = "tokens.bin", "documents.npy", "token_bytes.npy", "index.json"
PASSAGES = "passages.npy"
MARKS = "marks.npy"
VERSION = 1
# what an index must hold besides its version, and as what
INDEX_TYPES = {"key": str, "dtype": str, "vocab_size": int, "num_tokens": int, "num_documents": int, "num_bytes": int}
SPLITS = ("train", "held_out")
# a share of tokens that is so many times too large or too small is spoken of
FAR = 2.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Documents:
    """The documents of one split, in the store's order; `documents[i]` is one's tokens."""

    tokens: np.ndarray
    """All tokens of the store, uint16 or uint32, memory-mapped."""
    spans: np.ndarray
    """First token and end of each document, int64 [documents, 2]."""
    num_bytes: int | None
    """UTF-8 bytes of their text; None if the tokenizer does not let them be counted."""

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> np.ndarray:
        first, end = self.spans[index]
        return self.tokens[first:end]

    @property
    def num_tokens(self) -> int:
        """Tokens, separators included."""
        return int((self.spans[:, 1] - self.spans[:, 0]).sum())


class TokenStore:
    """A folder of prepared tokens; read only."""

    def __init__(self, folder: Path, index: dict[str, Any], held_out: float, split_seed: int) -> None:
        self.folder = folder
        self.key: str = index["key"]
        """Identity of the tokens: equal for the same text, tokenizer and separators, wherever the files lie."""
        self.vocab_size: int = index["vocab_size"]
        self.num_tokens: int = index["num_tokens"]
        self.num_documents: int = index["num_documents"]
        self.num_bytes: int = index["num_bytes"]
        """UTF-8 bytes of all text."""
        self.passages_below: int = index.get("passages_below", 0)
        """The `passages` of the text are those with hashes below; 0 for a store of a version that took none."""
        self.is_marked: bool = "format" in index
        """Whether it is instruction data, whose answers are marked."""
        self.held_out, self.split_seed = held_out, split_seed
        self.dtype = np.dtype(index["dtype"])
        table = read_table(folder, index)
        self.offsets: np.ndarray = table["token"]
        """Where each document begins, int64 [documents + 1]; the last entry is num_tokens."""
        self.byte_offsets: np.ndarray = table["byte"]
        self.content: np.ndarray = table["content"][:-1]
        """A hash of each document's text, uint64 [documents]."""

    @classmethod
    def open(cls, folder: str | Path, held_out: float = 0.0, split_seed: int = 0) -> "TokenStore":
        """Open a folder written by `prepare`; DataError if it is not one, or is damaged."""
        folder = Path(folder)
        index = read_index(folder)
        expected = index["num_tokens"] * np.dtype(index["dtype"]).itemsize
        try:
            size = (folder / TOKENS).stat().st_size
        except FileNotFoundError:
            raise damaged(folder / TOKENS, "it is missing") from None
        if size != expected:
            raise damaged(folder / TOKENS, f"{counted(size, 'byte')}, expected {expected:,}")
        return cls(folder, index, held_out, split_seed)

    @cached_property
    def tokens(self) -> np.ndarray:
        """All tokens, memory-mapped, uint16 or uint32 [num_tokens]."""
        return np.memmap(self.folder / TOKENS, dtype=self.dtype, mode="r", shape=(self.num_tokens,))

    @cached_property
    def token_bytes(self) -> np.ndarray | None:
        """UTF-8 bytes that each token id stands for, int64 [vocabulary], 0 for special tokens; None if unknown."""
        path = self.folder / TOKEN_BYTES
        if not path.exists():
            return None
        # a copy in memory: it is small, and torch wants arrays it may write to
        return np.array(read_array(path, np.int64, (self.vocab_size,), f"int64 [{self.vocab_size}]"))

    @cached_property
    def passages(self) -> np.ndarray:
        """A sample of the text's passages by their hashes, PASSAGE [passages]; see `swat_lm/data/passages.py`."""
        if not self.passages_below:
            return np.empty(0, dtype=PASSAGE)
        return read_array(self.folder / PASSAGES, PASSAGE, (None,), "a list of passages")

    @cached_property
    def marks(self) -> np.ndarray | None:
        """First token and end of each run of marked tokens (answers), in order, int64 [runs, 2].

        None where nothing is marked because the text is plain.
        """
        if not self.is_marked:
            return None
        path = self.folder / MARKS
        table = read_array(path, np.int64, (None, 2), "int64 [runs, 2]")
        places = table.ravel()
        if len(places) and (places[0] < 0 or places[-1] > self.num_tokens or (np.diff(places) < 1).any()):
            raise damaged(path, "its runs are empty, not in order, or beyond the end")
        return table

    def check(self, tokens: np.ndarray) -> None:
        """Raise DataError for tokens of this store that its tokenizer does not have: the disk damaged them."""
        if tokens.size and (largest := int(tokens.max())) >= self.vocab_size:
            raise damaged(self.folder / TOKENS, f"it holds token {largest} of a vocabulary of {self.vocab_size}")

    def document(self, index: int) -> np.ndarray:
        """Tokens of one document."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def split(self, name: str) -> Documents:
        """The `train` or `held_out` documents.

        With `held_out` above 0 and at least two documents both are non-empty. A single document is cut in two, its
        end held out.
        """
        if name not in SPLITS:
            raise DataError(f"split must be one of {', '.join(SPLITS)}; got {name!r}")
        spans = np.stack([self.offsets[:-1], self.offsets[1:]], axis=1)
        if self.num_documents == 1 and self.held_out:
            return self.split_single(name)
        chosen = self.held_out_documents() == (name == "held_out")
        lengths = self.byte_offsets[1:] - self.byte_offsets[:-1]
        return Documents(self.tokens, spans[chosen], int(lengths[chosen].sum()))

    def held_out_documents(self) -> np.ndarray:
        """Whether each document is held out, bool [documents]."""
        draws = mix(self.content, self.split_seed)
        chosen = draws < np.uint64(int(self.held_out * 2**64))
        if self.held_out and self.num_documents > 1:
            # equal documents draw equal numbers, so both ends are taken with all their copies
            if not chosen.any():
                chosen = draws == draws.min()
            if chosen.all():
                chosen = draws != draws.max()
            if chosen.all() or not chosen.any():
                raise DataError(f"{self.folder}: all {self.num_documents} documents are equal; set data.held_out=0")
            tokens = int(np.diff(self.offsets)[chosen].sum())
            share = tokens / self.num_tokens
            # what is left to train on counts as much
            if not self.held_out / FAR <= share <= self.held_out * FAR or (1 - share) * FAR < 1 - self.held_out:
                say_once(
                    self.folder, logging.WARNING,
                    "held out are %s of %s tokens, %.3g %%, where %.3g %% were asked for (data.held_out=%g): whole "
                    "documents are drawn by their content, here %s of %s; cut long documents into several, add "
                    "documents, or try another data.split_seed",
                    f"{tokens:,}", f"{self.num_tokens:,}", 100 * share, 100 * self.held_out, self.held_out,
                    f"{chosen.sum():,}", f"{self.num_documents:,}",
                )  # fmt: skip
        return chosen

    def split_single(self, name: str) -> Documents:
        """The two parts of a store that holds one document."""
        place = min(max(round(self.num_tokens * (1 - self.held_out)), 1), self.num_tokens - 1)
        left = self.num_tokens - place
        are = "token is" if left == 1 else "tokens are"
        say_once(self.folder, logging.INFO, "only one document: its last %d %s held out", left, are)
        first, end = (0, place) if name == "train" else (place, self.num_tokens)
        table, num_bytes = self.token_bytes, None
        if table is not None:
            self.check(self.tokens[first:end])
            num_bytes = int(np.bincount(self.tokens[first:end], minlength=len(table)) @ table)
        return Documents(self.tokens, np.array([[first, end]], dtype=np.int64), num_bytes)


@cache
def say_once(folder: Path, level: int, message: str, *arguments: object) -> None:
    """Say something once of a store, which is opened for each split."""
    logger.log(level, message, *arguments)


def read_index(folder: Path) -> dict[str, Any]:
    """The content of a store's `index.json`; DataError if it is not one."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{folder}: no prepared tokens here ({INDEX} is missing); run swat-lm prepare") from None
    except ValueError as error:
        raise damaged(path, str(error)) from None
    if not isinstance(index, dict):
        raise damaged(path, f"expected a JSON object, got {type(index).__name__}")
    if index.get("version") != VERSION:
        raise DataError(f"{folder}: written as version {index.get('version')}, expected {VERSION}; prepare again")
    for name, kind in INDEX_TYPES.items():
        value = index.get(name)
        if type(value) is not kind or (isinstance(value, int) and value < 1):
            raise damaged(path, f"{name}: expected {'a number above 0' if kind is int else 'text'}, got {value!r}")
    if index["dtype"] not in ("uint16", "uint32"):
        raise damaged(path, f"dtype: expected uint16 or uint32, got {index['dtype']!r}")
    return index


def read_table(folder: Path, index: dict[str, Any]) -> np.ndarray:
    """The table of documents, memory-mapped, TABLE [documents + 1]; DataError if it contradicts the index."""
    path = folder / DOCUMENTS
    count = index["num_documents"]
    table = read_array(path, TABLE, (count + 1,), f"{counted(count, 'document')} and an end")
    for column, end in (("token", index["num_tokens"]), ("byte", index["num_bytes"])):
        places = table[column]
        if places[0] != 0 or places[-1] != end:
            raise damaged(path, f"{column}s from {places[0]} to {places[-1]}, expected 0 to {end}")
    if (np.diff(table["token"]) < 1).any() or (np.diff(table["byte"]) < 0).any():
        raise damaged(path, "its documents are empty or not in order")
    return table


def read_array(path: Path, dtype: np.typing.DTypeLike, shape: tuple[int | None, ...], expected: str) -> np.ndarray:
    """An array file, memory-mapped; `shape` has None where any number serves.

    DataError if it is missing, cut off, no such file, or not what is `expected`.
    """
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise damaged(path, "it is missing") from None
    except (ValueError, EOFError, SyntaxError, TokenError) as error:
        # numpy parses the header as Python
        raise damaged(path, str(error)) from None
    wanted = tuple(own if size is None else size for size, own in zip(shape, array.shape, strict=False))
    if array.dtype != dtype or array.ndim != len(shape) or array.shape != wanted:
        raise damaged(path, f"{array.dtype} {list(array.shape)}, expected {expected}")
    return array


def damaged(path: Path, what: str) -> DataError:
    """The error for a file of a store that is not what `prepare` wrote."""
    return DataError(f"{path}: damaged: {what}; remove the folder and prepare again")
