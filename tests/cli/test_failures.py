"""What one process of several says of a failure, and how errors of the system are told."""

import json
from pathlib import Path

import pytest

from swat_lm.cli import failures
from swat_lm.train.engine import Engine


def test_only_the_main_process_speaks(cli, here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "1")
    ran = cli("info")
    assert (ran.code, ran.out, ran.err) == (0, "", "")


def test_errors_of_other_processes_are_told_unless_the_main_process_does(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("torch.distributed.broadcast_object_list", fake_broadcast)
    engine = object.__new__(Engine)
    engine.is_main, engine.num_processes = False, 2
    with pytest.raises(FileNotFoundError) as caught:
        engine.on_main(lambda: 0)
    assert failures.report_failure(caught.value, debug=False) == 2
    # also where it is told in other words
    wrapped = OSError(28, "cannot write checkpoint")
    wrapped.__cause__ = caught.value
    assert failures.report_failure(wrapped, debug=False) == 2
    assert capsys.readouterr().err == ""
    assert failures.report_failure(FileNotFoundError(2, "No such file", "own.bin"), debug=False) == 2
    assert capsys.readouterr().err == "error (process 1): No such file: own.bin\n"


def fake_broadcast(outcome: list, src: int, device: object) -> None:
    """What the main process tells the others when it met an error."""
    outcome[:] = [None, FileNotFoundError(2, "No such file", "main.bin")]


def test_an_error_of_one_process_alone_has_a_message(cli, here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "1")
    ran = cli("train", "rum.yaml")
    assert ran.code == 2
    assert ran.err == "error (process 1): no recipe at rum.yaml; the nearest is run.yaml\n"


def test_messages_of_system_errors():
    assert failures.describe_failure(OSError(None, "cannot write")) == "cannot write"
    assert failures.describe_failure(OSError("cannot write")) == "cannot write"
    assert failures.describe_failure(OSError(28, "No space left")) == "No space left"


def test_torchruns_own_report_has_the_line(cli, here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(here / "error.json"))
    assert cli("train", "rum.yaml").code == 2
    told = json.loads((here / "error.json").read_text())
    assert told["message"] == "no recipe at rum.yaml; the nearest is run.yaml"
    assert told["timestamp"] > 0
