"""Samples of a text that are found again however the text is cut into documents and whichever tokenizer reads it.

A passage is WIDTH bytes of one document. Which ones are taken is decided by their bytes alone: those that begin with
one of the chosen groups of 8 bytes, and of these, in a long text, the ones with the smallest hashes.
"""

import numpy as np

from swat_lm.data.mixing import GOLDEN, finalise

PASSAGE = np.dtype([("hash", np.uint64), ("byte", np.int64)])
TAKEN = np.dtype([("hash", np.uint64), ("byte", np.int64), ("document", np.int64)])
WIDTH = 32
GROUP = 8
# one group of bytes in 2**CHOSEN_BITS begins a passage
CHOSEN_BITS = 3
# passages kept of one text: all of about 4 MB, ever fewer of longer ones
MOST = 1 << 19
# a passage of more documents than this is a set phrase or a heading; more of its places say nothing
MOST_DOCUMENTS = 8
EVERYTHING = (1 << 64) - 1
BLOCK = 1 << 20


def passages_of(content: bytes | bytearray) -> tuple[np.ndarray, np.ndarray]:
    """Hash, uint64, and first byte, int64, of each passage that begins with a chosen group of bytes."""
    if len(content) < WIDTH:
        return np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64)
    text = np.frombuffer(content, dtype=np.uint8)
    # the 8 bytes from each place on, as one number; the stride of 1 lets them overlap
    groups = np.ndarray((len(text) - GROUP + 1,), dtype="<u8", buffer=text, strides=(1,))
    with np.errstate(over="ignore"):
        scrambled = groups[: len(text) - WIDTH + 1] * GOLDEN
        places = np.flatnonzero(scrambled >> np.uint64(64 - CHOSEN_BITS) == 0)
        hashes = np.zeros(len(places), dtype=np.uint64)
        for at in range(0, WIDTH, GROUP):
            hashes = finalise(hashes ^ groups[places + at])
    return hashes, places


class PassageSample:
    """Collects the passages of a text, document after document, in bounded memory."""

    def __init__(self) -> None:
        self.waiting = bytearray()
        self.before = 0
        """Bytes of text before those that wait."""
        self.starts: list[int] = []
        """Where in the waiting bytes documents begin."""
        self.number = -1
        """Of the document that the waiting bytes begin with; -1 before the first."""
        self.below = EVERYTHING
        """Passages with smaller hashes are kept."""
        self.parts: list[np.ndarray] = []
        """Passages so far, in the order of the text, TAKEN."""
        self.count = 0

    def open_document(self) -> None:
        """What is added from now on belongs to a new document."""
        self.starts.append(len(self.waiting))

    def add(self, content: bytes) -> None:
        """More text of the open document."""
        self.waiting += content
        if len(self.waiting) >= BLOCK:
            self.flush()

    def drop_document(self, first_byte: int) -> None:
        """Forget the open document, which began at this byte of the text."""
        if self.starts:
            del self.waiting[self.starts.pop() :]
            return
        # its beginning is no longer waiting
        self.waiting.clear()
        self.parts = [part[part["byte"] < first_byte] for part in self.parts]
        self.before, self.number = first_byte, self.number - 1

    def flush(self) -> None:
        """Take the passages of what waits, and keep its end, where one may have begun."""
        hashes, places = passages_of(self.waiting)
        starts = np.array(self.starts, dtype=np.int64)
        first = np.searchsorted(starts, places, side="right")
        within = first == np.searchsorted(starts, places + (WIDTH - 1), side="right")
        kept = within & (hashes < np.uint64(self.below))
        part = np.empty(int(kept.sum()), dtype=TAKEN)
        part["hash"], part["byte"] = hashes[kept], places[kept] + self.before
        part["document"] = first[kept] + self.number
        self.parts.append(part)
        self.count += len(part)
        done = max(len(self.waiting) - WIDTH + 1, 0)
        passed = int(np.searchsorted(starts, done, side="right"))
        self.number += passed
        self.starts = [start - done for start in self.starts[passed:]]
        self.before += done
        # the view of the bytes that numpy held is gone, so they may be cut
        del self.waiting[:done]
        if self.count > 2 * MOST:
            self.thin()

    def thin(self) -> np.ndarray:
        """Keep each passage once per document, in few documents, and of too many those with the smallest hashes."""
        taken = np.concatenate(self.parts) if self.parts else np.empty(0, dtype=TAKEN)
        # equal hashes stay in the order of the text
        taken = taken[np.argsort(taken["hash"], kind="stable")]
        taken = taken[~(repeated(taken["hash"], 1) & repeated(taken["document"], 1))]
        taken = taken[~repeated(taken["hash"], MOST_DOCUMENTS)]
        if len(taken) > MOST:
            self.below = int(taken["hash"][MOST])
            taken = taken[: int(np.searchsorted(taken["hash"], np.uint64(self.below)))]
        self.parts, self.count = [taken], len(taken)
        return taken

    def table(self) -> np.ndarray:
        """The passages of the whole text by their hashes, PASSAGE [passages]."""
        self.flush()
        return self.thin()[["hash", "byte"]].astype(PASSAGE)


def repeated(values: np.ndarray, distance: int) -> np.ndarray:
    """Whether each value is the one so many places before it, bool."""
    same = np.zeros(len(values), dtype=bool)
    same[distance:] = values[distance:] == values[:-distance]
    return same
