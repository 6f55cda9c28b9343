"""Who may read what is written: as the umask says, not its owner alone; and the error of whoever may not."""

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from swat_lm.data import load_tokenizer, train_tokenizer
from swat_lm.model.conversion import convert_folder
from swat_lm.model.loading import load_causal_lm
from swat_lm.model.state import load_state, save_state

from .models import tiny_model

LLAMA = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


def modes(path: Path) -> dict[str, str]:
    found = [path, *path.rglob("*")] if path.is_dir() else [path]
    return {one.name: oct(stat.S_IMODE(one.stat().st_mode) & (0o777 if one.is_dir() else 0o666)) for one in found}


@pytest.mark.parametrize(("umask", "file", "folder"), [(0o022, "0o644", "0o755"), (0o007, "0o660", "0o770")])
def test_the_umask_says_who_may_read_what_is_written(cli, here: Path, umask: int, file: str, folder: str):
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(here / "llama")
    before = os.umask(umask)
    try:
        assert cli("train", "run.yaml", "train.steps=1", "out=run").code == 0
        convert_folder(here / "llama", here / "converted")
        save_state(tiny_model().init_state(), here / "x.state")
        train_tokenizer(["text"], 270, here / "tokenizer")
    finally:
        os.umask(before)
    for written in ("run", "converted", "x.state", "tokenizer", "tokens"):
        assert set(modes(here / written).values()) <= {file, folder}, modes(here / written)
    for written in ("run/export", "converted"):
        assert modes(here / written)["model.safetensors"] == file
    assert not list(here.rglob("*.new"))


@contextmanager
def as_somebody() -> Iterator[None]:
    """With the rights of a user who is not root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_what_may_not_be_read_is_not_called_absent():
    # pytest's own folders are closed to others
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o755)
        tiny_model().save_pretrained(folder / "model")
        load_tokenizer("bytes").save_pretrained(folder / "model")
        save_state(tiny_model().init_state(), folder / "x.state")
        for one in (folder / "model" / "model.safetensors", folder / "x.state"):
            one.chmod(0)
        with as_somebody():
            with pytest.raises(PermissionError, match=r"model\.safetensors"):
                load_causal_lm(str(folder / "model"), "cpu")
            with pytest.raises(PermissionError, match=r"x\.state"):
                load_state(folder / "x.state")
    finally:
        shutil.rmtree(folder)
