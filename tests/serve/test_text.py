"""Text of tokens: characters stay whole, stop strings are never given out, and the cut is known to the token."""

import random
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from swat_lm.data import load_tokenizer, train_tokenizer
from swat_lm.data.tokenizer import byte_characters
from swat_lm.serve.sampling import Sampling
from swat_lm.serve.text import Ending, ReplyText, TextAssembler
from tests.serve.pieces import sentence_pieces

BYTES, PIECES = load_tokenizer("bytes"), sentence_pieces()
# so few that stop strings come often, pieces of characters and special tokens among them
FEW_BYTES = [*b"ab ", *"\u00e9".encode(), *"\u20ac".encode(), *"\U0001f600".encode(), 0xFF, 257]
FEW_PIECES = [*range(1, 11), *(11 + byte for byte in "a\u00e9\U0001f600".encode())]


@pytest.mark.parametrize("text", ["plain", "na\u00efve \u20ac 5", "\U0001f600\U0001f600!", "\u4f60\u597d"])
def test_text_is_assembled_whole(text: str):
    tokenizer = load_tokenizer("bytes")
    assembler = TextAssembler(tokenizer)
    parts = [assembler.push(token) for token in tokenizer.encode(text, add_special_tokens=False)]
    assert "".join(parts) + assembler.finish() == text
    assert all("\ufffd" not in part for part in parts)


def streamed(assembler: TextAssembler, tokens: list[int]) -> str:
    return "".join([assembler.push(token) for token in tokens]) + assembler.finish()


@pytest.mark.parametrize("tokenizer", ["bytes", "pairs"])
def test_text_is_that_of_all_tokens_at_once(tokenizer: str, tmp_path: Path):
    """Also where bytes are invalid: of random bytes, with pieces of characters among them."""
    if tokenizer == "pairs":
        (tmp_path / "text.txt").write_text(
            "na\u00efve \u20ac 5 \U0001f600 \U0001f601 \u4f60\u597d \u00e9\n" * 9, "utf-8"
        )
        train_tokenizer([str(tmp_path / "text.txt")], 266, tmp_path / "made")
    loaded = load_tokenizer("bytes" if tokenizer == "bytes" else str(tmp_path / "made"))
    draw = random.Random(3)
    pieces = [[0x80], [0xF0, 0x9F], [0xF0, 0x9F, 0x98], [0xE2, 0x82], [0xC3], [0xFF], [0xED, 0xA0], [0xF4, 0x90]]
    pieces += [list(text.encode()) for text in ("\U0001f600", "\u20ac", "\u00e9", "a", " ", "\ufffd")]
    cases = [[0x80, *"\U0001f600".encode()], [0xFF, 0xFF, *"\U0001f600\u00e9".encode()], [0xE2, *b"x"]]
    cases += [[byte for _ in range(12) for byte in draw.choice(pieces)] for _ in range(150)]
    vocabulary = len(loaded) - 3
    cases += [[draw.randrange(vocabulary) for _ in range(30)] for _ in range(150)]
    for case in cases:
        if tokenizer == "pairs" and case[0] < 256:
            by_byte = {character: number for number, character in byte_characters().items()}
            ids = {by_byte[text]: number for text, number in loaded.get_vocab().items() if text in by_byte}
            case = [ids[one] if one < 256 else one for one in case]
        assert streamed(TextAssembler(loaded), case) == loaded.decode(case, skip_special_tokens=True)


def test_an_invalid_byte_does_not_hold_the_text_after_it():
    assembler = TextAssembler(load_tokenizer("bytes"))
    assert assembler.push(0x80) == ""
    assert assembler.push(ord("a")) == "\ufffda"
    assert assembler.push(0xE2) == ""
    assert assembler.push(ord("b")) == "\ufffdb"


def test_characters_of_byte_fallback_tokens_stay_whole():
    vocabulary = {"<unk>": 0, "a": 1} | {f"<0x{byte:02X}>": byte + 2 for byte in range(256)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)
    text = "\U0001f600\U0001f601\u00e9a\U0001f600"
    tokens = [1 if one == ord("a") else one + 2 for one in text.encode()]
    assert streamed(TextAssembler(tokenizer), tokens) == text


def test_broken_bytes_do_not_hold_the_stream_up():
    assembler = TextAssembler(load_tokenizer("bytes"))
    parts = [assembler.push(token) for token in [0xFF] * 50 + list(b"ok")]
    assert "".join(parts) == "\ufffd" * 50 + "ok"
    assert len(assembler._context) + len(assembler._held) <= 2 * TextAssembler.MANY_HELD
    # tokens without text neither
    for _ in range(100):
        assembler.push(258)
    assert assembler.push(0xF0) == ""
    for _ in range(100):
        assembler.push(258)
    assert len(assembler._context) + len(assembler._held) <= 2 * TextAssembler.MOST_HELD


def test_tokens_without_text_do_not_close_a_character():
    tokenizer = load_tokenizer("bytes")
    tokens = [0xC3, 0xC3, 0xC3, 257, 257, 0xA9]
    assert streamed(TextAssembler(tokenizer), tokens) == tokenizer.decode(tokens, skip_special_tokens=True)


def test_special_tokens_are_left_out():
    tokenizer = load_tokenizer("bytes")
    assembler = TextAssembler(tokenizer)
    assert assembler.push(65) + assembler.push(258) + assembler.push(66) == "AB"


