"""Text to a token store, once: parallel, in bounded memory (see `read_text`), and whole or not at all.

A store is written beside its place and renamed, so an interruption leaves nothing that looks like one. Its name holds a
key of the sources' identities, the tokenizer and the separators; preparing the same again opens what is there.
"""

import hashlib
import json
import os
import platform
import shutil
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from swat_lm.data.cutting import LONGEST
from swat_lm.data.encoding import encode_bytes, encode_parallel
from swat_lm.data.instructions import LAYOUT, fields_read, is_marked, read_marked_pieces
from swat_lm.data.passages import PassageSample
from swat_lm.data.source_text import Piece, SourcePieces, read_pieces
from swat_lm.data.sources import DataError, Source, resolve_sources
from swat_lm.data.store import (
    DOCUMENTS,
    INDEX,
    MARKS,
    PASSAGES,
    TABLE,
    TOKEN_BYTES,
    TOKENS,
    VERSION,
    TokenStore,
    damaged,
)
from swat_lm.data.tokenizer import BYTES, TokenizerFacts, byte_facts, load_tokenizer, tokenizer_facts
from swat_lm.files import naming, put_in_place
from swat_lm.paths import local_path
from swat_lm.recipe import DataRecipe


@dataclass(frozen=True)
class Progress:
    """How far `prepare` has come."""

    bytes_read: int
    """Of the sources, compressed as they are."""
    bytes_total: int
    documents: int
    tokens: int


def prepare(data: DataRecipe, progress: Callable[[Progress], None] | None = None) -> TokenStore:
    """The token store of a recipe's data, made now if it is not there yet.

    Several processes may call this at once for the same data: the first to finish wins, the others use its store.
    Raises DataError for bad input and OSError, naming the path, if the cache cannot be written.
    """
    sources = resolve_sources(data.sources)
    facts = byte_facts() if data.tokenizer == BYTES else tokenizer_facts(load_tokenizer(data.tokenizer))
    for wanted, token, name in ((data.add_bos, facts.bos, "bos"), (data.add_eos, facts.eos, "eos")):
        if wanted and token is None:
            raise DataError(f"tokenizer {data.tokenizer!r} has no {name} token: set data.add_{name}=false")
    key = request_key(data, sources, facts)
    cache = local_path(data.cache) if data.cache else default_cache()
    folder = cache / f"{Path(data.sources[0]).name.partition('.')[0].replace(':', '-') or 'data'}-{key[:16]}"
    if cache.exists() and not cache.is_dir():
        raise DataError(f"{cache} is a file: expected a folder for prepared tokens (data.cache, or --cache)")
    if folder.exists() and not (folder / INDEX).exists():
        # a store comes to its place whole, so something else took a part of it
        raise damaged(folder / INDEX, "it is missing")
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with written_beside(folder) as beside:
            write_store(beside, data, sources, facts, progress)
    return TokenStore.open(folder, data.held_out, data.split_seed)


def default_cache() -> Path:
    """`swat-lm/tokens` in the user's cache folder; raises DataError where the user has no home folder."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swat-lm" / "tokens"
    except RuntimeError:
        raise DataError(
            "nowhere to keep prepared tokens: HOME is not set and this user has no home folder; name a folder by "
            "data.cache (prepare: --cache), or set XDG_CACHE_HOME"
        ) from None


def request_key(data: DataRecipe, sources: list[Source], facts: TokenizerFacts) -> str:
    """A hash of all that decides the tokens, without reading the text; the number of workers and the split do not."""
    parts = {
        "version": VERSION,
        "sources": [source.identity for source in sources],
        "text_field": data.text_field,
        "tokenizer": facts.fingerprint,
        "separators": [data.add_bos, data.add_eos],
    }
    if is_marked(data):
        parts["format"] = [data.format, *fields_read(data), LAYOUT]
    if facts.tokenizer_json is not None:
        parts["cuts"] = [facts.cuts.places, LONGEST] if facts.cuts else None
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@contextmanager
def written_beside(folder: Path) -> Iterator[Path]:
    """A folder to write in, renamed to `folder` when all went well and removed otherwise."""
    prefix = f".{folder.name}.{platform.node()}."
    for left in folder.parent.glob(f"{prefix}*"):
        # half a store of a process of this machine that was killed
        process = left.name.removeprefix(prefix)
        if process.isdigit() and not is_running(int(process)):
            shutil.rmtree(left)
    beside = folder.parent / f"{prefix}{os.getpid()}"
    try:
        beside.mkdir()
        yield beside
        try:
            put_in_place(beside, folder)
        except OSError:
            # another process was faster; its store is as good
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def is_running(process: int) -> bool:
    """Whether another process has this number; our own number in an old name means an earlier process had it."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        # it is another user's
        pass
    return process != os.getpid()


