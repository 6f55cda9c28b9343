"""A study goes on from its records, wherever they were made; its gaps are paired; its file is checked first."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from swat_lm.papers import reproduction
from swat_lm.papers.reproduction import Sources, reproduce
from swat_lm.papers.studies import load_study, study_names
from swat_lm.papers.texts import check_same_request
from swat_lm.papers.watching import InterruptedRunError, Watcher
from tests.papers.test_demo import Notes

STUDY = """
# Two windows
title: Two windows
base: own-text
overrides: [model.hidden_size=32, model.intermediate_size=48, model.num_hidden_layers=1, model.num_attention_heads=2,
  data.sequence_length=32, data.held_out=0.3, train.warmup_steps=1, train.steps=6, train.log_every=2]
quick: [train.steps=3]
baseline: wide
changes: {wide: [model.sliding_window=16], narrow: [model.sliding_window=4]}
lengths: [1, 2]
"""


@pytest.fixture
def study(tmp_path: Path) -> str:
    (tmp_path / "mine.yaml").write_text(STUDY)
    return str(tmp_path / "mine.yaml")


def test_a_study_goes_on_from_its_records(
    study: str, data: Path, tmp_path: Path, in_process: list[str], monkeypatch: pytest.MonkeyPatch
):
    out, sources, run = tmp_path / "out", Sources((str(data / "corpus"),), (), "hub"), reproduction.run

    def stopped_at_the_third(recipe: Any, told: Any) -> Any:
        if len(list((out / "records").glob("*.json"))) == 2:
            return type("Result", (), {"interrupted": True, "last_step": 2})()
        return run(recipe, told)

    monkeypatch.setattr(reproduction, "run", stopped_at_the_third)
    with pytest.raises(InterruptedRunError, match="step 2 of 6"):
        reproduce(study, "full", sources, out, [0, 1], Watcher())
    monkeypatch.setattr(reproduction, "run", run)
    first, notes = set(in_process), Notes()
    found = reproduce(study, "full", sources, out, [0, 1], notes)
    assert len(first) == 2
    assert len(in_process) == len(set(in_process)) == 4
    assert set(notes.steps) == {"wide-seed1", "narrow-seed1"}

    # the gap is that of the records, paired by seed and piece
    records = {path.stem: json.loads(path.read_text()) for path in (out / "records").iterdir()}
    assert set(records) == {"wide-seed0", "wide-seed1", "narrow-seed0", "narrow-seed1"}
    last = {name: [row[-1] for row in record["curve"]["document_mean_loss"]] for name, record in records.items()}
    gaps = [[a - b for a, b in zip(last[f"wide-seed{x}"], last[f"narrow-seed{x}"], strict=True)] for x in (0, 1)]
    (claim,) = found["claims"]
    assert claim["gap"] == pytest.approx(sum(map(sum, gaps)) / (2 * len(gaps[0])))
    means = [sum(row) / len(row) for row in gaps]
    over_seeds = abs(means[0] - means[1]) / 2
    assert claim["error"] >= over_seeds * (1 - 1e-9)
    assert (claim["num_documents"], claim["num_seeds"]) == (len(gaps[0]), 2)
    page = (out / "mine.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "narrow has a lower loss than wide at 64 tokens" in page
    assert "The paper" not in page
    assert f"{-claim['gap']:+.4f}" in page

    # elsewhere, with nothing but the records and the same text at another place, nothing is trained
    there = tmp_path / "there"
    shutil.copytree(out / "records", there / "records")
    shutil.copytree(data / "corpus", tmp_path / "text")
    in_process.clear()
    again = reproduce(study, "full", Sources((str(tmp_path / "text"),), (), "hub"), there, [0, 1], Watcher())
    assert in_process == []
    assert not (there / "runs").exists()
    assert [again[key] for key in ("claims", "variants")] == [found[key] for key in ("claims", "variants")]
    # a missing one alone is made
    (there / "records" / "wide-seed1.json").unlink()
    third = reproduce(study, "full", Sources((str(tmp_path / "text"),), (), "hub"), there, [0, 1], Watcher())
    assert [job.rsplit(":", 2)[1:] for job in in_process] == [["wide", "1"]]
    assert math.isclose(third["claims"][0]["gap"], claim["gap"], abs_tol=1e-9)

    # a record made before a setting existed has its default
    older = json.loads((there / "records" / "narrow-seed1.json").read_text())
    del older["identity"]["train"]["eps"]
    (there / "records" / "narrow-seed1.json").write_text(json.dumps(older))

    # a record of another run is neither used nor replaced
    other = json.loads((there / "records" / "narrow-seed0.json").read_text())
    other["identity"]["train"]["learning_rate"] = 0.5
    (there / "records" / "narrow-seed0.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"narrow-seed0\.json is of another run \(train\.learning_rate is 0\.5 there"):
        reproduce(study, "full", Sources((str(tmp_path / "text"),), (), "hub"), there, [0, 1], Watcher())
    for damaged in ("{", "[1]"):
        (there / "records" / "narrow-seed0.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"narrow-seed0\.json is damaged .*: remove it"):
            reproduce(study, "full", Sources((str(tmp_path / "text"),), (), "hub"), there, [0, 1], Watcher())


def test_outcomes_are_kept_beside_losses(study: str, data: Path, tmp_path: Path, in_process: list[str]):
    Path(study).write_text(STUDY.replace("model.sliding_window=16", "model.sliding_window=64"))
    out, sources = tmp_path / "out", Sources((str(data / "corpus"),), (), "hub")
    reproduce(study, "full", sources, out, [0], Watcher())
    first = len(in_process)
    Path(study).write_text(Path(study).read_text() + "outcomes: [attention, recall]\n")
    # a record without them is made again
    reproduce(study, "full", sources, out, [0], Watcher())
    assert len(in_process) == 2 * first
    record = json.loads((out / "records" / "wide-seed0.json").read_text())
    attention, recall = (record["outcomes"][name] for name in ("attention", "recall"))
    assert attention["length"] == 32
    assert list(attention["output_norm"]) == ["1", "2", "4", "8", "16", "32"]
    assert 0 < attention["first_token_mass"] < attention["row_sum"]
    assert [curve["task"] for curve in recall] == ["passkey", "mqar"]
    # 48 bytes are too few for the text of several keys
    assert [point["distance"] for point in recall[0]["points"]] == [48, 64, 128, 256]
    assert [point["num_items"] for point in recall[1]["points"]] == [32] * 3
    assert "wide, seed 0" in (out / "mine.html").read_text()
    reproduce(study, "full", sources, out, [0], Watcher())
    assert len(in_process) == 2 * first


def test_a_tokenizer_of_its_own_on_a_share_of_the_text(study: str, data: Path, tmp_path: Path, in_process: list[str]):
    Path(study).write_text(STUDY + "vocab_size: 300\ntext_bytes: 20000\n")
    out, sources = tmp_path / "out", Sources((str(data / "corpus"),), (), "hub")
    found = reproduce(study, "full", sources, out, [0], Watcher())
    (row, _) = found["variants"]
    record = json.loads((out / "records" / "wide-seed0.json").read_text())
    # two embeddings of 300 ids, an attention and a SwiGLU layer, three norms, and those of queries and keys of a head
    assert row["parameters"] == record["parameters"] == 2 * 300 * 32 + 4 * 32 * 32 + 3 * 32 * 48 + 3 * 32 + 2 * 16
    shares = [json.loads(line)["text"] for line in (out / "text.jsonl").read_text().splitlines()]
    whole = {path.read_text() for path in (data / "corpus").iterdir()}
    assert set(shares) < whole
    assert 20_000 < sum(map(len, shares)) < 40_000
    # another share or another tokenizer would be another study
    Path(study).write_text(STUDY + "vocab_size: 280\ntext_bytes: 20000\n")
    with pytest.raises(ValueError, match=r"vocab_size was 300 and is 280\): name another folder"):
        reproduce(study, "full", sources, out, [0], Watcher())


def test_fewer_pieces_than_asked_for_are_told(study: str, data: Path, tmp_path: Path, in_process: list[str]):
    told, sources = [], Sources((str(data / "corpus"),), (), "hub")
    for pieces in (1, 10_000):
        Path(study).write_text(STUDY + f"pieces: {pieces}\n")
        notes = Notes()
        assert reproduce(study, "full", sources, tmp_path / str(pieces), [0], notes)["claims"]
        told.append([stage for stage in notes.stages if "fewer count" in stage])
    record = json.loads((tmp_path / "10000" / "records" / "wide-seed0.json").read_text())
    num_pieces = record["curve"]["points"][0]["num_documents"]
    assert told == [[], [f"the text to evaluate on fills {num_pieces} pieces of 64 tokens, not 10000: fewer count"]]


def test_kinds_of_one_folder_have_tokenizers_of_their_own(tmp_path: Path):
    check_same_request(tmp_path, "table1", {"vocab_size": 32_000})
    check_same_request(tmp_path, "analysis", {"vocab_size": 50_257})
    with pytest.raises(ValueError, match=r"vocab_size was 32000 and is 300"):
        check_same_request(tmp_path, "table1", {"vocab_size": 300})


def test_a_text_that_will_not_do_keeps_the_records(study: str, tmp_path: Path, in_process: list[str]):
    (tmp_path / "out" / "records").mkdir(parents=True)
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(ValueError, match="token"):
        reproduce(study, "full", Sources((str(tmp_path / "short.txt"),), (), "hub"), tmp_path / "out", [0], Watcher())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["records"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "title: Two windows",
            "titel: Two windows",
            r"mine\.yaml:3: unknown key titel; .* is title",
        ),
        ("lengths: [1, 2]", "lengths: [2, 3]", "lengths: expected rising numbers that divide the last"),
        ("lengths: [1, 2]", "lengths: 2", "lengths must be a list of whole numbers; got 2"),
        ("baseline: wide", "baseline: with", "expected one of two or more changes; got 'with' of wide, narrow"),
        ("lengths: [1, 2]", "lengths: [1, two]", r"lengths\[1\] must be a whole number; got 'two'"),
        ("lengths: [1, 2]", "lengths: [1, 2]\nseeds: [0, -1]", r"seeds\[1\] must be at least 0; got -1"),
        ("lengths: [1, 2]", "lengths: [1, 2]\nseeds: [0, 0]", "seeds: expected one or more different numbers"),
        ("train.steps=6", "train.steps=6, model.init=x", "leave model.init out"),
        ("[model.sliding_window=4]", "4", r"mine\.yaml:\d+: changes\.narrow must be a list of text; got 4"),
        ("narrow: [model", "a/b: [model", "expected a name of letters"),
        ("model.sliding_window=4", "data.held_out=0.5", "the same for all variants"),
        ("train.steps=6", "train.stepz=6", r"train\.stepz"),
        ("title: Two", "title: [", "not valid YAML"),
        ("lengths: [1, 2]", "lengths: [1, 2]\nvocab_size: 100", "vocab_size must be at least 259; got 100"),
        ("lengths: [1, 2]", "lengths: [1, 2]\ntext_bytes: 0", "text_bytes must be at least 1; got 0"),
        ("lengths: [1, 2]", "lengths: [1, 2]\npieces: 0", "pieces must be at least 1; got 0"),
        ("train.steps=6,", "train.steps=6, data.tokenizer=x,", "vocab_size trains a tokenizer, and overrides name one"),
        (
            "train.steps=6,",
            "train.steps=6, data.text_field=x,",
            "text_field is 'x', and vocab_size and text_bytes read",
        ),
        ("lengths: [1, 2]", "lengths: [1, 2]\noutcomes: [sinks]", "outcomes: expected some of attention, recall; got"),
    ],
)
def test_a_wrong_file_is_named_before_any_run(study: str, old: str, new: str, message: str):
    more = "vocab_size: 300\n" if "data.t" in new else ""
    Path(study).write_text(STUDY.replace(old, new) + more)
    with pytest.raises(ValueError, match=message):
        load_study(study)


@pytest.mark.parametrize("name", study_names())
def test_studies_of_ours_can_be_run(name: str):
    study = load_study(name)
    for scale in study.scales.values():
        chosen = reproduction.check_variants(study, scale)
        assert study.spec.baseline in chosen
        # what is compared is equally large but for an arm's own gates; a number per head is nothing
        sizes = set()
        for row in reproduction.plan_without_running(study.key, scale.name):
            model = study.load(study.spec.changes[row["variant"]], scale.name).model
            gates = model["hidden_size"] * model["num_attention_heads"] * model["num_hidden_layers"]
            sizes.add(row["parameters"] - gates * model.get("output_gate", False))
        assert max(sizes) - min(sizes) <= 1e-3 * min(sizes)


def test_the_command_lists_and_checks(cli, here: Path, study: str):
    listed = cli("study")
    assert listed.code == 0
    assert all(name in listed.out for name in study_names())
    assert "did you mean 'windows'?" in cli("study", "windws").err
    plan = cli("study", study, "--dry-run", "--seeds", "0,1").out
    assert "narrow" in plan
    assert "2 runs a seed, 2 seeds" in plan
    assert "nothing" in cli("study", study, "--dry-run", "--text", "nothing").err
    assert "cannot write --out run.yaml" in cli("study", study, "--out", "run.yaml").err