def cut_before(text: str, stops: list[str]) -> str:
    """The text before the stop string that is complete first, and of those the longest."""
    found = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    return text[: min(found)[1]] if found else text


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_text_ends_before_a_stop_string(data: st.DataObject):
    """Given out piece by piece it is `text.split(stop)[0]`, no piece is taken back, and nothing of a stop is in it."""
    tokenizer, few = data.draw(st.sampled_from([(BYTES, FEW_BYTES), (PIECES, FEW_PIECES)]))
    tokens = data.draw(st.lists(st.sampled_from(few), max_size=30))
    # so many tokens without text end a character: no more are held
    assume(str([257] * (TextAssembler.MOST_HELD - 4))[1:-1] not in str(tokens))
    text = streamed(TextAssembler(tokenizer), tokens)
    # the byte-level one gives exactly what decoding does; of the other, so do its whole characters
    assert text == tokenizer.decode(tokens, skip_special_tokens=True) or tokenizer is PIECES
    places = st.integers(0, max(0, len(text) - 1))
    within = st.builds(lambda at, size: text[at : at + size] or "a", places, st.integers(1, 6))
    stops = data.draw(st.lists(within | st.text("ab \u00e9\ufffd", min_size=1, max_size=4), min_size=1, max_size=3))
    reply, given_out = ReplyText(tokenizer, Sampling(stop=tuple(stops))), ""
    for token in tokens:
        given_out += reply.push(token)
        assert cut_before(text, stops).startswith(given_out)
        assert len(reply._text) + len(reply._marks) < 100
        if reply.ended:
            break
    given_out += reply.finish("length")
    assert given_out == cut_before(text, stops)
    if len(stops) == 1:
        assert given_out == text.split(stops[0])[0]
    assert reply.ended is not None
    assert reply.ended.reason == ("stop_string" if any(stop in text for stop in stops) else "length")
    # the tokens kept say all but the tail
    assert streamed(TextAssembler(tokenizer), tokens[: reply.ended.kept]) + reply.ended.tail == given_out


def replied(text: str, sampling: Sampling, end_tokens: tuple[int, ...] = (257,)) -> tuple[list[str], Ending | None]:
    """What comes of each byte of a text and at the end, and the ending."""
    reply, parts = ReplyText(BYTES, sampling, end_tokens), []
    for token in BYTES.encode(text, add_special_tokens=False):
        parts.append(reply.push(token))
        if reply.ended:
            return parts, reply.ended
    return [*parts, reply.finish("asked")], reply.ended


def test_what_may_become_a_stop_string_is_held_back():
    parts, ended = replied("a</x</s>b", Sampling(stop=("</s>",)))
    assert parts == ["a", "", "", "</x", "", "", "", ""]
    assert ended == Ending("stop_string", None, "</s>", kept=4, tail="")
    parts, ended = replied("a</s", Sampling(stop=("</s>", "nothing")))
    assert parts == ["a", "", "", "", "</s"]
    assert ended == Ending("asked", None, None, kept=4, tail="")
    # complete first wins, then the longest
    assert replied("xabcd", Sampling(stop=("abcd", "bc")))[1] == Ending("stop_string", None, "bc", 2, "")
    assert replied("xabcd", Sampling(stop=("c", "bc", "abc")))[1] == Ending("stop_string", None, "abc", 1, "")


def test_a_token_that_a_stop_string_cuts_is_told():
    reply = ReplyText(PIECES, Sampling(stop=("b",)))
    # "a", " ab": the second token is cut after " a"
    assert [reply.push(2), reply.push(8)] == ["a", " a"]
    assert reply.ended == Ending("stop_string", None, "b", kept=1, tail=" a")


def test_tokens_and_lengths_end_a_reply():
    assert replied("ab<|eos|>c", Sampling()) == (["a", "b", ""], Ending("end_token", 257, None, 2, ""))
    assert replied("ab<|eos|>c", Sampling(ignore_end=True))[1] == Ending("asked", None, None, 4, "")
    stopped = Sampling(ignore_end=True, stop_token_ids=(98,))
    assert replied("ab<|eos|>c", stopped) == (["a", ""], Ending("stop_token", 98, None, 1, ""))
    assert replied("abc", Sampling(max_tokens=2)) == (["a", "b"], Ending("length", None, None, 2, ""))
    # what was held comes with the last token, also half a character
    assert replied("ab", Sampling(max_tokens=2, stop=("bc",))) == (["a", "b"], Ending("length", None, None, 2, ""))
    assert replied("a\u20ac", Sampling(max_tokens=2))[0] == ["a", "\ufffd"]
    assert replied("ab<|eos|>", Sampling(stop=("bc",))) == (["a", "", "b"], Ending("end_token", 257, None, 2, ""))
    # a stop string that the last token completes is the reason, and one that the end's half character completes
    assert replied("ab", Sampling(max_tokens=2, stop=("b",)))[1] == Ending("stop_string", None, "b", 1, "")
    assert replied("a\u20ac", Sampling(max_tokens=2, stop=("\ufffd",)))[1] == Ending(
        "stop_string", None, "\ufffd", 1, ""
    )
    reply = ReplyText(BYTES, Sampling(max_tokens=0))
    assert reply.ended == Ending("length", None, None, 0, "")
    with pytest.raises(ValueError, match=r"token: expected none after the reply's end \(length\), got 3"):
        reply.push(3)


def test_a_long_reply_needs_constant_memory():
    reply = ReplyText(BYTES, Sampling(stop=("aab",)))
    for token in [*b"ac" * 3000, *[0xFF] * 200, *[258] * 200]:
        reply.push(token)
        assert len(reply._text) + len(reply._marks) < 40
