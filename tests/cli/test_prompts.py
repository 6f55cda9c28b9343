"""`swat-lm generate`: prompts from a pipe, states, what does not belong together, and how text is cut to be read."""

import io
import json
import os
import shutil
import signal
import threading
import time
import types
from itertools import chain
from pathlib import Path

import pytest
import torch
from tokenizers import processors

from swat_lm import SwatForCausalLM
from swat_lm.cli.generation import PIECE_BYTES, SavingInterruption, arriving, prompt_pieces, whole_text
from swat_lm.data.cutting import Cutter
from swat_lm.data.tokenizer import EOS, wrap
from tests.cli.test_commands import files_of
from tests.data.trained import trained


def test_a_prompt_may_be_beyond_the_encoding_of_the_locale(monkeypatch: pytest.MonkeyPatch):
    # as Latin-1 has it, and ASCII, whose arguments are kept byte by byte
    for encoding in ("latin-1", "ascii"):
        monkeypatch.setattr("os.fsencode", lambda text, encoding=encoding: text.encode(encoding, "surrogateescape"))
        assert whole_text("\u6f22\xe9", "--prompt") == "\u6f22\xe9"
    assert whole_text("\xe9".encode().decode("ascii", "surrogateescape"), "--prompt") == "\xe9"


def test_generate_reads_a_pipe_and_saves_its_state(cli, here: Path, exported: Path, monkeypatch: pytest.MonkeyPatch):
    text = "line of text\n" * 400
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    piped = cli("generate", exported, "--prompt", "-", "-n", 6, "--temperature", 0)
    given = cli(
        "generate", exported, "--prompt", text, "-n", 6, "--temperature", 0, "--save-state", "state.safetensors"
    )
    assert piped.out == given.out
    assert "5,200 tokens read" in piped.err
    assert "exists" in cli("generate", exported, "--prompt", "a", "--save-state", "state.safetensors").err

    continued = cli(
        "generate", exported, "--prompt", "x", "-n", 4, "--temperature", 0, "--load-state", "state.safetensors"
    )
    assert "5,207 tokens read" in continued.err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"abc\xff\xfe")))
    assert "stdin is not UTF-8 text (byte 3)" in cli("generate", exported, "--prompt", "-").err


