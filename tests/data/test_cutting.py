"""Text is cut only where its tokens stay as they are, and alike however it arrives."""

import logging
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from swat_lm.data.cutting import BYTE_CUTS, Cuts, Cutter, find_cuts, last_place
from swat_lm.data.source_text import read_pieces
from swat_lm.data.sources import SourceFile
from swat_lm.data.tokenizer import byte_backend

from .trained import NORMALIZERS, STEPS, trained

# what decides where tokens end: letters by case, marks, digits, white space of all kinds, slashes and other signs
BITS = [
    "a", "a", "b", "The", " s", " s", "'s", "'", " ", "  ", "\n", "\n", "\n", "\n\n", "\r\n", "\t", "/", "//", "{", ".",
    ":", "1", "23", "4567", "\u00e9", "e\u0301", "\u0301", "\u6f22", "\u00bd", "\u00a0", "\u2028", "\x85", "\x1c",
    "\u200b", "\u212a", "\u0338", "_", "<|eos|>", "\U0001f600",
]  # fmt: skip
MUST_BE_WHOLE = {
    "lines and words", "no last space", "small letters", "no regex", "prefix space", "Metaspace",
    "line breaks, then Metaspace", "merged matches", "none",
}  # fmt: skip


def texts(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(BITS, k=draw.randrange(1, 50))) for _ in range(count)]


def pieces_of(text: str, cuts: Cuts | None, size: int, longest: int = 10**6, eager: bool = True) -> list[str]:
    cutter = Cutter(cuts, "a test", longest, eager)
    pieces = [piece for at in range(0, len(text), size) for piece in cutter.push(text[at : at + size])]
    pieces += cutter.finish()
    assert "".join(pieces) == text
    assert all(pieces)
    return pieces


@pytest.mark.parametrize("normalizer", [None, "NFC", "NFD"])
@pytest.mark.parametrize("form", STEPS)
def test_pieces_have_the_tokens_of_the_text(form: str, normalizer: str | None):
    backend = trained(form, "".join(texts(1, 400)), normalizer, AddedToken("4b", normalized=True))
    cuts = find_cuts(backend.to_str())
    assert (cuts is None) == (form in MUST_BE_WHOLE)
    count = 0
    for number, text in enumerate(texts(2, 400)):
        pieces = pieces_of(text, cuts, (1, 3, 1000)[number % 3])
        count += len(pieces)
        tokens = [one for piece in pieces for one in backend.encode(piece, add_special_tokens=False).ids]
        assert tokens == backend.encode(text, add_special_tokens=False).ids, (text, pieces)
    assert count == 400 if cuts is None else count > 500


def test_what_may_reach_over_a_cut_keeps_documents_whole():
    text = "some text\nand more\n" * 9
    assert find_cuts(byte_backend().to_str()) == BYTE_CUTS
    for name in NORMALIZERS:
        is_cut = find_cuts(trained("ByteLevel", text, name).to_str()) is not None
        assert is_cut == (name in ("NFC", "NFD"))
    for content in ("a\nb", "\n", "two words", "\u212a s"):
        assert find_cuts(trained("ByteLevel", text, None, AddedToken(content)).to_str()) is None
    for flags in ({"lstrip": True}, {"rstrip": True}, {"single_word": True}):
        assert find_cuts(trained("ByteLevel", text, None, AddedToken("<x>", **flags)).to_str()) is None
    for content in ("<x>", "  ", " x", "\t\t"):
        assert find_cuts(trained("ByteLevel", text, None, AddedToken(content)).to_str()) is not None


@given(st.text(alphabet="aB \n\u00e9./", max_size=200), st.integers(3, 20), st.integers(1, 30))
def test_a_text_is_cut_alike_however_it_arrives(text: str, longest: int, size: int):
    # a text is cut against the tokenizer where it has no place to cut: everything else may be joined or not
    cuts = Cuts(r"(?<=\S\n)(?=[^\s/])|(?<=[A-Za-z])(?= [A-Za-z])", anywhere=True)
    safe = {one.start() for one in re.finditer(cuts.places, text)}
    found = []
    for eager in (True, False):
        for step in (1, size, 1000):
            pieces = pieces_of(text, cuts, step, longest, eager)
            assert max(map(len, pieces), default=0) <= longest
            ends = {sum(map(len, pieces[:number])) for number in range(1, len(pieces))}
            found.append(ends - safe)
    assert all(ends == found[0] for ends in found)


def test_a_bit_of_a_pipe_is_given_out_as_early_as_it_is_certain():
    cutter = Cutter(BYTE_CUTS, "a test", eager=True)
    given_out = [list(cutter.push(bit)) for bit in ("one", "\n", "t", "wo three", " ", "f", "our\n\n", " ")]
    assert given_out == [[], [], ["one\n"], ["two"], [], [" three"], [], []]
    assert list(cutter.finish()) == [" four\n\n "]


def test_a_cut_against_the_tokenizer_is_said_once(caplog):
    cuts = find_cuts(trained("ByteLevel", "some text").to_str())
    with caplog.at_level(logging.WARNING):
        assert len(pieces_of("x" * 100, cuts, 30, 20)) == 5
        assert len(pieces_of("x" * 100, BYTE_CUTS, 30, 20)) == 5
    assert [one.message.partition(",")[0] for one in caplog.records] == [
        "a test: 20 characters without a line break between words or a space between letters: cut there"
    ]


def test_the_last_place_is_found_wherever_it_is():
    text = "a b" + "x" * 5000
    places = re.compile(BYTE_CUTS.places)
    assert last_place(places, text, 0, 5000) == 1
    assert last_place(places, text, 1, 5000) is None
    assert last_place(places, text, 0, 1) == 1


@given(st.text(alphabet="a \n\u00e9.", max_size=200), st.integers(3, 20), st.integers(1, 7))
def test_a_file_read_in_blocks_is_cut_like_the_whole_text(tmp_path_factory, text: str, longest: int, block: int):
    path = tmp_path_factory.mktemp("streamed") / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("swat_lm.data.source_text.BLOCK", block)
        pieces = list(read_pieces(SourceFile(path, 0, 0, named=False), "text", BYTE_CUTS, longest=longest))
    assert [piece.text for piece in pieces] == pieces_of(text, BYTE_CUTS, 1000, longest, eager=False)
    assert [piece.opens for piece in pieces] == [True, *[False] * (len(pieces) - 1)][: len(pieces)]
