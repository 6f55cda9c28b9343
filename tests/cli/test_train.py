"""`swat-lm train`: what it says of a run that goes on with another schedule, and of warnings."""

import json
from pathlib import Path

import pytest

from swat_lm.cli.application import show_warning


def test_raised_steps_are_said_to_change_the_schedule(cli, here: Path, caplog: pytest.LogCaptureFixture):
    assert cli("train", "run.yaml").code == 0
    again = cli("train", "run.yaml")
    assert "for more, raise train.steps, which stretches the cosine schedule" in again.out
    assert cli("train", "run.yaml", "train.steps=8").code == 0
    (said,) = [
        record.message for record in caplog.records if record.name == "swat_lm" and record.levelname == "WARNING"
    ]
    assert said.startswith("train.steps was 6 and is 8: ")
    assert said.endswith("not that of a fresh run of 8 steps")


def test_a_plain_warning_is_shown_without_its_kind(caplog: pytest.LogCaptureFixture):
    with caplog.at_level("WARNING", logger="swat_lm"):
        show_warning(UserWarning("checkpoint step-3 is damaged"), UserWarning)
        show_warning(FutureWarning("goes away"), FutureWarning)
    assert [record.message for record in caplog.records] == ["checkpoint step-3 is damaged", "FutureWarning: goes away"]


def test_a_single_document_is_spoken_of_once(cli, here: Path, caplog: pytest.LogCaptureFixture):
    (here / "text/0.txt").write_text("a fox " * 500)
    with caplog.at_level("INFO", logger="swat_lm"):
        assert cli("train", "run.yaml", "data.held_out=0.2", "data.sources=text/0.txt", "train.steps=2").code == 0
    assert sum("only one document" in record.message for record in caplog.records) == 1


def test_instructions_from_the_command_line(cli, here: Path):
    """From a file of chats to a model that was taught on them, and the slips on the way."""
    rows = [{"messages": [{"role": "user", "content": f"Say {n % 9}"}, {"role": "assistant", "content": f"{n % 9}"}]}
            for n in range(300)]  # fmt: skip
    (here / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli("train", "run.yaml", "train.export=true", "out=trained").code == 0
    command = ["train", "run.yaml", "data.sources=chats.jsonl", "out=taught", "model.init=trained"]
    for change, said in (
        ("", "chats.jsonl:1: no field 'text'; it has messages"),
        ("train.objective=masked_next_token", "plain text marks nothing: set data.format to prompt_answer or messages"),
        ("train.objective=masked_token", "did you mean 'masked_next_token'?"),
        ("data.format=message", "data.format must be one of text, prompt_answer, messages"),
    ):
        ran = cli(*command, *filter(None, [change]))
        assert ran.code == 2
        assert said in ran.err
        assert not (here / "taught").exists()
    ran = cli(*command, "data.format=messages", "train.objective=masked_next_token", "train.log_every=1")
    assert ran.code == 0, ran.err
    logged = [json.loads(line) for line in (here / "taught/metrics.jsonl").read_text().splitlines()]
    assert 0 < logged[-1]["marked_share"] < 0.3
    assert (here / "taught/export/config.json").is_file()
    assert cli("info", "run.yaml", "model.init=taught").code == 0


def test_another_architecture_names_the_keys_to_drop(cli, here: Path):
    other = ("train", "run.yaml", "train.steps=1", "model.architecture=llama", "model.slopes=balanced")
    ran = cli(*other)
    assert ran.code == 2
    drop = "model.sliding_window=null model.slopes=null"
    assert f"drop such keys with {drop}, or start from one of the baselines that `swat-lm recipes` lists" in ran.err
    assert cli(*other[:-1], *drop.split()).code == 0
