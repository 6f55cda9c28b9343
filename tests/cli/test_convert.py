"""`swat-lm convert` and what costs its plans have, as a stranger uses them: a GGUF file, a chat, wrong words."""

import os
import re
import signal
import tempfile
import time
from pathlib import Path

import pytest
from transformers import Gemma2Config, Qwen2Config

from swat_lm import SwatForCausalLM
from swat_lm.cli.application import run_application
from swat_lm.data import load_tokenizer
from swat_lm.model import cost

from ..model.gguf_files import tiny_llama, write_gguf


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Call the command line in a folder with a GGUF file; returns exit code, stdout, last line of stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    write_gguf(tmp_path / "tiny.gguf", tiny_llama())

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = run_application([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return code, out, err.rstrip("\n").rpartition("\n")[2]

    return call


def test_from_a_gguf_file_to_a_chat(cli):
    options = ("--window", 16, "--full-layers", "every:2", "--dtype", "bfloat16")
    assert cli("convert", "tiny.gguf", "out", *options)[:2] == (0, "out\n")
    # the template writes <|im_start|>the<|im_end|>, three tokens
    code, _, said = cli("generate", "out", "--chat", "--prompt", "the", "-n", 1, "--seed", 1)
    assert (code, "after 3 tokens read" in said) == (0, True)
    assert "a GGUF file: make a folder of it first, `swat-lm convert tiny.gguf OUT`" in cli("info", "tiny.gguf")[2]
    assert "--chat takes one message" in cli("generate", "out", "--chat", "--prompt", "-")[2]
    Path("out/chat_template.jinja").unlink()
    assert "the tokenizer of out has no chat template" in cli("generate", "out", "--chat", "--prompt", "the")[2]
    other = ("--chat", "--prompt", "the", "--tokenizer", "tokens")
    load_tokenizer("bytes").save_pretrained("tokens")
    said = cli("generate", "out", *other)[2]
    assert "the tokenizer tokens has no chat template: leave --chat out, or give another one" in said


def test_a_conversion_that_is_terminated_leaves_nothing(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    found = []

    def from_pretrained(folder: str, **_: object) -> None:
        found.extend(Path("temporary").iterdir())
        os.kill(os.getpid(), signal.SIGTERM)
        # the signal is heard before this ends
        time.sleep(10)

    monkeypatch.setattr("swat_lm.model.gguf.AutoModelForCausalLM.from_pretrained", from_pretrained)
    with pytest.raises(SystemExit) as left:
        cli("convert", "tiny.gguf", "out")
    assert (left.value.code, len(found), list(Path("temporary").iterdir())) == (143, 1, [])
    assert {entry.name for entry in tmp_path.iterdir()} == {"tiny.gguf", "temporary"}
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_what_plans_cost(cli):
    assert cli("convert", "tiny.gguf", "out", "--window", 16, "--full-layers", "last")[0] == 0
    code, out, err = cli("info", "out", "--plans", "--length", 1000, "--full-layers", "0,1")
    assert code == 0, err
    config = SwatForCausalLM.from_pretrained("out").config
    rows = {line[:10].strip(): line.split()[-4:] for line in out.splitlines()[2:]}
    assert rows["as it is"][:3] == rows["last"][:3] == ["1", "2", f"{cost.state_bytes(config, context=1000):,}"]
    # 2 heads of 16 channels, keys and values, 2 bytes each
    assert rows["all full"][:3] == ["3", "0", f"{3 * 1000 * 128:,}"]
    assert rows["none"][:3] == ["0", "3", f"{3 * 16 * 128:,}"]
    assert rows["0,1"][:2] == ["2", "1"]
    assert "--plans" in cli("info", "out", "--window", 8)[2]
    # of the two first tokens nothing is left where all layers are full
    assert cli("convert", "tiny.gguf", "kept", "--window", 16, "--sinks", 2)[0] == 0
    code, out, err = cli("info", "kept", "--plans", "--length", 1000, "--full-layers", "every:1")
    assert code == 0, err
    kept = {line[:10].strip(): line.split()[-4:] for line in out.splitlines()[2:]}
    assert kept["all full"] == kept["every:1"] == rows["all full"]
    assert kept["none"] == kept["as it is"] != rows["none"]
    assert "reach  46 tokens and the first 2" in re.sub(" {2,}", "  ", cli("info", "kept")[1])
    bytes_model = ("own-text", "data.tokenizer=bytes", "model.layers=[mamba2]")
    assert "no layer of attention" in cli("info", *bytes_model, "--plans")[2]


@pytest.mark.parametrize("kind", [Qwen2Config, Gemma2Config])
def test_what_plans_cost_for_models_of_others(cli, kind):
    theirs = kind(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2)
    theirs.num_key_value_heads, theirs.head_dim = 1, 16
    theirs.save_pretrained("theirs")
    code, out, err = cli("info", "theirs", "--plans", "--window", 8, "--length", 1000)
    assert code == 0, err
    rows = {line[:10].strip(): line.split()[-4:] for line in out.splitlines()[2:]}
    assert rows["every:2"][:3] == ["2", "2", f"{2 * (1000 + 8) * 64:,}"]
    assert "whose costs are not known here" in cli("info", "theirs")[2]


def test_wrong_words_leave_nothing_behind(cli):
    cases = {
        ("--full-layers", "every:4", "--window", 8): "full_layers: 'every:4': expected a whole number from 1 to 3",
        ("--full-layers", "last"): "chooses among layers with a window, and this model has none",
        ("--full-layers", "every:1", "--window", 8, "--sinks", 2): "full_layers 'every:1' leaves no layer one",
        ("--dtype", "int8"): "--dtype: expected auto, float32, bfloat16, float16; got 'int8'",
        ("--set", "full_layers=last"): "--set full_layers=last: give these layers by --full-layers",
    }
    for options, message in cases.items():
        code, _, said = cli("convert", "tiny.gguf", "out", *options)
        assert code == 2
        assert message in said
    Path("link").symlink_to("gone")
    assert (
        "link is not a checkpoint folder or a GGUF file; link is a link to gone, which does not exist"
        in cli("convert", "link", "out")[2]
    )
    assert "source: the name is empty" in cli("convert", "", "out")[2]
    assert {entry.name for entry in Path().iterdir()} == {"tiny.gguf", "link"}
