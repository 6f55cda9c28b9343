"""Which text the evaluating commands read: never unnoticed what the model was trained on."""

import json
import shutil
from pathlib import Path

import pytest

ONLY_HELD_OUT = "note: reading only what the run held out of this text (1 document); left out: 5 documents of 6"


def test_trained_text_is_left_out_however_it_is_named(cli, here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))
    monkeypatch.setenv("HOME", str(here))
    assert cli("train", "run.yaml", "train.steps=2", "data.sources=~/text").code == 0
    shutil.copytree("text", "copy")
    Path("link").symlink_to("text")
    shutil.copytree("runs/run/export", "moved")
    rows = [json.dumps({"text": path.read_text()}) for path in sorted(Path("text").iterdir())]
    Path("rows.jsonl").write_text("\n".join(rows) + "\n")
    (here / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")

    asked = ("evaluate", "length", "../runs/run", "--lengths", "64", "--data")
    figures = cli(*asked, "../text").out
    for data in ("../copy", here / "link", "../rows.jsonl"):
        ran = cli(*asked, data)
        assert ONLY_HELD_OUT in ran.err, ran.err
        assert ran.out == figures
    assert cli("evaluate", "length", "../moved", *asked[3:], "../copy").out == figures
    for command in ("reach", "diagnose"):
        ran = cli("evaluate", command, "../runs/run", "--length", 32, "--data", "../copy")
        assert (ran.code, ONLY_HELD_OUT in ran.err) == (0, True), ran.err

    # one file is either trained on, and refused, or held out
    single = [cli(*asked, f"../text/{number}.txt") for number in range(6)]
    assert sorted(ran.code for ran in single) == [0, 2, 2, 2, 2, 2]
    (held,) = [ran for ran in single if ran.code == 0]
    assert held.out == figures
    learnt = next(number for number, ran in enumerate(single) if ran.code == 2)
    assert "the model was trained on this text: on all of it" in single[learnt].err
    assert "--held-out 0" in single[learnt].err
    whole = cli(*asked, f"../text/{learnt}.txt", "--held-out", 0)
    assert whole.code == 0
    assert "the model was trained on this text: on 1 document of 1" in whole.err

    # new text is read beside what was held out, and as all other text where there is nothing else
    Path("new.txt").write_text("quite other words than any of those before\n" * 9)
    assert "(1 document) and 1 new to the model" in cli(*asked, "../text", "--data", "new.txt").err
    assert "note" not in cli(*asked, "new.txt").err
    assert "another share would hold" in cli(*asked, "../copy", "--held-out", 0.9).err


def test_runs_of_earlier_versions_are_known_by_their_tokens(cli, here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))
    assert cli("train", "run.yaml", "train.steps=2").code == 0
    for folder in ("runs/run", "runs/run/export"):
        (here / folder / "trained_text.npz").unlink()
    shutil.copytree("text", "copy")
    asked = ("evaluate", "length", "runs/run", "--lengths", "64", "--data", "copy")
    assert ONLY_HELD_OUT in cli(*asked).err
    shutil.rmtree("tokens")
    # made again from where the recipe says
    assert ONLY_HELD_OUT in cli(*asked).err
    shutil.rmtree("cache")
    (here / "text").rename("gone")
    ran = cli(*asked)
    assert ran.code == 0
    assert "which kept no record of its text, and its tokens are gone: text that the model was trained on is" in ran.err


def test_what_an_earlier_run_was_trained_on_counts(cli, here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))
    assert cli("train", "run.yaml", "train.steps=2", "data.held_out=0").code == 0
    (here / "other.txt").write_text("quite other words than any of those before\n" * 9)
    again = (
        "train",
        "run.yaml",
        "out=runs/second",
        "train.resume=runs/run",
        "train.steps=4",
        "data.sources=other.txt",
        "data.held_out=0.3",
    )
    assert cli(*again).code == 0
    for data in ("text", "text/0.txt"):
        assert "on all of it" in cli("evaluate", "length", "runs/second", "--data", data).err
    assert (
        "the beginning of 1 document" in cli("evaluate", "length", "runs/second", "-d", "other.txt", "--lengths", 4).err
    )
