"""`make verify` says how its checks ended, and keeps its record only on request; the checks themselves run there."""

import json
from pathlib import Path

import pytest

from verification import __main__ as verification
from verification.workplace import CheckFailedError, require, tracked


@pytest.fixture
def places(tmp_path: Path, monkeypatch) -> tuple[Path, Path]:
    def failing(place):
        place.done("first step")
        place.run(["python3", "-c", "print('words'); raise SystemExit(3)"])

    def passing(place):
        assert "words" in place.run(["python3", "-c", "print('words')"])
        return {"torch": "1"}

    monkeypatch.setattr(verification, "CHECKS", {"passing": passing, "failing": failing})
    monkeypatch.setattr(verification, "OWN", tmp_path / "own.json")
    monkeypatch.setattr(verification, "RECORD", tmp_path / "record.json")
    return verification.OWN, verification.RECORD


def test_checks_are_reported_and_recorded_on_request(places, capsys):
    own, record = places
    assert verification.main([]) == 1
    entries = json.loads(own.read_text())
    assert {name: entry["outcome"] for name, entry in entries.items()} == {"passing": "passed", "failing": "failed"}
    assert entries["passing"]["versions"] == {"torch": "1"}
    assert entries["failing"]["did"] == ["first step"]
    assert not record.exists()
    assert "exit code 3, expected 0\nwords" in capsys.readouterr().err
    record.write_text(json.dumps({"failing": "as before"}))
    assert verification.main(["passing", "--record"]) == 0
    assert json.loads(record.read_text())["failing"] == "as before"
    assert json.loads(record.read_text())["passing"]["outcome"] == "passed"
    with pytest.raises(SystemExit):
        verification.main(["pasing"])
    assert "no check is called 'pasing'; expected passing, failing, lm_eval_truth" in capsys.readouterr().err


def test_a_check_of_what_the_user_brings_runs_only_by_name(places, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(verification, "ON_REQUEST", {"brought": lambda place, options: asked.append(options) or {}})
    assert verification.main(["passing"]) == 0
    assert asked == []
    assert verification.main(["brought", "--limit", "5", "--limit", "piqa=3"]) == 0
    assert asked[0].limit == ["5", "piqa=3"]
    assert json.loads(places[0].read_text())["brought"]["outcome"] == "passed"
    monkeypatch.undo()
    assert verification.run("lm_eval_truth", asked[0])["outcome"] == "failed"
    assert "--data must name a folder; got None" in capsys.readouterr().err


def test_the_record_has_every_check():
    record = json.loads(verification.RECORD.read_text(encoding="utf-8"))
    assert set(record) == {*verification.CHECKS, *verification.ON_REQUEST}
    for entry in record.values():
        assert {"date", "commit", "python", "versions", "outcome", "did", "seconds"} <= set(entry)


def test_what_a_check_is_given():
    assert "swat_lm/recipes/own-text.yaml" in tracked("swat_lm")
    assert not [name for name in tracked() if name.startswith(("site/", "runs/"))]
    with pytest.raises(CheckFailedError, match="words"):
        require(False, "words")
