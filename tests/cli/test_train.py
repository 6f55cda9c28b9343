"""`swat-lm train`: what it says of a run that goes on with another schedule, and of warnings."""

from pathlib import Path

import pytest

from swat_lm.cli.application import show_warning


def test_raised_steps_are_said_to_change_the_schedule(cli, here: Path, caplog: pytest.LogCaptureFixture):
    assert cli("train", "run.yaml").code == 0
    again = cli("train", "run.yaml")
    assert "for more, raise train.steps, which stretches the cosine schedule" in again.out
    assert cli("train", "run.yaml", "train.steps=8").code == 0
    (said,) = [one.message for one in caplog.records if one.name == "swat_lm" and one.levelname == "WARNING"]
    assert said.startswith("train.steps was 6 and is 8: ")
    assert said.endswith("not that of a fresh run of 8 steps")


def test_a_plain_warning_is_shown_without_its_kind(caplog: pytest.LogCaptureFixture):
    with caplog.at_level("WARNING", logger="swat_lm"):
        show_warning(UserWarning("checkpoint step-3 is damaged"), UserWarning)
        show_warning(FutureWarning("goes away"), FutureWarning)
    assert [one.message for one in caplog.records] == ["checkpoint step-3 is damaged", "FutureWarning: goes away"]


def test_a_single_document_is_spoken_of_once(cli, here: Path, caplog: pytest.LogCaptureFixture):
    (here / "text/0.txt").write_text("a fox " * 500)
    with caplog.at_level("INFO", logger="swat_lm"):
        assert cli("train", "run.yaml", "data.held_out=0.2", "data.sources=text/0.txt", "train.steps=2").code == 0
    assert sum("only one document" in one.message for one in caplog.records) == 1


def test_another_architecture_names_the_keys_to_drop(cli, here: Path):
    other = ("train", "run.yaml", "train.steps=1", "model.architecture=llama", "model.slopes=balanced")
    ran = cli(*other)
    assert ran.code == 2
    drop = "model.sliding_window=null model.slopes=null"
    assert f"drop such keys with {drop}, or start from one of the baselines that `swat-lm recipes` lists" in ran.err
    assert cli(*other[:-1], *drop.split()).code == 0
