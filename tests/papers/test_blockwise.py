"""The claim on memory is measured and judged: equal gradients, longest rows, counted peaks; and it goes on."""

import json
from pathlib import Path

import pytest

from swat_lm.papers import find_measured
from swat_lm.papers.blockwise.measuring import longest_row
from swat_lm.papers.blockwise.methods import METHODS
from swat_lm.papers.blockwise.scales import MEASURES, SCALES
from swat_lm.papers.measured import reproduce_measured
from swat_lm.papers.watching import Watcher


class Notes(Watcher):
    def __init__(self) -> None:
        self.said: list[str] = []

    def stage(self, text: str) -> None:
        self.said.append(text)


def test_it_measures_judges_and_goes_on(tmp_path: Path, monkeypatch):
    # a loss in parts of 64 tokens, a line from short rows on, and lengths found roughly
    monkeypatch.setattr("swat_lm.papers.blockwise.measuring.NEAR", 0.3)
    monkeypatch.setattr("swat_lm.model.loss.CHUNK_ELEMENTS", 2**12)
    monkeypatch.setattr("swat_lm.model.execution.predicted.MANY", 2)
    out, notes = tmp_path / "out", Notes()
    found = reproduce_measured(find_measured("blockwise"), "miniature", out, notes)
    assert json.loads((out / "blockwise.json").read_text()) == found
    outcomes = {claim["says"]: claim["outcome"] for claim in found["claims"]}
    assert outcomes["loss and all gradients are those of attention over all scores"] == "held"
    assert outcomes["peaks are as predicted, to within 20%"] == "held"
    assert len(notes.said) == len(METHODS) + 2
    measured, measure = found["measured"], MEASURES["miniature"]
    for name in METHODS:
        of = measured[f"miniature-{name}"]
        assert of["held"] < of["predicted"] <= measure.sizes[0].available
        assert all(point["counted"] <= 1.2 * measure.sizes[0].available for point in of["points"])
    assert measured["miniature-vanilla"]["longest"] < measured["miniature-memory-efficient"]["longest"]
    assert "What fits in 2.0 MiB" in (out / "blockwise.html").read_text()
    # what is there is kept
    path = out / "measured" / "miniature-vanilla.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "longest": 7}))
    (out / "measured" / "exact.json").unlink()
    again = reproduce_measured(find_measured("blockwise"), "miniature", out, notes)
    assert again["measured"]["miniature-vanilla"]["longest"] == 7
    assert notes.said[-2].startswith("1 of 9: gradients of every method")
    path.write_text("{")
    with pytest.raises(ValueError, match=r"miniature-vanilla\.json is damaged"):
        reproduce_measured(find_measured("blockwise"), "miniature", out, notes)
    with pytest.raises(ValueError, match="was measured with another scale: name another folder"):
        reproduce_measured(find_measured("blockwise"), "tiny", out, notes)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ValueError, match="exists and is no reproduction"):
        reproduce_measured(find_measured("blockwise"), "miniature", tmp_path / "other", notes)


def test_the_longest_row_is_found_to_within_a_per_cent():
    class Need:
        def __init__(self, most: int) -> None:
            self.most = most

        def need(self, tokens: int):
            return type("Need", (), {"total": tokens})

    for most in (64, 100, 4711):
        assert most * 0.98 <= longest_row(Need(most), most) <= most  # type: ignore[arg-type]
    assert longest_row(Need(63), 63) == 0  # type: ignore[arg-type]


def test_scales_are_complete():
    assert SCALES.keys() == MEASURES.keys()
    for name, measure in MEASURES.items():
        assert measure.exact == 0 or measure.exact % SCALES[name].sizes["block"]
        assert max(measure.curve, default=0) <= measure.most_windowed


def test_the_command_refuses_what_belongs_to_training(cli, here: Path):
    plan = cli("reproduce", "blockwise", "--scale", "tiny", "--dry-run")
    assert plan.code == 0, plan.err
    assert "layers checkpointed whole" in plan.out
    for option, value in (("--data", "data"), ("--seeds", "0,1"), ("--text", "text")):
        ran = cli("reproduce", "blockwise", "--scale", "tiny", "--out", "out", option, value)
        assert ran.code == 2
        assert f"{option}: blockwise trains nothing and reads no text" in ran.err
    ran = cli("reproduce", "blockwise", "--scale", "large", "--out", "out")
    assert "--scale: expected tiny, small, paper, got 'large'" in ran.err
    assert "Expected one of table1" in (said := cli("reproduce", "blockwize", "--scale", "tiny").err)
    assert "blockwise" in said
    assert not Path("out").exists()
