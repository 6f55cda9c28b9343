"""A user's own results stay apart from the committed record, which changes on request."""

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import measure, record

SETTINGS = {"rounds": 3}
ROWS = [{"window": 128, "ms": 1.5}]


@pytest.fixture
def committed(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(record, "OWN", tmp_path / "own")
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "record")
    (tmp_path / "record").mkdir()
    (tmp_path / "record" / "attention_cpu.json").write_text("the record")
    return tmp_path / "record"


def test_git_ignores_own_results_and_not_the_record():
    if not (measure.REPOSITORY / ".git").exists():
        pytest.skip("not a clone: git has nothing to say here")
    for path, ignored in ((record.OWN / "attention_cpu.json", True), (measure.RESULTS / "attention_cpu.json", False)):
        ran = subprocess.run(["git", "check-ignore", "--no-index", "-q", path], cwd=measure.REPOSITORY, check=False)
        assert (ran.returncode == 0) is ignored, path


def test_the_record_changes_on_request(committed, capsys):
    path = record.save("attention_cpu", ROWS, [measure.goal("fast", 1, 2)], SETTINGS, gpu={"name": "some"})
    assert path == record.OWN / "attention_cpu.json"
    assert f"python -m benchmarks.record {path}" in record.finish(path, to_record=False)
    assert (committed / "attention_cpu.json").read_text() == "the record"
    assert record.main([str(path)]) == 0
    assert json.loads((committed / "attention_cpu.json").read_text()) == json.loads(path.read_text())
    out = capsys.readouterr().out
    assert f"{committed / 'attention_cpu.json'}\nmake docs" in out
    # a run that measures less has a place of its own
    assert record.save("attention_cpu", [], [], SETTINGS, kind="quick") == record.OWN / "attention_cpu-quick.json"
    assert json.loads(path.read_text())["rows"] == ROWS
    assert sorted(one.name for one in record.OWN.iterdir()) == ["attention_cpu-quick.json", "attention_cpu.json"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (None, "there is no such file"),
        ("{", "not JSON"),
        ("[]", "names the benchmark None"),
        ('{"benchmark": "../attention_cpu"}', "names the benchmark '../attention_cpu'"),
        ('{"benchmark": "attention_cpu", "rows": []}', "lacks machine, settings, goals"),
        ('{"benchmark": "attention_cpu", "rows": [], "machine": {}, "settings": {}, "goals": []}', "cannot be shown"),
    ],
)
def test_what_is_no_result_changes_nothing(committed, tmp_path, capsys, text, named):
    good = record.save("train_cpu", ROWS, [], SETTINGS)
    bad = tmp_path / "bad.json"
    if text is not None:
        bad.write_text(text)
    assert record.main([str(good), str(bad)]) == 2
    assert f"{bad}: {named}" in capsys.readouterr().err
    assert [path.name for path in committed.iterdir()] == ["attention_cpu.json"]
    assert (committed / "attention_cpu.json").read_text() == "the record"
