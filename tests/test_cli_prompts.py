"""`swat-lm generate`: prompts from a pipe, states, what does not belong together, and how text is cut to be read."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch

from swat_lm import SwatForCausalLM
from swat_lm.cli.generation import text_pieces
from swat_lm.data import load_tokenizer

from .test_cli import files_of


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
    for one in exported.iterdir():
        (broken / one.name).write_bytes(one.read_bytes())
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    assert "weights and configuration do not fit" in cli("generate", broken, "--prompt", "a").err
    (broken / "config.json").write_text(
        json.dumps({**config, "num_hidden_layers": 3, "layer_types": None, "mixers": None})
    )
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
    assert [one.name for one in (here / "new" / "deep").iterdir()] == ["x.state"]


class Arriving(io.BytesIO):
    """A pipe whose reader gets these pieces."""

    def __init__(self, pieces: list[bytes]) -> None:
        super().__init__()
        self.left = list(pieces)

    def read1(self, size: int | None = -1, /) -> bytes:
        """The next piece."""
        return self.left.pop(0) if self.left else b""


def test_text_pieces_keep_every_character():
    text = "na\u00efve \u20ac\n" * 5000 + "no end"
    source = io.BufferedReader(io.BytesIO(text.encode()), 64)
    pieces = list(text_pieces(source, whole=False))
    assert "".join(pieces) == text
    assert all(piece.endswith("\n") for piece in pieces[:-1])
    assert len(pieces) > 1
    assert max(map(len, pieces)) <= 1 << 17
    assert list(text_pieces(io.BufferedReader(io.BytesIO(b"a\nb")), whole=True)) == ["a\nb"]


def test_how_a_prompt_arrives_does_not_change_its_pieces_without_line_breaks():
    text = ("x" * 37 + "\n\n" + "y" * 12 + "\nz z\n  w") * 40
    cut = {}
    for size in (1, 7, 50, len(text)):
        arriving = Arriving([text[at : at + size].encode() for at in range(0, len(text), size)])
        pieces = list(text_pieces(arriving, whole=False, longest=10))
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= 10
        at = 0
        forced = []
        for piece in pieces[:-1]:
            at += len(piece)
            if not (text[at - 1] == "\n" and text[at - 2].strip() and text[at].strip()):
                forced.append(at)
        cut[size] = forced
    assert cut[1]
    assert cut[1] == cut[7] == cut[50] == cut[len(text)]


def test_how_a_prompt_arrives_does_not_change_its_tokens(cli, here: Path):
    (here / "code.py").write_text(
        "def f(x):\n    if x:\n        return 1\n\n    return 2\n\n\nclass A:\n    y = 1\n" * 9
    )
    assert cli("tokenizer", "code.py", "--vocab-size", 320, "--out", "made").code == 0
    tokens = load_tokenizer("made")
    text = (here / "code.py").read_text()
    expected = tokens.encode(text, add_special_tokens=False)
    lines = [line.encode() for line in text.splitlines(keepends=True)]
    for arriving in (lines, [text.encode()], [bytes([one]) for one in text.encode()]):
        pieces = list(text_pieces(Arriving(arriving), whole=False))
        assert [token for piece in pieces for token in tokens.encode(piece, add_special_tokens=False)] == expected
    assert len(list(text_pieces(Arriving(lines), whole=False))) == 9


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
        expected = next((at + 1 for at, one in enumerate(drawn) if one in stop), 40)
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