def test_generate_refuses_what_does_not_belong_together(cli, here: Path, exported: Path):
    assert cli("tokenizer", "text", "--vocab-size", 270, "--out", "made").code == 0
    assert "has 270 ids" in cli("generate", exported, "--prompt", "a", "--tokenizer", "made").err
    assert "top_k" in cli("generate", exported, "--prompt", "a", "--top-k", 0).err
    broken = here / "broken"
    broken.mkdir()
    for path in exported.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    assert "weights and configuration do not fit" in cli("generate", broken, "--prompt", "a").err
    (broken / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3, "layer_types": None}))
    assert "missing keys" in cli("generate", broken, "--prompt", "a").err
    (broken / "config.json").write_text(json.dumps(config))
    (broken / "model.safetensors").write_bytes((exported / "model.safetensors").read_bytes()[:900])
    assert "damaged or cut short" in cli("generate", broken, "--prompt", "a").err
    for model_type, message in (("llama", "convert it first"), ("gpt2", "type 'gpt2'")):
        (broken / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
        assert message in cli("generate", broken, "--prompt", "a").err
    (broken / "config.json").write_text("{")
    assert "not a model configuration" in cli("generate", broken, "--prompt", "a").err


def test_where_a_state_goes_is_tried_before_any_work(cli, here: Path, exported: Path):
    before = files_of(here)
    for place in ("run.yaml/x.state", "new/" + "x" * 254):
        ran = cli("generate", "nothing", "--prompt", "a", "--save-state", place)
        assert ran.code == 2
        assert ran.err.startswith(f"error: cannot write --save-state {place}: ")
        assert ran.err.count("\n") == 1
    assert files_of(here) == before
    assert not (here / "new").exists()
    # a good place is left as it was, too, when the work fails
    assert "no checkpoint at nothing" in cli("generate", "nothing", "--save-state", "new/deep/x.state").err
    assert not (here / "new").exists()
    assert cli("generate", exported, "--prompt", "a", "-n", 1, "--save-state", "new/deep/x.state").code == 0
    assert [path.name for path in (here / "new" / "deep").iterdir()] == ["x.state"]


class Arriving(io.BytesIO):
    """A pipe whose reader gets these pieces."""

    def __init__(self, pieces: list[bytes]) -> None:
        super().__init__()
        self.left = list(pieces)

    def read1(self, size: int | None = -1, /) -> bytes:
        """The next piece."""
        return self.left.pop(0) if self.left else b""


def test_text_that_arrives_keeps_every_character():
    text = "na\u00efve \u20ac\n" * 5000 + "no end"
    source = io.BufferedReader(io.BytesIO(text.encode()), 64)
    assert "".join(arriving(lambda: source.read1(PIECE_BYTES))) == text
    for bits in ([b"a\xe2", b"\x82", b"("], [b"a\xe2\x82("], [b"a", b"\xe2\x82"]):
        with pytest.raises(ValueError, match=r"stdin is not UTF-8 text \(byte 1\)"):
            list(arriving(Arriving(bits).read1))


def prompt_tokens(tokens, text: str | list[bytes], monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The token ids of a prompt given whole or, as bytes, by a pipe."""
    with SavingInterruption(active=False) as interruption:
        if isinstance(text, str):
            return list(prompt_pieces(tokens, text, True, interruption))
        monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=Arriving(text)))
        return list(prompt_pieces(tokens, "-", True, interruption))


def test_how_a_prompt_arrives_does_not_change_its_tokens(monkeypatch, capfd):
    text = "".join(f"/api/v1/items/{number}: ok.\n" for number in range(30)) + "the end<|eos|>"
    for form, is_cut in (("ByteLevel", True), ("o200k", True), ("no regex", False), ("Metaspace", False)):
        tokens = wrap(trained(form, text), eos_token=EOS)
        whole = tokens.encode(text)
        assert whole[-1] == tokens.eos_token_id
        lines = [line.encode() for line in text.splitlines(keepends=True)]
        bits = [bytes([byte]) for byte in text.encode()]
        capfd.readouterr()
        most = 0
        for given in (text, [text.encode()], lines, bits):
            pieces = prompt_tokens(tokens, given, monkeypatch)
            assert [*chain(*pieces)] == whole, (form, given)
            most = max(most, len(pieces))
        assert (most > 1) == is_cut
        said = "this tokenizer must see a text whole: the prompt is read to its end first" in capfd.readouterr().err
        assert said != is_cut


def test_a_long_prompt_without_a_place_to_cut_is_cut_alike_however_it_arrives(monkeypatch):
    monkeypatch.setattr(Cutter.__init__, "__defaults__", (50, False))
    tokens = wrap(trained("ByteLevel", "ACGTACCGT" * 40), eos_token=EOS)
    text = "ACCGTACG" * 30 + "\nx\n" + "TTAC" * 30
    expected = prompt_tokens(tokens, text, monkeypatch)
    assert max(map(len, expected)) <= 50
    for size in (1, 7, 60):
        bits = [text[at : at + size].encode() for at in range(0, len(text), size)]
        assert [*chain(*prompt_tokens(tokens, bits, monkeypatch))] == [*chain(*expected)]


def test_a_prompt_is_not_closed_but_keeps_the_end_it_has(monkeypatch):
    backend = trained("ByteLevel", "some text")
    plain = wrap(backend, eos_token=EOS)
    (end,) = plain.encode(EOS)
    assert prompt_tokens(plain, "text" + EOS, monkeypatch) == [[*plain.encode("text"), end]]
    backend.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, end)])
    closing = wrap(backend, eos_token=EOS)
    assert closing.encode("text") == [*plain.encode("text"), end]
    assert prompt_tokens(closing, "text", monkeypatch) == [plain.encode("text")]


@pytest.mark.parametrize("saving", [False, True])
def test_a_long_text_that_is_tokenised_hears_an_interruption(monkeypatch, saving: bool):
    tokens = wrap(trained("no regex", "some text"), eos_token=EOS)

    def endless(*_: object, **__: object) -> list[int]:
        time.sleep(60)
        return [0]

    monkeypatch.setattr(tokens, "encode", endless)
    # sent to the process, as a terminal does
    signals = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    began = time.monotonic()
    signals.start()
    with SavingInterruption(active=saving) as interruption:
        pieces = prompt_pieces(tokens, "x" * (1 << 17), True, interruption)
        if saving:
            assert list(pieces) == []
        else:
            with pytest.raises(KeyboardInterrupt):
                list(pieces)
    assert interruption.requested == saving
    assert time.monotonic() - began < 10


def with_ends(source: Path, folder: Path, **ends: object) -> Path:
    """A copy of a model whose files name these end tokens: `config` or `generation_config`."""
    shutil.copytree(source, folder)
    for name in ("config", "generation_config"):
        path = folder / f"{name}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": ends.get(name)}))
    return folder


def test_a_text_ends_at_every_end_token_of_the_model(cli, here: Path, exported: Path):
    """As the model's own `generate` does, where that stops at all."""
    torch.manual_seed(0)
    greedy = ("-p", "abc", "-n", 40, "--temperature", 0)
    model = SwatForCausalLM.from_pretrained(exported)
    prompt = torch.tensor([list(b"abc")])
    drawn = model.generate(prompt, max_new_tokens=40, do_sample=False)[0, 3:].tolist()
    # untrained models soon repeat themselves; these are the first places of two of their tokens
    first, second = drawn[2], drawn[4]
    both = [257, second, first]
    of_each = {
        "generation": ({"generation_config": both}, both),
        "one": ({"generation_config": second, "config": both}, [second]),
        "configuration": ({"config": both}, both),
        "neither": ({}, [257]),
    }
    for name, (ends, stop) in of_each.items():
        folder = with_ends(exported, here / name, **ends)
        ran = cli("generate", folder, *greedy)
        expected = next((at + 1 for at, token in enumerate(drawn) if token in stop), 40)
        assert ran.code == 0, ran.err
        assert f"after {3 + expected - 1} (constant)" in ran.err, name
        if "generation_config" in ends:
            made = SwatForCausalLM.from_pretrained(folder).generate(prompt, max_new_tokens=40, do_sample=False)
            assert made.shape[1] == 3 + expected
    # a stream goes on after its end, and an end within a prompt ends nothing
    assert cli("generate", here / "generation", *greedy, "--save-state", "s").code == 0
    assert cli("generate", here / "generation", "-n", 3, "--load-state", "s", "--ignore-end").code == 0
    ran = cli("generate", here / "generation", "-p", "abc" + chr(46) * 3, "-n", 1)
    assert (ran.code, "6 tokens read" in ran.err) == (0, True)
    assert "after 42 (constant)" in cli("generate", here / "generation", *greedy, "--ignore-end").err
