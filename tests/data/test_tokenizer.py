import errno
import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from swat_lm.data import load_tokenizer, token_bytes, tokenizer_training, train_tokenizer, vocabulary_size
from swat_lm.data.sources import DataError
from swat_lm.data.tokenizer import byte_facts, is_byte_level, tokenizer_facts

BYTES = load_tokenizer("bytes")
BYTES_AND_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    draw = random.Random(0)
    words = ["window", "attention", "sigmoid", "na\u00efve", "streams", "\u6f22\u5b57", "balanced", "42"]
    path = tmp_path_factory.mktemp("corpus") / "words.txt"
    path.write_text("\n".join(" ".join(draw.choices(words, k=9)) for _ in range(2000)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenizer") / "bpe"
    seen = []
    train_tokenizer([str(corpus)], 300, out, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (corpus.stat().st_size,) * 2
    return out


@settings(deadline=None)
@given(st.text())
def test_byte_tokenizer_is_lossless_and_its_ids_are_bytes(text):
    ids = BYTES.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert bytes(ids) == text.encode()
    assert BYTES.decode(ids) == text


def test_byte_tokenizer_has_three_special_tokens_and_survives_saving(tmp_path):
    assert (BYTES.bos_token_id, BYTES.eos_token_id, BYTES.pad_token_id) == (256, 257, 258)
    facts = byte_facts()
    assert facts.vocab_size == vocabulary_size(BYTES) == len(BYTES) == 259
    assert (facts.bos, facts.eos) == (256, 257)
    np.testing.assert_array_equal(facts.token_bytes, token_bytes(BYTES))
    BYTES.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "na\u00efve  \u6f22\u5b57\n\t<|eos|> \U0001f600 "
    assert again.decode(again.encode(text)) == text
    assert again.encode("<|eos|>") == [257]
    assert again.padding_side == "left"
    assert tokenizer_facts(again).fingerprint == tokenizer_facts(BYTES).fingerprint


def test_trained_tokenizer_is_lossless_and_compresses(trained, corpus):
    tokenizer = load_tokenizer(str(trained))
    assert vocabulary_size(tokenizer) == 300
    text = corpus.read_text(encoding="utf-8")[:5000]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) < 0.6 * len(text)
    for other in ("\x00\u0416\U0001f600  ", " \n\n  x", "<|eos|>"):
        assert tokenizer.decode(tokenizer.encode(other)) == other
    assert load_tokenizer(str(trained / "tokenizer.json")).encode(text) == ids


def test_token_bytes_count_the_text(trained, corpus):
    tokenizer = load_tokenizer(str(trained))
    counts = token_bytes(tokenizer)
    assert counts is not None
    text = corpus.read_text(encoding="utf-8")[:3000]
    assert counts[tokenizer.encode(text)].sum() == len(text.encode())
    assert counts[tokenizer.eos_token_id] == 0


def test_training_the_same_text_gives_the_same_tokenizer(corpus, trained, tmp_path):
    train_tokenizer([str(corpus)], 300, tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()


def test_training_refuses(corpus, trained, tmp_path, caplog):
    with pytest.raises(DataError, match="at least 259"):
        train_tokenizer([str(corpus)], 258, tmp_path / "x")
    before = {one.name: one.read_bytes() for one in trained.iterdir()}
    with pytest.raises(FileExistsError, match="exists; name another folder"):
        train_tokenizer([str(corpus)], 300, trained)
    assert {one.name: one.read_bytes() for one in trained.iterdir()} == before
    (tmp_path / "bad.txt").write_bytes(b"a\x00")
    with pytest.raises(DataError, match="binary"):
        train_tokenizer([str(tmp_path / "bad.txt")], 300, tmp_path / "x")
    with caplog.at_level(logging.WARNING):
        (tmp_path / "small.txt").write_text("ab ab")
        assert len(train_tokenizer([str(tmp_path / "small.txt")], 1000, tmp_path / "small")) < 1000
    assert "supports a vocabulary of" in caplog.text
    assert sorted(one.name for one in tmp_path.iterdir()) == ["bad.txt", "small", "small.txt"]


@pytest.mark.parametrize("names", [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")])
def test_gpt2_files_are_read(trained, tmp_path, names):
    model = json.loads((trained / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    vocabulary = {("<|endoftext|>" if token == "<|eos|>" else token): i for token, i in model["vocab"].items()}
    (tmp_path / names[0]).write_text(json.dumps(vocabulary))
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"]), ""])
    (tmp_path / names[1]).write_text(merges, encoding="utf-8")
    tokenizer = load_tokenizer(str(tmp_path))
    text = "na\u00efve windows of attention\n"
    assert tokenizer.encode(text) == load_tokenizer(str(trained)).encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_token == "<|endoftext|>"


def gpt2_files(folder: Path, merges: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2, "c": 3, "abc": 4}))
    (folder / "merges.txt").write_text(merges)
    return folder


@pytest.mark.parametrize("end", ["\n\n", "\n\nab c\n", " \nab c", "\t\nab c", " 7\nab c 5\n", "\r\nab c\r\n"])
def test_gpt2_merges_may_have_empty_lines_and_more_behind_the_pair(tmp_path, end):
    tokenizer = load_tokenizer(str(gpt2_files(tmp_path, f"#version: 0.2\na b{end}")))
    assert tokenizer.encode("abc") == ([4] if "c" in end else [2, 3])


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="names are text there")
def test_gpt2_files_may_lie_where_no_text_names_them(tmp_path):
    folder = gpt2_files(tmp_path / os.fsdecode(b"\xff"), "a b\n")
    assert load_tokenizer(str(folder)).encode("ab") == [2]
    backend = load_tokenizer("bytes").backend_tokenizer.to_str()
    (folder / "other.json").write_text(backend, encoding="utf-8")
    assert load_tokenizer(str(folder / "other.json")).encode("a") == [97]


def test_bad_gpt2_files_are_named(tmp_path, monkeypatch):
    for merges, message in (("a\n", "list index"), ("a x\n", "out of vocabulary")):
        with pytest.raises(DataError, match=f"{re.escape(str(tmp_path))}: not GPT-2 tokenizer files: .*{message}"):
            load_tokenizer(str(gpt2_files(tmp_path, merges)))
    for content, message in ((b"\xff", "not UTF-8 text"), (b"{", "Expecting"), (b"[]", "Vocab"), (b'{"a": "b"}', "Vo")):
        (tmp_path / "vocab.json").write_bytes(content)
        with pytest.raises(DataError, match=f"not GPT-2 tokenizer files: .*{message}"):
            load_tokenizer(str(tmp_path))

    def fail(path: Path, **_: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", fail)
        with pytest.raises(PermissionError, match=r"Permission denied: '.*vocab\.json'"):
            load_tokenizer(str(tmp_path))
    (tmp_path / "merges.txt").unlink()
    (tmp_path / "merges.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"expected tokenizer\.json, encoder\.json \+ vocab\.bpe"):
        load_tokenizer(str(tmp_path))


def test_bad_tokenizers_are_named(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"no tokenizer at \./nowhere"):
        load_tokenizer("./nowhere")
    with pytest.raises(DataError, match=r"no tokenizer in this folder; expected tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"not a tokenizer\.json"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.json").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"not a tokenizer\.json: not UTF-8 text"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.json").rename(tmp_path / "tokenizer.model")
    monkeypatch.setattr("swat_lm.data.tokenizer.is_installed", lambda name: name != "sentencepiece")
    with pytest.raises(DataError, match="pip install sentencepiece"):
        load_tokenizer(str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match=r"cannot load tokenizer 'nobody/nothing': .*; HF_HUB_OFFLINE is set"):
        load_tokenizer("nobody/nothing")


def test_only_byte_level_text_may_be_cut():
    assert is_byte_level(json.dumps({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}}))
    sequence = {"type": "Sequence", "pretokenizers": [{"type": "Split"}, {"type": "ByteLevel"}]}
    assert is_byte_level(json.dumps({"pre_tokenizer": sequence}))
    assert not is_byte_level(json.dumps({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}))
    assert not is_byte_level(json.dumps({"pre_tokenizer": {"type": "Metaspace"}}))
    assert not is_byte_level(json.dumps({"pre_tokenizer": {"type": "ByteLevel"}, "normalizer": {"type": "NFC"}}))


@pytest.mark.parametrize("kind", ["ACGT", "\u6f22\u5b57", "ab12", "=", "\u0e01\u0e31\u0301", "\n ", "{[(,)]}"])
def test_training_takes_no_longer_words_than_it_says(kind: str, monkeypatch, caplog):
    monkeypatch.setattr(tokenizer_training, "LONGEST_WORD", 40)
    draw = random.Random(0)
    pieces = ["some words ", "".join(draw.choices(kind, k=1000)), " and a word of " + kind[0] * 30 + " letters"]
    with caplog.at_level(logging.INFO):
        parts = list(tokenizer_training.short_words(pieces))
    assert ["".join(one) for one in parts] == pieces
    assert (len(parts[0]), len(parts[2])) == (1, 1)
    split = BYTES_AND_WORDS.pre_tokenize_str
    # and the space before it
    assert max(end - start for part in parts[1] for _, (start, end) in split(part)) <= 41
    if len(parts[1]) > 1:
        assert caplog.messages == [
            "a run of letters and digits, of signs or of white space is learnt from in parts of 40 characters"
        ]


def test_training_on_text_without_white_space_takes_linear_time(tmp_path):
    draw = random.Random(0)
    (tmp_path / "dna.txt").write_text("".join(draw.choices("ACGT", k=200_000)))
    began = time.monotonic()
    tokenizer = train_tokenizer([str(tmp_path / "dna.txt")], 300, tmp_path / "made")
    # as words of 65,536 characters it would be a minute
    assert time.monotonic() - began < 15
    assert len(tokenizer.encode("ACGT" * 100)) < 300


def test_training_that_is_interrupted_leaves_nothing(tmp_path):
    (tmp_path / "dna.txt").write_text("".join(random.Random(0).choices("ACGT", k=3_000_000)))
    program = (
        "import sys; from swat_lm.cli.application import run_application;"
        "sys.exit(run_application(['tokenizer', 'dna.txt', '--vocab-size', '9000', '--out', 'new/made']))"
    )
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "learnt from in parts" in process.stderr.readline()
    # the library counts and merges, which takes a minute
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    assert process.stderr.read() == "interrupted\n"
    assert process.wait() == 130
    assert time.monotonic() - began < 3
    process.stderr.close()
    assert [one.name for one in tmp_path.iterdir()] == ["dna.txt"]
