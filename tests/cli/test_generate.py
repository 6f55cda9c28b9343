"""`swat-lm generate` as a stranger uses it: prompts of any bytes, states that go on, interruptions."""

import io
import os
import signal
from pathlib import Path

import pytest
import torch

from swat_lm import SwatConfig, SwatForCausalLM
from swat_lm.cli.application import run_application
from swat_lm.data import load_tokenizer
from swat_lm.model.state import load_state, save_state


def save_model(folder: Path, window: int | None) -> Path:
    """A small untrained model with the byte tokenizer."""
    torch.manual_seed(0)
    config = SwatConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        sliding_window=window, max_position_embeddings=64,
    )  # fmt: skip
    SwatForCausalLM(config).save_pretrained(folder)
    load_tokenizer("bytes").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers have windows."""
    return save_model(tmp_path_factory.mktemp("windowed") / "export", 8)


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Call the command line in this process and an empty folder; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = run_application([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return call


def last_line(text: str) -> str:
    """What was said last; libraries that another test has loaded may draw bars before."""
    return text.rstrip("\n").rpartition("\n")[2]


def test_a_state_that_grows_in_blocks_is_not_called_constant(cli, windowed: Path, tmp_path: Path):
    full = save_model(tmp_path / "full", None)
    code, _, err = cli("generate", full, "--prompt", "a", "-n", 20, "--ignore-end")
    assert code == 0
    said = err[err.index("state: ") :]
    sizes = [words.split()[0] for words in said.removeprefix("state: ").split("read, ")]
    assert sizes[0] == sizes[1]
    assert "(grows with every token: the model has full-attention layers)" in err
    assert "constant" not in err
    assert "(constant)" in cli("generate", windowed, "--prompt", "a", "-n", 20)[2]


def test_a_prompt_that_is_not_text_is_one_line(cli, windowed: Path):
    code, out, err = cli("generate", windowed, "--prompt", os.fsdecode(b"b\xc3\xa4d \xff\xfe"))
    assert (code, out, err) == (2, "", "error: --prompt is not UTF-8 text (byte 5)\n")


def test_a_stopped_generation_simply_goes_on(cli, windowed: Path):
    greedy = ("--temperature", 0, "--ignore-end")
    whole = cli("generate", windowed, "--prompt", "the ", "-n", 12, *greedy)[1]
    first = cli("generate", windowed, "--prompt", "the ", "-n", 5, *greedy, "--save-state", "one.state")[1]
    code, second, _ = cli(
        "generate", windowed, "-n", 0, *greedy, "--load-state", "one.state", "--save-state", "two.state"
    )
    assert (code, second) == (0, "\n")
    code, third, err = cli("generate", windowed, "-n", 7, *greedy, "--load-state", "two.state")
    assert code == 0, err
    assert (first[:-1] + third).replace("\ufffd", "") == whole.replace("\ufffd", "")


def test_a_state_without_logits_still_asks_for_a_prompt(cli, windowed: Path, tmp_path: Path):
    model = SwatForCausalLM.from_pretrained(windowed)
    state = model.init_state()
    logits, _ = model.prefill(torch.tensor([[1, 2, 3]]), state)
    save_state(state, tmp_path / "old.state")
    code, _, err = cli("generate", windowed, "--load-state", "old.state")
    assert code == 2
    assert last_line(err) == "error: nothing to continue: give --prompt, the text that follows the state"
    state.logits = logits[:, :100]
    save_state(state, tmp_path / "foreign.state")
    assert "belongs to another model" in cli("generate", windowed, "--load-state", "foreign.state")[2]
    # what is read makes them obsolete
    model.decode_step(torch.tensor([[4]]), state)
    assert state.logits is None


class InterruptedPipe(io.BytesIO):
    """A pipe that brings one text and then waits for ever; Ctrl-C is pressed meanwhile."""

    def read1(self, size: int | None = -1, /) -> bytes:
        """All of it, then an interruption."""
        text = self.read()
        if not text:
            signal.raise_signal(signal.SIGINT)
        return text


def test_an_interruption_of_reading_saves_the_state(cli, windowed: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(InterruptedPipe(b"one line\nand another")))
    code, out, err = cli("generate", windowed, "--prompt", "-", "--save-state", "x.state")
    assert (code, out) == (130, "\n"), err
    assert "bytes after 20 (constant)" in err
    assert "state saved: --load-state x.state goes on after it" in err
    assert load_state(tmp_path / "x.state").logits is not None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert cli("generate", windowed, "-n", 2, "--load-state", "x.state")[0] == 0


def test_an_interruption_of_writing_saves_the_state(cli, windowed: Path, tmp_path: Path, monkeypatch):
    written, number = [], signal.SIGINT

    def write(text: str) -> None:
        written.append(text)
        if len(written) == 3:
            signal.raise_signal(number)

    monkeypatch.setattr("swat_lm.cli.generation.write", write)
    code, _, err = cli(
        "generate", windowed, "--prompt", "ab", "--ignore-end", "-n", 10_000_000, "--save-state", "x.state"
    )
    assert code == 130, err
    assert "state saved" in err
    assert int(load_state(tmp_path / "x.state").position) == 2 + 3
    # a terminal that is closed, too
    written.clear()
    number = getattr(signal, "SIGHUP", signal.SIGTERM)
    assert cli("generate", windowed, "-p", "a", "--ignore-end", "-n", 10**7, "--save-state", "h.state")[0] == 130
    assert (tmp_path / "h.state").exists()
    written.clear()
    number = signal.SIGINT
    # nobody asked for the state: as before
    code, _, err = cli("generate", windowed, "--prompt", "ab", "--ignore-end", "-n", 10_000_000)
    assert (code, last_line(err)) == (130, "interrupted")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(InterruptedPipe(b"")))
    code, out, err = cli("generate", windowed, "--prompt", "-", "--save-state", "y.state")
    assert (code, out, last_line(err)) == (130, "", "interrupted")
    assert not (tmp_path / "y.state").exists()
