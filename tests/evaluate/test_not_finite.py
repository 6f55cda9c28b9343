"""Losses and perplexities beyond any float are told, kept as valid JSON and drawn, wherever they come from."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from swat_lm import SwatForCausalLM
from swat_lm.evaluate.curves import LengthCurve, LengthPoint, WindowMatrix
from swat_lm.evaluate.figures import figure_text, perplexity, read_figures, write_figures
from swat_lm.evaluate.heatmaps import plot_heat_map
from swat_lm.evaluate.plots import Series, plot_loss_by_length, plot_training
from swat_lm.papers.pictures import plot_rows


def strict(text: str) -> Any:
    """JSON as the standard has it."""

    def refuse(name: str) -> None:
        raise AssertionError(f"not JSON: {name}")

    return json.loads(text, parse_constant=refuse)


def spoil(folder: Path, factor: float) -> Path:
    """A model folder whose last layer is multiplied: its losses grow by as much."""
    model = SwatForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(factor)
    spoilt = folder.with_name(f"times-{factor:g}")
    model.save_pretrained(spoilt)
    for path in folder.glob("tokenizer*"):
        (spoilt / path.name).write_bytes(path.read_bytes())
    return spoilt


def test_perplexities_and_json():
    assert perplexity(1.0) == math.e
    assert perplexity(709.7) < math.inf == perplexity(710) == perplexity(math.inf)
    assert math.isnan(perplexity(math.nan))
    values = {"a": [1.5, math.inf, -math.inf, None], "b": (math.nan, 2), "c": "text", "d": {"e": True}}
    again = read_figures(write_figures(values))
    assert strict(write_figures(values)) == {
        "a": [1.5, "Infinity", "-Infinity", None], "b": ["NaN", 2], "c": "text", "d": {"e": True}
    }  # fmt: skip
    assert (again["a"], again["c"], again["d"]) == (values["a"], "text", {"e": True})
    assert math.isnan(again["b"][0])
    # as earlier versions wrote it
    assert read_figures('{"a": [Infinity]}') == {"a": [math.inf]}
    shown = [figure_text(value, 2) for value in (12.345, 1e5, 1e300, math.inf, math.nan)]
    assert shown == ["12.35", "100,000.00", "1.0e+300", "inf", "nan"]


def test_curves_keep_what_is_not_finite():
    points = tuple(LengthPoint(size, 2, math.inf, None, math.nan, None, 8) for size in (4, 8))
    curve = LengthCurve(points, 10, 8, False, ((math.inf, None), (math.inf, 2.0)), ((1.0, None), (math.nan, 2.0)))
    again = LengthCurve.from_json(json.dumps(strict(curve.to_json())))
    assert again.document_mean_loss == curve.document_mean_loss
    assert math.isnan(again.document_tail_loss[1][0] or 0.0)
    assert WindowMatrix(("4",), (again,)).losses() == [[math.inf, math.inf]]


@pytest.mark.parametrize("y", [[1.0, math.inf, math.nan], [math.inf] * 3, [math.nan] * 3], ids=["some", "inf", "nan"])
def test_pictures_leave_out_what_no_axis_holds(y: list[float], tmp_path: Path):
    series = Series("one", [1, 2, 4], y, [None, math.inf, math.nan])
    drawn: list[Callable[[Path], None]] = [
        lambda path: plot_loss_by_length([series], path, training_length=2),
        lambda path: plot_training([series], [Series("held", [2], [math.inf])], path),
        lambda path: plot_heat_map(
            [y, y], path, rows=["a", "b"], columns=["1", "2", "4"], ylabel="y", xlabel="x", scale="loss"
        ),
        lambda path: plot_rows([(str(one), one, math.inf) for one in y], path, xlabel="loss", from_zero=True),
    ]
    for number, draw in enumerate(drawn):
        draw(tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").read_bytes().startswith(b"\x89PNG")


def test_length_gives_infinite_perplexity_and_bits_per_byte(
    cli, here: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "120")
    beyond = spoil(exported, 3e4)
    ran = cli("evaluate", "length", beyond, "--data", "text", "--lengths", "16,64", "--out", "out")
    assert ran.code == 0, ran.err
    points = strict((here / "out/length.json").read_text())["points"]
    assert all(point["mean_loss"] > 710 for point in points)
    assert points[0]["bits_per_byte"] == pytest.approx(points[0]["mean_loss"] / math.log(2), rel=0.2)
    rows = [line.split() for line in ran.out.splitlines()]
    assert "inf" in next(row for row in rows if row and row[0] == "64")
    assert (here / "out/length.png").exists()

    nothing = spoil(exported, math.nan)
    ran = cli("evaluate", "length", nothing, "--data", "text", "--lengths", "16,64", "--window", "4,own", "--out", "no")
    assert ran.code == 0, ran.err
    assert strict((here / "no/windows.json").read_text())["4"]["points"][0]["mean_loss"] == "NaN"


def test_what_was_measured_is_kept_before_it_is_drawn(cli, here: Path, exported: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise ValueError("no pictures today")

    for name in ("plots.plot_loss_by_length", "recall_plots.plot_recall", "recall_plots.plot_reach",
                 "diagnosis_plots.plot_diagnosis"):  # fmt: skip
        monkeypatch.setattr(f"swat_lm.evaluate.{name}", fail)
    for command, options in (
        ("length", ["--data", "text", "--lengths", 16]),
        ("recall", ["--task", "copy", "--distances", 64, "--samples", 2]),
        ("reach", ["--data", "text", "--length", 16]),
        ("diagnose", ["--data", "text", "--length", 16]),
    ):
        ran = cli("evaluate", command, exported, *options, "--out", command)
        assert "no pictures today" in ran.err
        (written,) = (here / command).iterdir()
        assert strict(written.read_text())


def test_tasks_on_text_without_spaces(cli, here: Path, exported: Path):
    pytest.importorskip("lm_eval")
    thai = "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01" * 20
    (here / "bench/lm").mkdir(parents=True)
    pages = "".join(json.dumps({"page": page}) + "\n" for page in (thai, thai[:90]))
    (here / "bench/lm/wikitext-2-raw.test.jsonl").write_text(pages)
    row = {"text": f"{thai} {thai}"}
    (here / "bench/commonsense").mkdir()
    (here / "bench/commonsense/lambada_openai_test.jsonl").write_text(2 * (json.dumps(row) + "\n"))
    tasks = "wikitext,wikitext_streamed,lambada_openai"
    ran = cli("evaluate", "tasks", f"mine={exported}", "--data", "bench", "--tasks", tasks, "--out", "table")
    assert ran.code == 0, ran.err
    assert "mine: wikitext bits_per_byte " in ran.out
    lines = {line.split("   ")[0]: line.split() for line in ran.out.splitlines()}
    assert lines["Wiki ppl"][-1] == lines["LMB ppl"][-1] == "inf"
    for path in (here / "table").rglob("*.json"):
        strict(path.read_text())
    assert "inf" in (here / "table/table.html").read_text()
    # read again, not measured again
    again = cli("evaluate", "tasks", f"mine={exported}", "--data", "bench", "--tasks", tasks, "--out", "table")
    assert again.out == ran.out
