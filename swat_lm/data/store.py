"""Tokens on disk, opened as a memory map: `tokens.bin`, `documents.npy`, `token_bytes.npy` and `index.json`.

A document is its tokens including the separators around it. The held-out split is drawn here, when a store is opened,
from each document's content: no other document, order or tokenizer changes it, and equal documents stay together.
"""

import json
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from swat_lm.data.mixing import mix
from swat_lm.data.sources import DataError

TOKENS, DOCUMENTS, TOKEN_BYTES, INDEX = "tokens.bin", "documents.npy", "token_bytes.npy", "index.json"
VERSION = 1
SPLITS = ("train", "held_out")

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
        self.held_out = held_out
        self.split_seed = split_seed
        self.dtype = np.dtype(index["dtype"])
        table = np.load(folder / DOCUMENTS, mmap_mode="r")
        self.offsets: np.ndarray = table["token"]
        """Where each document begins, int64 [documents + 1]; the last entry is num_tokens."""
        self.byte_offsets: np.ndarray = table["byte"]
        self.content: np.ndarray = table["content"][:-1]
        """A hash of each document's text, uint64 [documents]."""

    @classmethod
    def open(cls, folder: str | Path, held_out: float = 0.0, split_seed: int = 0) -> "TokenStore":
        """Open a folder written by `prepare`; DataError if it is not one, or is damaged."""
        folder = Path(folder)
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(f"{folder}: no prepared tokens here ({INDEX} is missing); run swat-lm prepare") from None
        except ValueError as error:
            raise DataError(f"{folder / INDEX}: damaged: {error}; remove the folder and prepare again") from None
        if index.get("version") != VERSION:
            raise DataError(f"{folder}: written as version {index.get('version')}, expected {VERSION}; prepare again")
        expected = index["num_tokens"] * np.dtype(index["dtype"]).itemsize
        size = (folder / TOKENS).stat().st_size
        if size != expected:
            raise DataError(
                f"{folder / TOKENS}: {size} bytes, expected {expected}; remove the folder and prepare again"
            )
        return cls(folder, index, held_out, split_seed)

    @cached_property
    def tokens(self) -> np.ndarray:
        """All tokens, memory-mapped, uint16 or uint32 [num_tokens]."""
        return np.memmap(self.folder / TOKENS, dtype=self.dtype, mode="r", shape=(self.num_tokens,))

    @cached_property
    def token_bytes(self) -> np.ndarray | None:
        """UTF-8 bytes that each token id stands for, int64 [vocabulary], 0 for special tokens; None if unknown."""
        path = self.folder / TOKEN_BYTES
        return np.load(path) if path.exists() else None

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
        return chosen

    def split_single(self, name: str) -> Documents:
        """The two parts of a store that holds one document."""
        place = min(max(round(self.num_tokens * (1 - self.held_out)), 1), self.num_tokens - 1)
        logger.info("only one document: its last %d tokens are held out", self.num_tokens - place)
        first, end = (0, place) if name == "train" else (place, self.num_tokens)
        table, num_bytes = self.token_bytes, None
        if table is not None:
            counts = np.bincount(self.tokens[first:end], minlength=len(table))
            num_bytes = int(counts @ table)
        return Documents(self.tokens, np.array([[first, end]], dtype=np.int64), num_bytes)
