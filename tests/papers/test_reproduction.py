"""Tables and figures end to end at a miniature scale; sizes and verdicts; errors before any training."""

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from swat_lm.model.architectures import ARCHITECTURES, build_model, configure_model, count_model_parameters
from swat_lm.papers import PAPERS, find_experiment, reproduction
from swat_lm.papers.findings import Findings
from swat_lm.papers.reproduction import (
    check_variants,
    open_plan,
    plan_without_running,
    reproduce,
    sources_from_folder,
)
from swat_lm.papers.scales import find_scale
from swat_lm.papers.swat.claims import CLAIMS, PRINTED
from swat_lm.papers.swat.scales import SCALES
from swat_lm.papers.swat.variants import ANALYSIS
from swat_lm.papers.verdicts import judge, paired_gap
from swat_lm.papers.watching import InterruptedRunError, Watcher
from swat_lm.train import DivergedError
from tests.papers.test_demo import Notes

EXPERIMENTS = PAPERS["swat"]
RESULTS = Path(__file__).parents[2] / "docs" / "results"


def keep(monkeypatch: pytest.MonkeyPatch, name: str, names: tuple[str, ...]) -> Any:
    """An experiment with some of its variants."""
    monkeypatch.setitem(EXPERIMENTS, name, replace(EXPERIMENTS[name], names=names))
    return EXPERIMENTS[name]


