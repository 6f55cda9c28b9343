"""Rows outlive an interruption, and are not mixed with those of other code or settings."""

import pytest

from benchmarks import measure, record
from benchmarks.rows import Rows


@pytest.fixture
def machine(tmp_path, monkeypatch):
    described = {"commit": "abc", "date": "2026-01-01"}
    monkeypatch.setattr(record, "OWN", tmp_path / "results")
    monkeypatch.setattr(measure, "machine", lambda: dict(described))
    return described


def not_again() -> dict:
    raise AssertionError("measured again")


def test_an_interrupted_run_goes_on(machine):
    kept = Rows("some", {"sizes": (1, 2)})
    assert kept.measured("first", lambda: {"a": 0.1}) == {"a": 0.1}
    with pytest.raises(KeyboardInterrupt):
        kept.measured("second", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    machine["date"] = "2026-01-02"
    again = Rows("some", {"sizes": (1, 2)})
    assert again.measured("first", not_again) == {"a": 0.1}
    assert again.measured("second", lambda: {"b": 2}) == {"b": 2}
    assert [path.name for path in record.OWN.iterdir()] == [".some.partial"]
    again.forget()
    assert list(record.OWN.iterdir()) == []


@pytest.mark.parametrize("change", ["settings", "commit", "changes on top"])
def test_rows_of_other_code_or_settings_are_measured_again(machine, change):
    if change == "changes on top":
        machine["commit"] = "abc+changes"
    Rows("some", {"prompt": 1}).measured("first", lambda: {"a": 1})
    if change == "commit":
        machine["commit"] = "def"
    other = Rows("some", {"prompt": 2 if change == "settings" else 1})
    assert other.measured("first", lambda: {"a": 2}) == {"a": 2}
