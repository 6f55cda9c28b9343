"""SPADE's experiment: controls of equal size and training, and a page from a miniature of it."""

from dataclasses import replace
from pathlib import Path

import pytest

from swat_lm import SwatConfig
from swat_lm.papers import PAPERS
from swat_lm.papers.reproduction import plan_without_running, reproduce, sources_from_folder
from swat_lm.papers.spade.losses import CLAIMS
from tests.papers.test_demo import Notes

SPADE = PAPERS["spade"]["spade"]


def test_variants_differ_in_what_is_compared_and_nothing_else():
    for name, scale in SPADE.scales.items():
        rows = plan_without_running("spade", name)
        assert len({(row["length"], row["tokens"]) for row in rows}) == 1
        sizes = [row["parameters"] for row in rows]
        assert max(sizes) / min(sizes) < 1.006, name
        variants = SPADE.variants(scale)
        assert {one.partition("@")[0] for claim in CLAIMS for one in claim[2:4]} == variants.keys()
        for key, function in (("spade", "softmax"), ("swat", "sigmoid"), ("swat-windows", "sigmoid")):
            plan = SwatConfig(**{**variants[key].model, "sliding_window": 8}).plan()
            assert {entry.settings.score_function for entry in plan} == {function}
            assert {entry.settings.slopes for entry in plan} == {"none" if function == "softmax" else "balanced"}
        kinds = {
            key: [entry["kind"] for entry in variant.model["layers"]].count("spade")
            for key, variant in variants.items()
        }
        depth = scale.budgets["analysis"].shape["num_hidden_layers"]
        assert kinds == {**dict.fromkeys(variants, 1), "windows": 0, "swat-windows": 0, "every-layer": depth}


def test_a_miniature_is_trained_measured_and_judged(
    data: Path, tmp_path: Path, in_process: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(PAPERS["spade"], "spade", replace(SPADE, names=("spade", "windows", "frozen")))
    notes, out = Notes(), tmp_path / "out"
    found = reproduce("spade", "miniature", sources_from_folder(data, SPADE), out, [0], notes)
    assert set(notes.steps) == {"spade-seed0", "windows-seed0", "frozen-seed0"}
    measured = [claim["outcome"] != "not measured" for claim in found["claims"]]
    assert measured == [True, True, False, False, False, True, False, False]
    page = (out / "spade.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert "arXiv 2212.08136" in page
