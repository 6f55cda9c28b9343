"""LongVQ's experiment: equal sizes and rows, claims about what is trained, and one run end to end in miniature."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from swat_lm.papers import PAPERS
from swat_lm.papers.longvq.claims import CLAIMS
from swat_lm.papers.longvq.losses import codes_in_use
from swat_lm.papers.longvq.scales import SCALES
from swat_lm.papers.reproduction import plan_without_running, reproduce, sources_from_folder
from tests.papers.test_demo import Notes

EXPERIMENTS = PAPERS["longvq"]


@pytest.mark.parametrize("scale", ["tiny", "small", "paper"])
def test_all_are_equally_large_and_read_the_same(scale: str):
    rows = {row["variant"]: row for row in plan_without_running("longvq", scale)}
    assert len({row["tokens"] for row in rows.values()}) == 1
    assert all(row["parameters"] == pytest.approx(rows["longvq"]["parameters"], rel=0.007) for row in rows.values())
    # a codebook is no parameter, nor is whether keys are quantised
    for name in ("exact", "fewer-codes", "dead-codes"):
        assert rows[name]["parameters"] == rows["longvq"]["parameters"]


def test_claims_are_about_what_is_trained():
    trained = set(EXPERIMENTS["longvq"].variants(SCALES["tiny"]))
    assert {side.variant for claim in CLAIMS for side in (claim.worse, claim.better)} == trained
    assert "reconstruction" in EXPERIMENTS["longvq"].title.lower()


def test_layers_are_in_their_own_order():
    line = {"loss": 1.0, "layers_codes_used_10": 3.0, "layers_codes_used_2": 4.2, "layers_codes_used_0": 5.0}
    assert codes_in_use(line) == ["5", "4", "3"]


def test_one_command_trains_measures_and_judges(data: Path, tmp_path: Path, in_process: list[str], monkeypatch):
    names = ("longvq", "no-attention")
    monkeypatch.setitem(EXPERIMENTS, "longvq", replace(EXPERIMENTS["longvq"], names=names))
    out, notes = tmp_path / "out", Notes()
    found = reproduce("longvq", "miniature", sources_from_folder(data, EXPERIMENTS["longvq"]), out, [0], notes)
    assert set(notes.steps) == {f"{name}-seed0" for name in names}
    assert json.loads((out / "longvq.json").read_text()) == found
    decided = [claim["gap"] is not None for claim in found["claims"]]
    assert decided == [claim.worse.variant == "no-attention" for claim in CLAIMS]
    page = (out / "longvq.html").read_text()
    assert "LongVQ (reconstruction)" in page
    assert "Codes in use" in page
    lines = [json.loads(line) for line in (out / "runs" / "longvq-seed0" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["layers_codes_used_0"] > 1
    assert lines[-1]["auxiliary_commitment"] > 0
