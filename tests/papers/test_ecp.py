"""ECP's experiment: equal sizes and rows, claims about what is trained, and one run end to end at a miniature scale."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from swat_lm import SwatConfig, SwatForCausalLM
from swat_lm.model.architectures import configure_model, count_model_parameters
from swat_lm.papers import PAPERS
from swat_lm.papers.ecp.claims import CLAIMS
from swat_lm.papers.ecp.losses import losses_of_latents
from swat_lm.papers.ecp.scales import SCALES
from swat_lm.papers.reproduction import plan_without_running, reproduce, sources_from_folder
from tests.papers.test_demo import Notes

EXPERIMENTS = PAPERS["ecp"]


@pytest.mark.parametrize("scale", ["tiny", "small", "paper"])
def test_all_are_equally_large_and_read_the_same(scale: str):
    rows = {row["variant"]: row for row in plan_without_running("ecp", scale)}
    assert len({row["tokens"] for row in rows.values()}) == 1
    assert all(row["parameters"] == pytest.approx(rows["ecp"]["parameters"], rel=0.01) for row in rows.values())
    # what is seen, and how it is scored, costs no parameter
    for name in ("disjoint", "window", "window-short", "full-attention", "apart", "ecp-sigmoid", "swat"):
        assert rows[name]["parameters"] == rows["ecp"]["parameters"]
    if scale == "paper":
        preset = count_model_parameters(configure_model({"preset": "ecp-130m"}, 28_996)).total
        assert rows["ecp"]["parameters"] == preset


def test_claims_are_about_what_is_trained():
    trained = set(EXPERIMENTS["ecp"].variants(SCALES["tiny"]))
    assert {side.variant for claim in CLAIMS for side in (claim.worse, claim.better)} == trained


def test_losses_are_those_of_latents():
    """Of a Perceiver as of any other: what the last tokens of the row predict inside it."""
    row = torch.randint(40, (1, 12), generator=torch.Generator().manual_seed(0))
    for layers in (["ecp"], [{"kind": "perceiver", "latents": 5}]):
        model = SwatForCausalLM(SwatConfig(vocab_size=40, hidden_size=64, num_hidden_layers=1, layers=layers)).eval()
        labels = row.clone()
        labels[:, :-4] = -100
        expected = model(row, labels=labels, use_cache=False).loss.item()
        assert losses_of_latents(model, row, 5) == pytest.approx(expected, abs=1e-5)


def test_one_command_trains_measures_and_judges(data: Path, tmp_path: Path, in_process: list[str], monkeypatch):
    names = ("ecp", "perceiver-v3")
    monkeypatch.setitem(EXPERIMENTS, "ecp", replace(EXPERIMENTS["ecp"], names=names))
    out, notes = tmp_path / "out", Notes()
    found = reproduce("ecp", "miniature", sources_from_folder(data, EXPERIMENTS["ecp"]), out, [0], notes)
    assert set(notes.steps) == {f"{name}-seed0" for name in names}
    assert json.loads((out / "ecp.json").read_text()) == found
    assert all(variant["losses"]["text"]["32"]["mean"] > 0 for variant in found["variants"])
    decided = [claim["gap"] is not None for claim in found["claims"]]
    assert decided == [claim.says == "ECP has a lower loss than V3" for claim in CLAIMS]
    assert "V3: history compressed" in (out / "ecp.html").read_text()
    # all models read the same rows, and of a Perceiver's latents alone are counted
    logged = {
        name: json.loads((out / "runs" / f"{name}-seed0" / "metrics.jsonl").read_text().splitlines()[-1])
        for name in names
    }
    assert logged["ecp"]["tokens"] / logged["perceiver-v3"]["tokens"] == pytest.approx(31 / 15, rel=0.1)
