import json
from pathlib import Path

import pytest

from benchmarks import table

RECORD = {
    "benchmark": "train_cpu",
    "machine": {
        "processor": "Some CPU",
        "threads": 2,
        "memory_gib": 23.4,
        "python": "3.11.1",
        "versions": {"torch": "2.13", "local-attention": None},
        "commit": "abc",
        "date": "2030-01-01",
    },
    "settings": {"window": 128, "rounds": {"4096": 5}, "step": "forward|backward"},
    "rows": [{"length": 4096, "ms": 12.3456}, {"length": 16384, "ms": 1234.5}, {"other": True, "note": None}],
    "goals": [{"goal": "fast", "wanted": 0.8, "measured": 0.512, "reached": False}],
}
PAGE = "# Speed\n\n<!-- train_cpu:begin -->\nold\n<!-- train_cpu:end -->\n\nend\n"


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "results").mkdir()
    (tmp_path / "performance.md").write_text(PAGE)
    return tmp_path / "performance.md", tmp_path / "results"


def run(places: tuple[Path, Path], *arguments: str) -> int:
    return table.main([*arguments, "--page", str(places[0]), "--results", str(places[1])])


def test_tables_stand_between_the_markers(places):
    page, results = places
    (results / "train_cpu.json").write_text(json.dumps(RECORD))
    assert run(places) == 0
    text = page.read_text()
    assert text.startswith(
        "# Speed\n\n<!-- train_cpu:begin -->\nSome CPU, 2 threads, 23.4 GiB; Python 3.11.1, torch 2.13;"
    )
    assert text.endswith("<!-- train_cpu:end -->\n\nend\n")
    assert "| fast | 0.8 | 0.512 | **missed** |" in text
    assert "| length | 4,096 | 16,384 |\n| --- | ---: | ---: |\n| ms | 12.3 | 1,234 |" in text
    assert "| other | yes |\n| --- | ---: |\n| note |  |" in text
    # a bar would end the cell
    assert "step forward/backward" in text
    assert "old" not in text


def test_check_fails_when_stale_and_changes_nothing(places, capsys):
    page, results = places
    (results / "train_cpu.json").write_text(json.dumps(RECORD))
    assert run(places, "--check") == 1
    assert page.read_text() == PAGE
    assert "python -m benchmarks.table" in capsys.readouterr().err
    assert run(places) == 0
    assert run(places, "--check") == 0
    (results / "train_cpu.json").write_text(json.dumps({**RECORD, "goals": []}))
    assert run(places, "--check") == 1


def test_what_is_not_recorded_says_so(places):
    assert run(places) == 0
    assert "Not recorded yet: `python -m benchmarks.train_cpu --record`" in places[0].read_text()


def test_a_result_needs_its_markers(places):
    (places[1] / "decode_cpu.json").write_text(json.dumps(RECORD))
    with pytest.raises(ValueError, match=r"decode_cpu\.json: the page lacks"):
        run(places)


@pytest.mark.parametrize("page", ["<!-- train_cpu:begin -->\n", PAGE + PAGE, "<!-- trian_cpu:begin -->\n"])
def test_broken_markers_are_refused(places, page):
    places[0].write_text(page)
    with pytest.raises(ValueError, match=r"train_cpu|trian_cpu"):
        run(places)
    assert places[0].read_text() == page


@pytest.mark.parametrize(
    ("value", "text"),
    [(3, "3"), (1048584, "1,048,584"), (0.8123, "0.812"), (12.345, "12.3"), (4321.9, "4,322"), (2.0, "2")],
)
def test_numbers(value, text):
    assert table.number(value) == text
