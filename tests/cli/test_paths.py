"""`~` in every path, homes that nobody knows, names that are no text, and a current directory that was removed."""

import os
from pathlib import Path

import pytest

from swat_lm.model.state import load_state


@pytest.mark.parametrize(
    "arguments",
    [
        ("info", "~nobody-here/x"),
        ("info", "~nobody-here/x.yaml"),
        ("generate", "~nobody-here/x"),
        ("generate", "model", "--save-state", "~nobody-here/x"),
        ("generate", "model", "--load-state", "~nobody-here/x"),
        ("prepare", "~nobody-here/x"),
        ("prepare", "text", "--cache", "~nobody-here/x"),
        ("prepare", "text", "--tokenizer", "~nobody-here/x"),
        ("tokenizer", "text", "--out", "~nobody-here/x"),
        ("train", "run.yaml", "out=~nobody-here/x"),
        ("train", "run.yaml", "train.resume=~nobody-here/x"),
        ("report", "~nobody-here/x", "--out", "page"),
        ("convert", "~nobody-here/x", "out"),
        ("demo", "--out", "~nobody-here/x"),
        ("reproduce", "table3", "--scale", "tiny", "--out", "~nobody-here/x"),
        ("evaluate", "tasks", "~nobody-here/x", "--data", "."),
    ],
    ids=" ".join,
)
def test_the_home_of_nobody_is_one_line(cli, here: Path, arguments: tuple[str, ...]):
    ran = cli(*arguments)
    assert ran.code == 2, ran.err
    assert "error: " in ran.err
    assert "~nobody-here/x" in ran.err
    assert "there is no user nobody-here here; write the path without ~" in ran.err
    assert len(ran.err.splitlines()) == 1


def test_a_tilde_is_the_home_folder_wherever_a_path_is_given(cli, here: Path, exported: Path, monkeypatch):
    home = here / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    (home / "model").symlink_to(exported)
    (home / "run.yaml").write_text((here / "run.yaml").read_text())
    assert cli("generate", "~/model", "-n", 1, "--save-state", "~/s").code == 0
    assert load_state(home / "s").logits is not None
    assert cli("train", "~/run.yaml", "out=~/run", "train.steps=2").code == 0
    assert cli("train", "~/run.yaml", "out=more", "train.steps=2", "train.resume=~/run").code == 0
    assert cli("report", "~/run", "--out", "~/page").code == 0
    assert cli("tokenizer", "text", "--vocab-size", 260, "--out", "~/tokens").code == 0
    assert {path.name for path in home.iterdir()} == {"model", "run.yaml", "s", "run", "page", "tokens"}
    assert not (here / "~").exists()


def test_no_home_at_all(cli, here: Path, monkeypatch):
    def nobody(_: int) -> None:
        raise KeyError

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    ran = cli("info", "~/x")
    assert ran.err.startswith("error: ~/x: HOME is not set and this user has no home folder; write the path without ~")
    ran = cli("prepare", "text")
    assert ran.code == 2
    assert ran.err.startswith("error: nowhere to keep prepared tokens: HOME is not set")
    assert cli("prepare", "text", "--cache", "kept").code == 0


def test_names_that_are_no_text_are_refused_before_any_work(cli, here: Path, exported: Path):
    name = os.fsdecode(b"b\xff")
    (here / name).symlink_to(exported)
    (here / f"{name}.yaml").write_text((here / "run.yaml").read_text())
    for arguments, what in (
        (("generate", name, "-n", 1), "the checkpoint's folder"),
        (("generate", exported, "-n", 1, "--save-state", name + "s"), "--save-state"),
        (("train", f"{name}.yaml"), "name"),
        (("report", exported, "--out", name + "s"), "--out"),
        (("tokenizer", "text", "--vocab-size", 260, "--out", name + "s"), "--out"),
    ):
        ran = cli(*arguments)
        assert ran.code == 2
        assert f"{what} 'b\\udcff" in ran.err.splitlines()[-1]
        assert "is not UTF-8 (byte 1)" in ran.err
    assert not (here / "runs").exists()
    # text is read from anywhere
    (here / "text" / f"{name}.txt").write_text("some text\n")
    assert cli("prepare", "text", "--cache", "kept").code == 0


def test_a_current_directory_that_was_removed(cli, here: Path, monkeypatch):
    (here / "gone").mkdir()
    monkeypatch.chdir(here / "gone")
    (here / "gone").rmdir()
    ran = cli("info", "swat-340m")
    assert (ran.code, ran.err) == (2, "error: the current directory was removed: change to another one\n")
    monkeypatch.chdir(here)
