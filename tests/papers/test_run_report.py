"""Runs side by side on one page: what is there is shown, what is not is named."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from swat_lm.evaluate import plots
from swat_lm.evaluate.curves import LengthCurve, summarise
from swat_lm.evaluate.recall import RecallCurve, RecallPoint
from swat_lm.papers.run_report import how_read, read_run, write_run_report
from swat_lm.recipe import DataRecipe, Recipe, TrainRecipe
from swat_lm.train import run

SHAPE = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {"swat": {**SHAPE, "sliding_window": 8}, "llama": {**SHAPE, "architecture": "llama"}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two small finished runs."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text("the red fox sings over the slow dog " * 300)
    data = DataRecipe(
        sources=(str(folder / "text.txt"),), sequence_length=32, held_out=0.0, cache=str(folder / "tokens"),
        documents="concatenate",
    )  # fmt: skip
    train = TrainRecipe(steps=6, batch_size=2, warmup_steps=1, log_every=1)
    for name, model in MODELS.items():
        run(Recipe(name=name, out=str(folder / name), model=model, data=data, train=train))
    return {name: folder / name for name in MODELS}


def test_page_shows_what_was_measured(runs: dict[str, Path], tmp_path: Path):
    swat, llama = read_run(runs["swat"]), read_run(runs["llama"], "full <attention>")
    curve = summarise([16, 32], [[2.0, 1.9], [2.2, 2.1]], [[2.0, 1.9], [2.2, 2.1]], [8, 8], 100, 8, same_text=True)
    point = RecallPoint(16, 10, 10, 0.5, 0.24, 0.76, 1.0, 0.1)
    swat = replace(swat, lengths={"length": curve}, recalls={"passkey": RecallCurve("passkey", (point,), 8, 15)})
    found = write_run_report([swat, llama], tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert json.loads((tmp_path / "out" / "report.json").read_text())["runs"][0]["name"] == "swat"
    # training, length, recall, state, speed
    assert page.count("data:image/png;base64,") == 5
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {
        "training.png", "length-0.png", "recall-0.png", "state.png", "speed.png",
    }  # fmt: skip
    ours, theirs = found["runs"]
    assert ours["steps"] == theirs["steps"] == 6
    assert ours["parameters"] == theirs["parameters"]
    assert len(set(ours["state_bytes"].values())) == 1
    assert theirs["state_bytes"][128] == 2 * theirs["state_bytes"][64]
    assert ours["loss_by_length"]["length"][32][0] == pytest.approx(2.0)
    assert [line.partition(":")[0] for line in found["not_measured"]] == ["full <attention>"] * 2
    assert "full &lt;attention&gt;" in page
    assert "<attention>" not in page
    assert "swat-lm evaluate length" in page


def test_curves_behind_other_windows_say_so(runs: dict[str, Path]):
    swat, llama = read_run(runs["swat"]), read_run(runs["llama"])
    rows = [[2.0, 1.9], [2.2, 2.1]]

    def curve(window: int | None, num_sinks: int = 0) -> LengthCurve:
        return summarise([16, 32], rows, rows, [8, 8], 100, window, same_text=True, num_sinks=num_sinks)

    assert [how_read(swat, curve(8)), how_read(llama, curve(None))] == ["", ""]
    assert how_read(swat, curve(1024)) == ", window 1,024"
    assert how_read(swat, curve(None)) == ", window none"
    assert how_read(llama, curve(8, 4)) == ", window 8, first 4 tokens kept"


def test_files_of_a_run_are_found(runs: dict[str, Path]):
    folder = runs["swat"]
    curve = summarise([16, 32], [[2.0, 1.9]], [[2.0, 1.9]], [8, 8], 100, 8, same_text=True)
    (folder / "mine").mkdir()
    curve.save(folder / "mine" / "length.json")
    assert list(read_run(folder).lengths) == ["mine/length"]
    for content, message in (
        ("{}", "points: Field required$"),
        ("[1]", r"Input should be a dictionary or an instance of LengthCurve, got \[1\]$"),
        (curve.to_json().replace("100", '"many"'), "num_tokens: Input should be a valid integer, .*, got 'many'$"),
        ("{", "Expecting property name"),
    ):
        (folder / "mine" / "length.json").write_text(content)
        with pytest.raises(ValueError, match=rf"length\.json: not what swat-lm wrote: {message}"):
            read_run(folder)
    (folder / "mine" / "length.json").unlink()


def test_wrong_runs_are_named(runs: dict[str, Path], tmp_path: Path):
    with pytest.raises(ValueError, match=r"is no run: expected recipe\.yaml"):
        read_run(tmp_path)
    run = read_run(runs["swat"])
    with pytest.raises(ValueError, match="same name"):
        write_run_report([run, run], tmp_path / "out")
    with pytest.raises(ValueError, match="1 to 6 runs"):
        write_run_report([replace(run, name=str(number)) for number in range(7)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_looks_the_same_in_every_picture(runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn: dict[str, Figure] = {}
    monkeypatch.setattr(plots, "write_picture", lambda figure, path: drawn.update({path.stem: figure}) or save(path))
    curve = summarise([16, 32], [[2.0, 1.9], [2.2, 2.1]], [[2.0, 1.9], [2.2, 2.1]], [8, 8], 100, 8, same_text=True)
    point = RecallPoint(16, 10, 10, 0.5, 0.24, 0.76, 1.0, 0.1)
    llama = read_run(runs["llama"], "full")
    llama = replace(llama, lengths={"length": curve}, recalls={"passkey": RecallCurve("passkey", (point,), 8, 15)})
    # the first run has neither loss against length nor recall
    write_run_report([read_run(runs["swat"]), llama], tmp_path / "out")
    for name in ("length-0", "recall-0"):
        (line,) = [line for line in drawn[name].axes[0].get_lines() if line.get_marker() not in ("None", "_", "|")]
        assert (line.get_color(), line.get_marker()) == (plots.COLOURS[1], plots.MARKERS[1])


def save(path: Path) -> None:
    """Something to put on the page."""
    path.write_bytes(b"picture")
