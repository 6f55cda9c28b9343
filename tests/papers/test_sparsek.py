"""SPARSEK's experiment: equal sizes and rows, claims about what is trained, and one run at a miniature scale."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from swat_lm.papers import PAPERS
from swat_lm.papers.reproduction import plan_without_running, reproduce, sources_from_folder
from swat_lm.papers.sparsek.claims import CLAIMS
from swat_lm.papers.sparsek.scales import SCALES
from tests.papers.test_demo import Notes

EXPERIMENTS = PAPERS["sparsek"]


@pytest.mark.parametrize("scale", ["tiny", "small", "paper"])
def test_all_are_equally_large_and_read_the_same(scale: str):
    rows = {row["variant"]: row for row in plan_without_running("sparsek", scale)}
    assert len({row["tokens"] for row in rows.values()}) == 1
    shape = SCALES[scale].budgets["analysis"].shape
    scores = shape["hidden_size"] * shape["num_attention_heads"] * shape["num_hidden_layers"]
    for name, row in rows.items():
        learns = name.startswith("sparsek") or name in ("no-window", "both", "straight")
        assert row["parameters"] == rows["window"]["parameters"] + (scores if learns else 0), name
    assert scores < 0.01 * rows["window"]["parameters"]


def test_claims_are_about_what_is_trained():
    trained = set(EXPERIMENTS["sparsek"].variants(SCALES["tiny"]))
    assert {side.variant for claim in CLAIMS for side in (claim.worse, claim.better)} == trained


def test_one_command_trains_measures_and_judges(data: Path, tmp_path: Path, in_process: list[str], monkeypatch):
    names = ("sparsek", "random")
    monkeypatch.setitem(EXPERIMENTS, "sparsek", replace(EXPERIMENTS["sparsek"], names=names))
    out, notes = tmp_path / "out", Notes()
    found = reproduce("sparsek", "miniature", sources_from_folder(data, EXPERIMENTS["sparsek"]), out, [0], notes)
    assert set(notes.steps) == {f"{name}-seed0" for name in names}
    assert json.loads((out / "sparsek.json").read_text()) == found
    assert all(variant["losses"]["text"]["64"]["mean"] > 0 for variant in found["variants"])
    decided = [claim["gap"] is not None for claim in found["claims"]]
    assert decided == [claim.says == "SPARSEK has a lower loss than with k keys by chance" for claim in CLAIMS]
    assert "k keys by chance" in (out / "sparsek.html").read_text()