def write_store(
    folder: Path,
    data: DataRecipe,
    sources: list[Source],
    facts: TokenizerFacts,
    progress: Callable[[Progress], None] | None,
) -> None:
    """Read, tokenise and write everything into an empty folder."""
    dtype = np.dtype(np.uint16 if facts.vocab_size <= 1 << 16 else np.uint32)
    if is_marked(data):
        read = partial(read_marked_pieces, data=data, cuts=facts.cuts)
    else:
        read = partial(read_pieces, text_field=data.text_field, cuts=facts.cuts)
    pieces = SourcePieces(sources, read)
    encoded = (
        encode_bytes(pieces)
        if facts.tokenizer_json is None
        else encode_parallel(pieces, facts.tokenizer_json, dtype, data.workers or os.cpu_count() or 1)
    )
    said = time.monotonic()
    # closing the file writes too, so the path is put into errors around all of it; what reads names its own
    with naming(folder / TOKENS), (folder / TOKENS).open("wb") as file:
        # no separator is an empty list of tokens
        before, after = [facts.bos] if data.add_bos else [], [facts.eos] if data.add_eos else []
        writer = Writer(file, np.array(before, dtype), np.array(after, dtype))
        for piece, ids in encoded:
            writer.add(piece, ids)
            if progress and time.monotonic() - said > 0.1:
                progress(Progress(pieces.bytes_read, pieces.total, len(writer.firsts), writer.tokens))
                said = time.monotonic()
        writer.end_document()
        file.flush()
        os.fsync(file.fileno())
    if not writer.text_bytes:
        raise DataError(f"no text in {', '.join(data.sources)}")
    if progress:
        progress(Progress(pieces.total, pieces.total, len(writer.firsts), writer.tokens))
    with naming(folder):
        np.save(folder / DOCUMENTS, writer.table())
        np.save(folder / PASSAGES, writer.passages.table())
        if is_marked(data):
            np.save(folder / MARKS, writer.marks())
        if facts.token_bytes is not None:
            np.save(folder / TOKEN_BYTES, facts.token_bytes)
        write_index(folder, data, facts, writer)


def write_index(folder: Path, data: DataRecipe, facts: TokenizerFacts, writer: "Writer") -> None:
    """What `TokenStore` reads first, and a person too."""
    # unlike the folder's name, the same wherever and whenever the same text was prepared
    content = hashlib.sha256(writer.table().tobytes())
    content.update(json.dumps([VERSION, facts.fingerprint, data.add_bos, data.add_eos]).encode())
    if is_marked(data):
        content.update(writer.marks().tobytes())
    index = {
        "version": VERSION,
        "key": content.hexdigest(),
        "sources": list(data.sources),
        "tokenizer": data.tokenizer,
        "tokenizer_fingerprint": facts.fingerprint,
        "vocab_size": facts.vocab_size,
        "dtype": writer.dtype.name,
        "num_tokens": writer.tokens,
        "num_documents": len(writer.firsts),
        "num_bytes": writer.text_bytes,
        "passages_below": writer.passages.below,
    }
    if is_marked(data):
        index["format"] = data.format
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class Writer:
    """Writes tokens with separators around documents and keeps the table of documents."""

    def __init__(self, file: BinaryIO, bos: np.ndarray, eos: np.ndarray) -> None:
        """`bos` and `eos` hold the separators, at most one each, in the type of all tokens."""
        self.file, self.dtype, self.bos, self.eos = file, bos.dtype, bos, eos
        self.tokens = self.text_bytes = 0
        # the first token, first byte and content hash of each document
        self.firsts, self.bytes, self.hashes = array("q"), array("q"), array("Q")
        # first token and end of each run of marked tokens, one after another
        self.marked, self.in_answer = array("q"), False
        self.hash = hashlib.blake2b(digest_size=8)
        self.passages = PassageSample()

    def add(self, piece: Piece, ids: np.ndarray) -> None:
        """Append a piece and, before a document's first, end the one before."""
        if piece.opens:
            self.end_document()
            self.firsts.append(self.tokens)
            self.bytes.append(self.text_bytes)
            self.passages.open_document()
            self.write(self.bos)
        content = piece.text.encode("utf-8")
        self.hash.update(content)
        self.passages.add(content)
        self.text_bytes += len(content)
        self.in_answer = piece.marked
        self.write(ids)

    def end_document(self) -> None:
        """End the open document, if any; one without tokens (the tokenizer removed all its text) is dropped."""
        if not self.firsts:
            return
        # what ends an answer is part of it
        self.write(self.eos)
        self.in_answer = False
        if self.firsts[-1] == self.tokens:
            self.firsts.pop()
            self.text_bytes = self.bytes.pop()
            self.passages.drop_document(self.text_bytes)
        else:
            self.hashes.append(int.from_bytes(self.hash.digest(), "little"))
        self.hash = hashlib.blake2b(digest_size=8)

    def write(self, ids: np.ndarray) -> None:
        """Append tokens."""
        self.file.write(ids.astype(self.dtype).tobytes())
        if self.in_answer and len(ids):
            if self.marked and self.marked[-1] == self.tokens:
                self.marked.pop()
            else:
                self.marked.append(self.tokens)
            self.marked.append(self.tokens + len(ids))
        self.tokens += len(ids)

    def marks(self) -> np.ndarray:
        """First token and end of each run of marked tokens, int64 [runs, 2]."""
        return np.array(self.marked, dtype=np.int64).reshape(-1, 2)

    def table(self) -> np.ndarray:
        """One row per document, and one for the end."""
        table = np.empty(len(self.firsts) + 1, dtype=TABLE)
        table["token"] = [*self.firsts, self.tokens]
        table["byte"] = [*self.bytes, self.text_bytes]
        table["content"] = [*self.hashes, 0]
        return table