def test_experiments_share_variants_and_continue(
    data: Path, tmp_path: Path, in_process: list[str], monkeypatch: pytest.MonkeyPatch
):
    for name, kept in (("table2", 2), ("table3", 1), ("figure5", -2)):
        keep(monkeypatch, name, EXPERIMENTS[name].names[kept:] if kept < 0 else EXPERIMENTS[name].names[:kept])
    out, notes = tmp_path / "out", Notes()
    sources = sources_from_folder(data, EXPERIMENTS["table2"])
    found = reproduce("table2", "miniature", sources, out, [0, 1], notes)
    trained = ["vanilla-softmax-short-seed0", "vanilla-softmax-long-seed0"]
    assert set(notes.steps) == {*trained, "vanilla-softmax-short-seed1", "vanilla-softmax-long-seed1"}
    assert json.loads((out / "table2.json").read_text()) == found
    page = (out / "table2.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert page.count("as printed in the paper") == 1
    outcomes = [claim["outcome"] for claim in found["claims"]]
    assert outcomes.count("not measured") == 4
    assert found["claims"][0]["num_seeds"] == 2
    assert found["variants"][0]["losses"]["books"]["128"]["mean"] > 1

    # what another experiment needs of the same variants is there already
    notes = Notes()
    reproduce("table3", "miniature", sources, out, [0], notes)
    figure2 = reproduce("figure2", "miniature", sources, out, [0], notes)
    assert "StreamingLLM" in figure2["claims"][-1]["paper"]
    assert figure2["claims"][-1]["num_documents"] == 3
    reproduce("figure3", "miniature", sources, out, [0], notes)
    assert "what another seed would give" in (out / "figure3.html").read_text()
    assert "about 30 in 100 claims" in page
    assert set(notes.steps) == {"sliding-softmax-seed0", "sliding-alirope-seed0"}
    reproduce("figure5", "miniature", sources, out, [0], notes)
    assert set(notes.steps) == {"sliding-softmax-seed0", "sliding-alirope-seed0", "sliding-alibi-6-6-seed0"}
    for name, pictures in (("table3", 2), ("figure2", 1), ("figure3", 3), ("figure5", 1)):
        assert (out / f"{name}.html").read_text().count("data:image/png;base64,") == pictures
    in_process.clear()
    reproduce("table2", "miniature", sources, out, [0, 1], notes)
    assert in_process == []

    # a lost measurement is made again, without training
    shutil.rmtree(out / "runs" / trained[0] / "evaluation")
    notes = Notes()
    again = reproduce("table2", "miniature", sources, out, [0, 1], notes)
    assert in_process == ["table2:vanilla-softmax-short:0"]
    assert notes.steps == {}
    assert again["claims"] == found["claims"]
    with pytest.raises(ValueError, match="holds another scale or text"):
        reproduce("table2", "tiny", sources, out, [0], notes)


def test_benchmarks_on_other_documents_are_not_paired(monkeypatch: pytest.MonkeyPatch):
    results = {name: type("Result", (), {"identity": {"documents": f"sha256:{name}"}})() for name in ("a", "b")}
    asked = iter([results["a"], results["a"], results["b"]])
    monkeypatch.setattr("swat_lm.papers.findings.read_tasks", lambda folder, label: {"piqa": next(asked)})
    table1, scale = EXPERIMENTS["table1"], SCALES["miniature"]
    chosen = table1.variants(scale)
    findings = Findings(table1, scale, chosen, [0, 1], Path("out"))
    assert set(findings.tasks(chosen["llama"], 0)) == set(findings.tasks(chosen["llama"], 1)) == {"piqa"}
    with pytest.raises(ValueError, match="piqa: swat-balanced, seed 0, answered other documents"):
        findings.tasks(chosen["swat-balanced"], 0)


def test_what_the_first_token_has_from_the_start_is_no_finding(
    data: Path, tmp_path: Path, in_process: list[str], monkeypatch: pytest.MonkeyPatch
):
    def first_weights(folder: str) -> Any:
        torch.manual_seed(0)
        return build_model(AutoConfig.from_pretrained(Path(folder) / "export"))

    monkeypatch.setattr("swat_lm.model.loading.load_causal_lm", first_weights)
    sources = sources_from_folder(data, EXPERIMENTS["figure3"])
    found = reproduce("figure3", "miniature", sources, tmp_path / "out", [0], Watcher())
    assert [(claim["gap"], claim["outcome"]) for claim in found["claims"]] == [(0.0, "undecided at this scale")] * 3


def test_changed_texts_and_damaged_results_are_named(
    data: Path, tmp_path: Path, in_process: list[str], monkeypatch: pytest.MonkeyPatch
):
    table = keep(monkeypatch, "table2", EXPERIMENTS["table2"].names[:1])
    own, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(data, own)
    sources = sources_from_folder(own, table)
    found = reproduce("table2", "miniature", sources, out, [0], Watcher())
    for name in ("text", "books"):
        path = out / "runs" / "vanilla-softmax-short-seed0" / "evaluation" / f"{name}-window-8.json"
        whole = path.read_text()
        path.write_text(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=f"{name}-window-8.json is damaged .*: remove it"):
            reproduce("table2", "miniature", sources, out, [0], Watcher())
        path.write_text(whole)
    # other books under the same name would be compared with the old ones, piece by piece
    book = own / "books" / "0.txt"
    kept = book.read_text()
    book.write_text(kept + " more")
    with pytest.raises(ValueError, match="the files of the books are not those"):
        reproduce("table2", "miniature", sources, out, [0, 1], Watcher())
    book.write_text(kept)
    assert reproduce("table2", "miniature", sources, out, [0], Watcher())["claims"] == found["claims"]


def test_a_diverged_variant_does_not_stop_the_others(
    data: Path, tmp_path: Path, in_process: list[str], monkeypatch: pytest.MonkeyPatch
):
    table, run, tried = keep(monkeypatch, "table2", EXPERIMENTS["table2"].names[:2]), reproduction.run, []

    def diverging(recipe: Any, told: Any) -> Any:
        tried.append(recipe.name)
        if recipe.name == "vanilla-softmax-long-seed0":
            Path(recipe.out).mkdir(parents=True)
            raise DivergedError("the loss is nan at step 3")
        return run(recipe, told)

    monkeypatch.setattr(reproduction, "run", diverging)
    out, sources = tmp_path / "out", sources_from_folder(data, table)
    for _ in range(2):
        found = reproduce("table2", "miniature", sources, out, [0], Watcher())
        assert tried == ["vanilla-softmax-short-seed0", "vanilla-softmax-long-seed0"]
    assert found["diverged"] == ["vanilla, softmax, RoPE, L, seed 0: the loss is nan at step 3"]
    assert found["variants"][1]["training_loss"] is None
    assert found["claims"][0]["gap"] is not None
    page = (out / "table2.html").read_text()
    assert "the loss is nan at step 3" in page
    assert page.count("data:image/png;base64,") == 2


def test_a_text_that_will_not_do_keeps_no_folder(data: Path, tmp_path: Path, in_process: list[str]):
    poor = tmp_path / "poor"
    shutil.copytree(data, poor)
    for path in (poor / "books").iterdir():
        path.write_text("short")
    table = EXPERIMENTS["table2"]
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="tokens"):
        reproduce("table2", "miniature", sources_from_folder(poor, table), out, [0], Watcher())
    assert not out.exists()
    out.mkdir()
    with pytest.raises(ValueError, match="tokens"):
        reproduce("table2", "miniature", sources_from_folder(poor, table), out, [0], Watcher())
    # the user's own folder stays, as empty as it was
    assert list(out.iterdir()) == []


