"""A tokenizer as a server uses it."""

import threading
import time

import pytest
from tokenizers import processors

from swat_lm.data import load_tokenizer
from swat_lm.serve.constraints import ConstraintError
from swat_lm.serve.language import ChatError, Language
from tests.serve.pieces import sentence_pieces


def test_a_prompt_begins_a_text_and_does_not_close_it():
    tokenizer = load_tokenizer("bytes")
    plain = Language(tokenizer, 300)
    assert plain.prompt("ab") == ([97, 98], 0)
    assert plain.prompt("") == ([], 0)
    assert plain.size == 259
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A <|eos|>", special_tokens=[("<|bos|>", 256), ("<|eos|>", 257)]
    )
    around = Language(tokenizer, 300)
    # what stands in the text itself is not taken away
    assert around.prompt("ab<|eos|>") == ([256, 97, 98, 257], 1)
    assert around.prompt("").tokens[:1] == [256]
    assert around.encode("ab") == [97, 98]


def test_long_texts_are_encoded_in_pieces_and_beside_other_threads():
    tokenizer, cuts = load_tokenizer("bytes"), []
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A <|eos|>", special_tokens=[("<|bos|>", 256), ("<|eos|>", 257)]
    )

    def cut(text: str) -> list[str]:
        cuts.append(len(text))
        return [text[place : place + 50_000] for place in range(0, len(text), 50_000)]

    language = Language(tokenizer, 300, cut=cut)
    text = "abcd" * 60_000
    assert language.prompt(text) == ([256, *text.encode()], 1)
    assert language.encode(text) == list(text.encode())
    assert cuts == [len(text)] * 2
    assert language.encode("short") == list(b"short")
    assert language.encode("") == []
    # the longest that another thread had to wait
    stop, longest = threading.Event(), [0.0]

    def look() -> None:
        while not stop.is_set():
            begin = time.monotonic()
            time.sleep(0.001)
            longest[0] = max(longest[0], time.monotonic() - begin)

    watching = threading.Thread(target=look)
    watching.start()
    begin = time.monotonic()
    Language(tokenizer, 300).encode(text)
    seconds = time.monotonic() - begin
    stop.set()
    watching.join(20)
    assert longest[0] < max(0.2, 0.5 * seconds)


def test_a_text_is_never_cut_or_filled_up_as_the_file_says():
    tokenizer = load_tokenizer("bytes")
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    assert Language(tokenizer, 300).prompt("abcd").tokens == [97, 98, 99, 100]


def test_tokens_say_bytes_in_both_kinds_of_vocabularies():
    byte_level = Language(load_tokenizer("bytes"), 300)
    assert [byte_level.bytes_of(token) for token in (32, 97, 0xE2, 257)] == [b" ", b"a", b"\xe2", b"<|eos|>"]
    assert [byte_level.piece(token) for token in (32, 0xE2, 257)] == [" ", "bytes:\\xe2", "<|eos|>"]
    pieces = Language(sentence_pieces(), 300)
    by_word = sentence_pieces().get_vocab()
    assert pieces.bytes_of(by_word["<0xE2>"]) == b"\xe2"
    assert pieces.piece(by_word["<0xE2>"]) == "bytes:\\xe2"
    assert pieces.piece(by_word["ab"]) == "ab"
    # an id of the model's that the tokenizer has not
    assert byte_level.bytes_of(280) is None
    assert byte_level.piece(280) == ""


def test_messages_need_a_template_that_takes_them():
    tokenizer = load_tokenizer("bytes")
    with pytest.raises(ChatError, match="no chat template"):
        Language(tokenizer, 300).chat([{"role": "user", "content": "hi"}])
    tokenizer.chat_template = "{{ messages[0].content }}{{ raise_exception('no more') if messages|length > 1 }}>"
    language = Language(tokenizer, 300)
    assert language.chat([{"role": "user", "content": "hi"}]) == "hi>"
    with pytest.raises(ChatError, match="refuses these messages: no more"):
        language.chat([{"role": "user", "content": "hi"}] * 2)


def test_the_compiler_is_made_once_for_all_threads():
    language, found = Language(load_tokenizer("bytes"), 300, [257]), []
    threads = [threading.Thread(target=lambda: found.append(language.compiler())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == 4
    assert len({id(one) for one in found}) == 1
    with pytest.raises(ConstraintError, match="a token that ends a text"):
        Language(load_tokenizer("bytes"), 300).compiler()
