"""`swat-lm generate` as a stranger uses it: prompts of any bytes, states that go on, interruptions."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from swat_lm import SwatConfig, SwatForCausalLM
from swat_lm.cli.application import run_application
from swat_lm.data import load_tokenizer


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
        code = run_application([str(one) for one in arguments])
        return code, *capfd.readouterr()

    return call


def test_a_state_that_grows_in_blocks_is_not_called_constant(cli, windowed: Path, tmp_path: Path):
    full = save_model(tmp_path / "full", None)
    code, _, err = cli("generate", full, "--prompt", "a", "-n", 20, "--ignore-end")
    assert code == 0
    sizes = [words.split()[0] for words in err.removeprefix("state: ").split("read, ")]
    assert sizes[0] == sizes[1]
    assert "(grows with every token: the model has full-attention layers)" in err
    assert "constant" not in err
    assert "(constant)" in cli("generate", windowed, "--prompt", "a", "-n", 20)[2]
