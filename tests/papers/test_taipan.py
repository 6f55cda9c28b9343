"""Taipan's experiments: equal sizes, claims about what is trained, and one run end to end at a miniature scale."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from swat_lm.model.architectures import configure_model, count_model_parameters
from swat_lm.papers import PAPERS
from swat_lm.papers.reproduction import plan_without_running, reproduce, sources_from_folder
from swat_lm.papers.taipan.claims import CLAIMS
from swat_lm.papers.taipan.scales import SCALES
from tests.papers.test_demo import Notes

EXPERIMENTS = PAPERS["taipan"]


@pytest.mark.parametrize("scale", ["tiny", "small", "paper"])
def test_all_are_equally_large_and_read_the_same(scale: str):
    rows = {row["variant"]: row for name in EXPERIMENTS for row in plan_without_running(name, scale)}
    assert len({row["tokens"] for row in rows.values()}) == 1
    assert all(row["parameters"] == pytest.approx(rows["taipan"]["parameters"], rel=0.015) for row in rows.values())
    # what is chosen, and how it is scored, costs no parameter
    for name in ("random", "all-tokens", "taipan-sigmoid", "taipan-10"):
        assert rows[name]["parameters"] == rows["taipan"]["parameters"]
    if scale == "paper":
        assert round(rows["taipan"]["tokens"] / 1e9) == 27
        preset = count_model_parameters(configure_model({"preset": "taipan-190m"}, 128_256)).total
        assert rows["taipan"]["parameters"] == preset


def test_claims_are_about_what_is_trained():
    for name, claims in CLAIMS.items():
        trained = set(EXPERIMENTS[name].variants(SCALES["tiny"]))
        assert {side.variant for claim in claims for side in (claim.worse, claim.better)} <= trained
    # every control has a claim
    assert {claim.worse.variant for claim in CLAIMS["taipan"]} >= {"random", "ssm-only", "samba", "taipan"}


def test_one_command_trains_measures_and_judges(data: Path, tmp_path: Path, in_process: list[str], monkeypatch):
    names = ("taipan", "random", "transformer")
    monkeypatch.setitem(EXPERIMENTS, "taipan", replace(EXPERIMENTS["taipan"], names=names))
    out, notes = tmp_path / "out", Notes()
    found = reproduce("taipan", "miniature", sources_from_folder(data, EXPERIMENTS["taipan"]), out, [0], notes)
    assert set(notes.steps) == {f"{name}-seed0" for name in names}
    assert json.loads((out / "taipan.json").read_text()) == found
    decided = [claim["gap"] is not None for claim in found["claims"]]
    assert decided == [False] * 4 + [True] * 2 + [False] * 4
    page = (out / "taipan.html").read_text()
    assert "What the gates chose" in page
    # of random and all there is no gate to show
    assert page.count("<td>0</td>") == 1
    lines = [json.loads(line) for line in (out / "runs" / "taipan-seed0" / "metrics.jsonl").read_text().splitlines()]
    assert 0 < lines[-1]["layers_selected"] < 1
    assert lines[-1]["auxiliary_budget"] > 0
    assert page.count("data:image/png;base64,") == 1
