"""Trains byte-level BPE on the user's text, in a process of its own so that Ctrl-C ends it at once.

The library's time grows with the square of the length of a word. So a longer run of letters and digits, of other signs
or of white space counts as several words, which changes nothing for text that has none.
"""

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from swat_lm.data.cutting import BYTE_CUTS
from swat_lm.data.encoding import receive, send, started
from swat_lm.data.source_text import SourcePieces, read_pieces
from swat_lm.data.sources import DataError, resolve_sources
from swat_lm.data.tokenizer import BOS, EOS, PAD, wrap
from swat_lm.files import whole
from swat_lm.paths import local_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# characters that are read, and sent to the training process, at once
PIECE = 1 << 16
# the most characters that count as one word
LONGEST_WORD = 1 << 10
# letters and digits, other signs, white space: no word of GPT-2's rule holds more than one of these and a space before
RUN = re.compile(r"[^\W_]+|(?:[^\w\s]|_)+|\s+")

logger = logging.getLogger(__name__)


def train_tokenizer(
    sources: Iterable[str],
    vocab_size: int,
    out: str | Path,
    text_field: str = "text",
    progress: Callable[[int, int], None] | None = None,
) -> "PreTrainedTokenizerFast":
    """Train byte-level BPE on the sources and save it as the new folder `out`; lossless for any text.

    `vocab_size` counts everything: 256 bytes, three special tokens, the rest merges. `progress(bytes read, bytes in
    all)` is called while the text is read. Raises DataError, and FileExistsError if `out` exists.
    """
    from tokenizers import Tokenizer

    smallest = 256 + len((BOS, EOS, PAD))
    if vocab_size < smallest:
        raise DataError(f"vocab_size must be at least {smallest} (256 bytes and 3 special tokens); got {vocab_size}")
    out = local_path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists; name another folder, or remove it first")
    # ended by whatever ends this call
    with started(1, "train", vocab_size, [BOS, EOS, PAD], parallel=True) as (process,):
        for batch in short_words(texts(sources, text_field, progress)):
            send(process, batch)
        send(process, None)
        backend = Tokenizer.from_str(receive(process, "training on less text needs less memory"))
    if backend.get_vocab_size() < vocab_size:
        logger.warning("the text supports a vocabulary of %d, not %d", backend.get_vocab_size(), vocab_size)
    tokenizer = wrap(backend, bos_token=BOS, eos_token=EOS, pad_token=PAD)
    with whole(out) as beside:
        # made as any folder is: the umask says who may read it
        beside.mkdir()
        tokenizer.save_pretrained(beside)
    return tokenizer


def short_words(pieces: Iterable[str]) -> Iterator[list[str]]:
    """Each piece in parts that hold no longer word than LONGEST_WORD; says so once where one was longer."""
    said = False
    for piece in pieces:
        parts, start = [], 0
        for first, last in long_runs(piece):
            for end in range(first + LONGEST_WORD, last, LONGEST_WORD):
                parts.append(piece[start:end])
                start = end
        parts.append(piece[start:])
        if len(parts) > 1 and not said:
            said = True
            logger.info(
                "a run of letters and digits, of signs or of white space is learnt from in parts of %s characters",
                f"{LONGEST_WORD:,}",
            )
        yield parts


def long_runs(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of each run of more than LONGEST_WORD characters, looking at one character of as many."""
    at = 0
    while at + LONGEST_WORD < len(text):
        # a longer run that begins behind `at` and before this place reaches beyond it
        place = at + LONGEST_WORD
        ahead, behind = RUN.match(text, place), RUN.match(text[at : place + 1][::-1])
        assert ahead is not None, "every character is of one of the kinds"
        assert behind is not None
        start, end = place + 1 - behind.end(), ahead.end()
        if end - start > LONGEST_WORD:
            yield start, end
        at = end


def texts(sources: Iterable[str], text_field: str, progress: Callable[[int, int], None] | None) -> Iterator[str]:
    """Every piece of text of the sources, reporting bytes read."""
    read = partial(read_pieces, text_field=text_field, cuts=BYTE_CUTS, longest=PIECE)
    pieces = SourcePieces(resolve_sources(sources), read)
    any_text = False
    for piece in pieces:
        any_text = True
        yield piece.text
        if progress:
            progress(pieces.bytes_read, pieces.total)
    if not any_text:
        raise DataError(f"no text in {', '.join(map(str, sources))}")