def test_an_interruption_is_saved(data: Path, tmp_path: Path, in_process: list[str], monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "out"
    sources = sources_from_folder(data, EXPERIMENTS["figure5"])
    run = reproduction.run
    monkeypatch.setattr(
        reproduction, "run", lambda recipe, told: type("Result", (), {"interrupted": True, "last_step": 2})()
    )
    with pytest.raises(InterruptedRunError, match="step 2 of 4"):
        reproduce("figure5", "miniature", sources, out, [0], Watcher())
    monkeypatch.setattr(reproduction, "run", run)
    keep(monkeypatch, "figure5", ("sliding-alibi-6-6", "sliding-alirope"))
    assert reproduce("figure5", "miniature", sources, out, [0], Watcher())["seeds"] == [0]


@pytest.mark.parametrize("scale", SCALES.values(), ids=lambda scale: scale.name)
def test_every_variant_has_a_recipe_and_equal_size(scale: Any):
    for experiment in EXPERIMENTS.values():
        sizes = {}
        for name, variant in experiment.variants(scale).items():
            library = ARCHITECTURES.get(variant.model.get("architecture", "swat"))
            if library is not None and library.requires and importlib.util.find_spec("fla") is None:
                continue
            recipe = experiment.recipe(variant, scale, 0, Path("out"), ("text",), "bytes")
            budget = experiment.budget(scale)
            sizes[name] = count_model_parameters(configure_model(recipe.model, budget.vocab_size)).total
        reference = sizes.get("llama") or next(iter(sizes.values()))
        assert all(size == pytest.approx(reference, rel=0.02) for size in sizes.values()), sizes


def test_dry_run_counts_the_papers_models():
    rows = {row["variant"]: row for row in plan_without_running("table3", "paper")}
    assert len(rows) == 10
    swat = rows["sliding-alirope"]
    assert round(swat["parameters"] / 1e6) == 247
    assert round(swat["tokens"] / 1e9, 1) == 19.7
    assert swat["flops"] == pytest.approx(6 * 208e6 * swat["tokens"], rel=0.1)
    assert rows["vanilla-softmax-long"]["flops"] > swat["flops"]
    # steps of the same size for all lengths, shared by eight processes
    for name in EXPERIMENTS:
        for row in plan_without_running(name, "paper"):
            assert row["rows_per_step"] % 8 == 0
            assert row["tokens"] == pytest.approx(19.66e9 if name != "table1" else 15e9, rel=0.07)
    small = plan_without_running("table3", "small")
    assert all(row["tokens"] >= 300e6 and 30e6 <= row["parameters"] <= 60e6 for row in small)


def test_verdicts_need_twice_the_error():
    worse = {0: [1.0, 1.2, 1.1, 0.9], 1: [1.1, 1.0, 1.2, 1.0]}
    better = {0: [0.5, 0.6, 0.6, 0.4], 1: [0.5, 0.6, 0.6, 0.5]}
    gap, error, documents, seeds = paired_gap(worse, better)
    assert (documents, seeds) == (4, 2)
    assert gap == pytest.approx(0.525)
    # documents: gaps averaged over seeds .55, .5, .55, .5; seeds: .525, .525
    assert error == pytest.approx(0.0288675 / 2)
    assert judge("", "", worse, better).outcome == "held"
    assert judge("", "", better, worse).outcome == "broken"
    assert judge("", "", {0: [1.0, 0.0]}, {0: [0.0, 1.0]}).outcome == "undecided at this scale"
    # a single number has no error, so nothing is decided
    assert judge("", "", {0: [9.0]}, {0: [1.0]}).outcome == "undecided at this scale"
    assert judge("", "", None, better).outcome == "not measured"
    assert judge("", "", {0: [1.0, 1.0]}, {1: [1.0, 1.0]}).outcome == "not measured"


def test_claims_and_printed_numbers_name_real_variants():
    for experiment, claims in CLAIMS.items():
        names = {side.variant for claim in claims for side in (claim.worse, claim.better)}
        assert names <= set(EXPERIMENTS[experiment].names)
    for experiment, rows in PRINTED.items():
        assert set(rows) <= set(EXPERIMENTS[experiment].names)
    assert set(ANALYSIS) == {name for experiment in EXPERIMENTS.values() for name in experiment.names}


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*-tiny.json")), ids=lambda path: path.stem)
def test_recorded_verdicts_are_those_of_today(path: Path):
    held = json.loads(path.read_text())
    experiment = EXPERIMENTS[held["experiment"]]
    scale = experiment.scales[held["scale"]]
    assert [variant["name"] for variant in held["variants"]] == list(experiment.variants(scale))
    for variant in held["variants"]:
        recipe = experiment.recipe(
            experiment.variants(scale)[variant["name"]], scale, 0, Path("out"), ("text",), "bytes"
        )
        vocab_size = experiment.budget(scale).vocab_size
        assert count_model_parameters(configure_model(recipe.model, vocab_size)).total == variant["parameters"]
        assert recipe.train.steps * recipe.train.batch_size * recipe.data.sequence_length == variant["tokens"]
    assert held["printed_in_the_paper"] == experiment.printed
    # a gap and its error again, of two documents that have them
    for claim in held["claims"]:
        gap, error = claim["gap"], claim["error"]
        again = judge("", "", {0: [gap + error, gap - error]}, {0: [0.0, 0.0]})
        assert (again.outcome, again.error) == (claim["outcome"], pytest.approx(error))
    said = [claim["says"] for claim in held["claims"]]
    assert said[: len(CLAIMS.get(experiment.name, ()))] == [claim.says for claim in CLAIMS.get(experiment.name, ())]


def test_errors_come_before_any_training(data: Path, tmp_path: Path):
    table2 = EXPERIMENTS["table2"]
    with pytest.raises(ValueError, match="did you mean 'table2'"):
        find_experiment("tabel2")
    with pytest.raises(ValueError, match="did you mean 'small'"):
        find_scale("smal", SCALES)
    with pytest.raises(ValueError, match="no folder"):
        sources_from_folder(tmp_path / "nothing", table2)
    (tmp_path / "corpus").mkdir()
    with pytest.raises(ValueError, match="lacks books/"):
        sources_from_folder(tmp_path, table2)
    with pytest.raises(ValueError, match="the folder holds no file"):
        reproduce("figure5", "miniature", sources_from_folder(tmp_path, EXPERIMENTS["figure5"]), tmp_path / "out", [0],
                  Watcher())  # fmt: skip
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="exists and is no reproduction"):
        open_plan(data, SCALES["tiny"], sources_from_folder(data, table2))
    # only Table 1 leaves out what the machine cannot run, and says so on its page
    assert "gla" not in check_variants(EXPERIMENTS["table1"], SCALES["small"])
