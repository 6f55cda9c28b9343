"""Where text may be cut so that its tokens stay as they are, read from the tokenizer's own definition.

Only what is known to be safe is cut; a tokenizer of any other form must see a document whole. Where a text has no safe
place for very long it is cut at a place that depends on the text alone, never on how it arrives.
"""

import json
import logging
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

# characters without a safe place before a text is cut anyway; more than one argument of a command line can hold
# (128 KiB on Linux), and as much as a tokenizer reads in well under a second
LONGEST = 1 << 18
# characters that decide about a place, before and after it
CONTEXT = 2

# a line break between two visible characters, and a space between two words
LINE = r"(?<=\S\n)(?=\S)"
LINE_BUT_NOT_BEFORE_SLASH = r"(?<=\S\n)(?=[^\s/])"
WORD = r"(?<=[A-Za-z])(?= [A-Za-z])"

# The alternatives of the patterns by which GPT-2's tokenizer and its successors split text, by what they match. None
# matches a line break with a visible character behind it (but a slash, for one), nor a letter with a space behind it,
# and none looks back. So where all are of these and every character is matched, both places above are ends of matches,
# and what the matches before are does not depend on the text after.
CONTRACTIONS = {
    "'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "(?i:'s|'t|'re|'ve|'m|'ll|'d)", "'(?i:[sdmt]|ll|ve|re)",
}  # fmt: skip
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
LETTERS = {r" ?\p{L}+", r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?+\p{L}+"}
# words by their case need both: the second matches those without small letters
CASED_LETTERS = {
    rf"[^\r\n\p{{L}}\p{{N}}]?{first}{last}{contraction}"
    for first, last in ((UPPER + "*", LOWER + "+"), (UPPER + "+", LOWER + "*"))
    for contraction in ("", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?")
}
NUMBERS = {r" ?\p{N}+", r"\p{N}+", r"\p{N}", r"\p{N}{1,2}", r"\p{N}{1,3}", r"\p{N}{1,3}+"}
OTHERS = {r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]++[\r\n]*"}
OTHERS_WITH_SLASH = {r" ?[^\s\p{L}\p{N}]+[\r\n/]*"}
SPACES = {r"\s*[\r\n]+", r"\s*[\r\n]", r"\s+(?!\S)"}
LAST_SPACES = {r"\s+", r"\s"}

# steps that look at two neighbouring characters at a time: a cut only adds a boundary where it is
NEIGHBOURS = ("Digits", "Punctuation")
# steps that treat each part on its own, whatever came before
BY_PART = (*NEIGHBOURS, "Split", "Whitespace", "WhitespaceSplit", "BertPreTokenizer", "CharDelimiterSplit")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cuts:
    """Where a tokenizer's text may be cut."""

    places: str
    """A pattern that matches, without any width, between the two characters."""
    anywhere: bool = False
    """Whether every other place is as good: each byte is a token."""


def find_cuts(tokenizer_json: str) -> Cuts | None:
    """Where text may be cut for a tokenizer, given in the tokenizers library's form; None if it must be seen whole.

    A normaliser may join what a cut parts or put something before a text, and an added token may hold a line break or
    take the white space beside it: such tokenizers, and those whose steps are not known here, see documents whole.
    """
    content: dict[str, Any] = json.loads(tokenizer_json)
    step, normalizer = content.get("pre_tokenizer"), content.get("normalizer")
    # these two join nothing to a line break or to a space before a letter
    if normalizer is not None and normalizer["type"] not in ("NFC", "NFD"):
        return None
    if step is None or not all(map(is_plain, content["added_tokens"])):
        return None
    steps = step["pretokenizers"] if step["type"] == "Sequence" else [step]
    for number, part in enumerate(steps):
        if places := places_of(part):
            return Cuts(places) if all(map(treats_parts_alike, steps[number + 1 :])) else None
        if not (
            part["type"] in NEIGHBOURS and part.get("behavior", "Isolated") in ("Isolated", "Removed", "Contiguous")
        ):
            break
    is_bytes = normalizer is None and step["type"] == "ByteLevel" and not step["add_prefix_space"]
    model = content["model"]
    may_join = model["type"] != "BPE" or any(model.get(setting) for setting in ("merges", "ignore_merges", "fuse_unk"))
    return BYTE_CUTS if is_bytes and not may_join else None


def is_plain(token: dict[str, Any]) -> bool:
    """Whether an added token is found, or not, however the text around it is cut at safe places."""
    looks_around = token["lstrip"] or token["rstrip"] or token["single_word"]
    # a token may be sought in normalised text, where the Kelvin sign is the letter
    texts = (token["content"], unicodedata.normalize("NFKC", token["content"]))
    return not looks_around and not any(re.search(r"\n|[A-Za-z] ", text) for text in texts)


def places_of(step: dict[str, Any]) -> str | None:
    """The places where a step always parts the text, and treats both sides as it would alone; None if unknown."""
    kind = step["type"]
    if kind in ("Whitespace", "WhitespaceSplit", "BertPreTokenizer"):
        return f"{LINE}|{WORD}"
    if kind == "ByteLevel":
        return f"{LINE}|{WORD}" if step.get("use_regex", True) and not step["add_prefix_space"] else None
    if kind != "Split":
        return None
    matches_kept = step["behavior"] == "Isolated" or (step["behavior"] == "Removed" and step["invert"])
    ((form, pattern),) = step["pattern"].items()
    if pattern == "\n" or (form == "Regex" and pattern in (r"\n", r"[\r\n]", "[\r\n]")):
        return LINE if step["behavior"] in ("Isolated", "Removed") and not step["invert"] else None
    return places_of_pattern(pattern) if form == "Regex" and matches_kept else None


def places_of_pattern(pattern: str) -> str | None:
    """The places where matches of a known pattern always end; None for any other pattern."""
    parts = set(alternatives(pattern))
    known = CONTRACTIONS | LETTERS | CASED_LETTERS | NUMBERS | OTHERS | OTHERS_WITH_SLASH | SPACES | LAST_SPACES
    cased = parts & CASED_LETTERS
    letters = parts & LETTERS or all(any(f"{UPPER}{count}" in word for word in cased) for count in "*+")
    others = parts & (OTHERS | OTHERS_WITH_SLASH)
    if not (parts <= known and letters and parts & NUMBERS and others and parts & LAST_SPACES):
        return None
    return f"{LINE_BUT_NOT_BEFORE_SLASH if parts & OTHERS_WITH_SLASH else LINE}|{WORD}"


def alternatives(pattern: str) -> Iterator[str]:
    """The parts of a regular expression between the bars that stand in no group, class or escape."""
    depth, part = 0, ""
    for unit in re.findall(r"\\.|\[(?:\\.|[^\]\\])*\]|.", pattern, re.DOTALL):
        depth += {"(": 1, ")": -1}.get(unit, 0)
        if unit == "|" and not depth:
            yield part
            part = ""
        else:
            part += unit
    yield part


def treats_parts_alike(step: dict[str, Any]) -> bool:
    """Whether a step behind one that parts the text depends on each part alone."""
    return step["type"] in BY_PART or (step["type"] == "ByteLevel" and not step["add_prefix_space"])


class Cutter:
    """Cuts one text, given bit by bit, into pieces whose tokens together are those of the text.

    A piece is at most `longest` characters, and at most those and one more bit are held. Where `longest` characters
    have no safe place the text is cut after them, which is said once: the tokens there may be others, but the place
    depends on nothing but the text. Without `cuts` the whole text is one piece. An `eager` cutter gives out what it
    can with every bit, others as much as they may at once.
    """

    def __init__(self, cuts: Cuts | None, name: str, longest: int = LONGEST, eager: bool = False) -> None:
        """`name` is what the text is called where something must be said of it."""
        self.cuts, self.name, self.longest, self.eager = cuts, name, longest, eager
        self._places = None if cuts is None else re.compile(cuts.places)
        # joined only when there is something to cut: bits may be small
        self._bits: list[str] = []
        self._size = 0
        # of what is held, so much before the first piece is there only to be looked at
        self._given = 0
        self._tail = ""

    def push(self, text: str) -> Iterator[str]:
        """The pieces that are certain with this bit of text; take all of them before the next call."""
        around = self._tail + text
        self._bits.append(text)
        self._size += len(text)
        self._tail = around[-CONTEXT - 1 :]
        if self._places is None:
            return
        if self._size > self.longest + CONTEXT or (self.eager and self._places.search(around)):
            yield from self._pieces(final=False)

    def finish(self) -> Iterator[str]:
        """The rest."""
        yield from self._pieces(final=True)

    def _pieces(self, final: bool) -> Iterator[str]:
        text, at = "".join(self._bits), self._given
        ends: list[int] = []
        # a place is known with the two characters behind it
        while self._places is not None and len(text) - at > self.longest + (0 if final else CONTEXT - 1):
            end = last_place(self._places, text, at, at + self.longest)
            if end is None:
                end = at + self.longest
                if self.cuts is not None and not self.cuts.anywhere:
                    say_forced(self.name, self.longest)
            ends.append(end)
            at = end
        if final and len(text) > at:
            ends.append(len(text))
        elif not final and self.eager and self._places is not None:
            end = last_place(self._places, text, at, len(text) - 1)
            ends += [] if end is None else [end]
        at = self._given
        for end in ends:
            yield text[at:end]
            at = end
        kept = max(at - CONTEXT, 0)
        self._bits, self._given, self._size = [text[kept:]], at - kept, len(text) - at


@cache
def say_forced(name: str, longest: int) -> None:
    """Say once of a text that it is cut where its tokens may be others."""
    logger.warning(
        "%s: %s characters without a line break between words or a space between letters: cut there, "
        "so a token may end at such a cut that would not without it",
        name,
        f"{longest:,}",
    )


def last_place(places: re.Pattern[str], text: str, after: int, last: int) -> int | None:
    """The last place in `text` behind `after` and not behind `last`, sought from its end; None if there is none."""
    end, width = last, 1 << 8
    while end > after:
        begin = max(after + 1, end - width + 1)
        starts = [match.start() for match in places.finditer(text, begin, min(end + CONTEXT, len(text)))]
        if found := [start for start in starts if start <= end]:
            return found[-1]
        end, width = begin - 1, 2 * width
    return None


# our own tokenizer's ids are the bytes; it is cut like the others, so that pieces come as early
BYTE_CUTS = Cuts(f"{LINE}|{WORD}", anywhere=True)
