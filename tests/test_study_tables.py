"""The tables of studies say what their records say."""

import json
from pathlib import Path
from typing import Any

import pytest

from swat_lm.papers.studies import load_study
from tests.docs_modules import load_module

TABLES = load_module("study_tables")


def write(folder: Path, study: str, runs: dict[str, list[float]], more: float = 0.0) -> None:
    """Records of two lengths, the second above the first by `more`; what is given are the losses of the pieces."""
    (folder / study / "records").mkdir(parents=True)
    for name, losses in runs.items():
        points = [
            {"length": length, "mean_loss": sum(losses) / len(losses) + step} for length, step in ((8, 0), (32, more))
        ]
        record: dict[str, Any] = {
            "curve": {"points": points, "document_mean_loss": [[loss, loss + more] for loss in losses]},
            "training": [{"tokens": tokens, "loss": 10.0 - tokens / 100} for tokens in range(10, 1001, 10)],
            "machine": {"processor": "an abacus", "torch": "2"},
            "tokens_per_second": 1234.0,
            "outcomes": {
                "attention": {
                    "first_token_mass": 0.25, "first_token_uniform": 0.125, "output_norm": {"1": 2.0, "8": 4.0},
                },
                "recall": [{"task": "mqar", "points": [{"accuracy": 0.5}, {"accuracy": 0.25}]}],
            },
        }  # fmt: skip
        (folder / study / "records" / f"{name}.json").write_text(json.dumps(record))


def test_rates(tmp_path: Path):
    arms = {f"{arm}-3e-3-seed0": [2.0, 3.0] for arm in TABLES.ARMS if arm != "softmax"}
    write(tmp_path, "sigmoid-rates", {**arms, "softmax-slopes-7.5e-4-seed0": [1.0, 2.0]}, more=0.25)
    lines = TABLES.study_tables(tmp_path)["study-sigmoid-rates"].splitlines()
    assert lines[0] == "|  | 7.5e-4 | 3e-3 | best, at 4 times the length |"
    assert "| softmax window, negative slopes 2^-k | **1.500** | 2.500 | 1.750 |" in lines
    assert "| full attention |  | **2.500** | 2.750 |" in lines
    assert lines[-1] == "9 runs, 1 seed, 1,000 tokens each; an abacus, torch 2."


def test_schedules(tmp_path: Path):
    losses = {"w64-h4": (1.0, 1.006, 2.0), "w128-h4": (1.5, 1.4, 1.6)}
    names = ("swat", "alibi", "span16")
    runs = {f"{cell}-{name}-seed0": [x] for cell, row in losses.items() for name, x in zip(names, row, strict=True)}
    runs["w64-h4-geo64-4-seed0"] = [1.3]
    write(tmp_path, "slope-schedules", runs)
    text = TABLES.study_tables(tmp_path)["study-slope-schedules"]
    assert "| 64 | 4 | **1.000** | 1.006 | 2.000 | 1.300 |" in text
    # means over all cells alone
    assert "| mean above the best |  | 0.050 | 0.003 | 0.600 |  |" in text
    assert "| 128 | 4 | 1.500 | **1.400** | 1.600 |  |" in text


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ([[2.0, 3.0], [2.0, 3.0]], "+1.000 \u00b1 0.000"),
        ([[1.0, 2.0], [1.0, 2.2]], "+0.050 \u00b1 0.071 (undecided)"),
        # one seed decides nothing
        ([[2.0, 3.0]], "+1.000 \u00b1 0.000 (undecided)"),
    ],
)
def test_arms_are_compared_with_the_baseline(tmp_path: Path, other: list[list[float]], said: str):
    runs = {f"sigmoid-geo-7.5e-4-seed{seed}": [1.0, 2.0] for seed in (0, 1)}
    runs |= {f"full-1e-3-seed{seed}": losses for seed, losses in enumerate(other)}
    # a lower rate of the baseline's arm, and an arm that shares no seed with it
    runs |= {"sigmoid-geo-1e-4-seed0": [3.0, 4.0], "softmax-1e-3-seed7": [1.0, 1.0]}
    write(tmp_path, "sigmoid-windows", runs, more=0.5)
    lower, first, softmax, full = TABLES.study_tables(tmp_path)["study-sigmoid-windows"].splitlines()[2:6]
    assert lower.endswith("| +2.000 \u00b1 0.000 (undecided) | +2.000 \u00b1 0.000 (undecided) |")
    assert softmax.endswith("| 1.500 |  |  |")
    assert first.startswith("| sigmoid window, slopes from 64 to 4 over it | 7.5e-4 | 2 seeds | 1.500 | 2.000 |")
    assert full.split(" | ")[-2] == said
    text = TABLES.study_tables(tmp_path)["study-sigmoid-windows"]
    assert "| 0.250 (0.125) | 2.00 and 4.00 | 7.450 | 0.200 | 1,234 |" in text
    assert "at most 50% of mqar in any run" in text


def test_what_was_not_run_says_how(tmp_path: Path):
    assert set(TABLES.study_tables(tmp_path).values()) == {
        f"Not run yet: `swat-lm study {name}`."
        for name in ("sigmoid-rates", "slope-schedules", "sigmoid-windows", "sigmoid-large", "sigmoid-factors")
    }


def test_single_changes_are_called_by_what_they_change(tmp_path: Path):
    assert set(TABLES.FACTORS) == set(load_study("sigmoid-factors").spec.changes)
    runs = {f"base-seed{seed}": [1.0, 2.0] for seed in (0, 1)}
    runs |= {f"qk-norm-seed{seed}": [0.5, 1.5] for seed in (0, 1)}
    write(tmp_path, "sigmoid-factors", runs)
    lines = TABLES.study_tables(tmp_path)["study-sigmoid-factors"].splitlines()
    assert lines[0].startswith("|  | runs | 8 tokens | 32 tokens |")
    assert lines[2] == "| sigmoid, slopes from 64 to 4 over the window | 2 seeds | 1.500 | 1.500 |  |  |"
    assert lines[3] == "| `qk_norm` | 2 seeds | 1.000 | 1.000 | -0.500 \u00b1 0.000 | -0.500 \u00b1 0.000 |"
