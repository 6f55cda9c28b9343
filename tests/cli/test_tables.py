"""Tables on narrow terminals: no figure and no name is cut off or torn."""

import re
from types import SimpleNamespace

import pytest
from rich.table import Table

from swat_lm.cli import benchmarks, diagnosis, length, reproduction, tuning
from swat_lm.cli.console import print_table
from swat_lm.cli.recall import reach_table, recall_table
from swat_lm.evaluate.curves import LengthCurve, LengthPoint
from swat_lm.evaluate.table1 import Cell, TableRow

WIDTHS = (20, 40, 50, 60, 80, 200)


def curve(longest: int = 1_048_576, state: int = 1_073_741_832) -> LengthCurve:
    points = tuple(LengthPoint(size, 64, 2.6453, 0.0121, 12.6453, 0.1121, state, 3.8161) for size in (128, longest))
    return LengthCurve(points, 10, 8, False, (), ())


def tables() -> dict[str, Table]:
    recalled = SimpleNamespace(points=[SimpleNamespace(distance=16_384, accuracy=1.0, low=0.9274, high=1.0, loss=0.0123,
                                                       loss_error=0.0012, num_items=500)])  # fmt: skip
    reached = SimpleNamespace(
        within={"0.5": 1234.5, "0.99": 12345.6}, within_error={"0.5": 12.3, "0.99": None}, reach=9
    )
    looked = SimpleNamespace(
        length=20, output_norm=[[0.001234] * 20] * 2, gates=[None] * 2,
        weights=[None, SimpleNamespace(score_function="softmax", first_token_mass=[0.5], first_token_uniform=0.01,
                                       row_sum=[1.0], near_zero=[0.984], near_one=[0.015])],
    )  # fmt: skip
    trial = tuning_trial()
    cells = {"Wiki ppl": Cell(1234.5, 12.3), "Hella n": Cell(45.21, 1.31)}
    rows = [TableRow(name, "measured here", cells) for name in ("a-long-name-of-a-run", "other")]
    return {
        "length": length.curve_table(curve()),
        "recall": recall_table(recalled),  # type: ignore[arg-type]
        "reach": reach_table(reached),  # type: ignore[arg-type]
        "diagnose": diagnosis.diagnosis_table(looked),  # type: ignore[arg-type]
        "tune": tuning.tiles_table([trial, trial]),  # type: ignore[list-item]
        "tasks": benchmarks.ours_table(rows, TableRow("(guessing)", "expected", {"Hella n": Cell(25.0)})),
        "paper": benchmarks.paper_table(),
    }


def tuning_trial() -> SimpleNamespace:
    choices = ["one kernel", "two kernels"]
    return SimpleNamespace(
        kernel="backward", candidates=choices, best=choices[1], times={choices[0]: 12.34, choices[1]: 1.234}
    )


@pytest.mark.parametrize("name", sorted(tables()))
@pytest.mark.parametrize("columns", WIDTHS)
def test_no_cell_is_cut_or_torn(
    name: str, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("COLUMNS", str(columns))
    table = tables()[name]
    cells = [str(cell) for column in table.columns for cell in column.cells]
    headings = [str(column.header) for column in table.columns]
    print_table(table)
    lines = capsys.readouterr().out.splitlines()
    said = [re.sub(r" +", " ", line) for line in lines]
    for cell in cells:
        assert any(cell in line for line in said), f"{cell!r} is not whole in {lines}"
    words = " ".join(said).split()
    for word in " ".join(headings).split():
        assert word in words
    assert "\u2026" not in "".join(lines)
    if columns >= 200:
        assert sum(map(len, lines)) > 0
        assert len(lines) <= table.row_count + 3


def test_headings_wrap_before_rows_become_lists(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    shown = {}
    for columns in (80, 50):
        monkeypatch.setenv("COLUMNS", str(columns))
        print_table(length.curve_table(curve(4096, 262_152)))
        shown[columns] = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
        assert max(map(len, shown[columns])) <= columns
    assert shown[80][-1].split()[0] == "4,096"
    assert shown[50][:2] == ["length 128", "  loss, first N tokens   2.6453 +- 0.0121"]


def test_a_plan_names_its_variants_at_any_width(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    row = {
        "label": "SWAT (-+), W 1024", "parameters": 373_867_520, "length": 4096, "steps": 38_147, "rows_per_step": 96,
        "tokens": 15_000_000_000, "flops": 3.46e19, "flops_by": "formula", "gpu_hours": 77.0, "remark": "",
    }  # fmt: skip
    monkeypatch.setattr("swat_lm.papers.reproduction.plan_without_running", lambda *_: [row])
    for columns in WIDTHS:
        monkeypatch.setenv("COLUMNS", str(columns))
        reproduction.show_plan("table1", "paper", 1)
        out = capsys.readouterr().out
        for whole in ("SWAT (-+), W 1024", "373,867,520", "15,000,000,000", "3.46e+19"):
            assert whole in out
