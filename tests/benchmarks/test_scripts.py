"""The benchmarks on models so small that they take seconds: that they run and judge, not how fast anything is."""

import importlib
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import (
    attention_cpu,
    decode_cpu,
    hybrid_peers,
    hybrids_cpu,
    layer_steps,
    measure,
    models,
    record,
    selection_cpu,
    spade_cpu,
    table,
    train_cpu,
)

WIDTH, VOCABULARY = 64, 97


@pytest.mark.parametrize("name", [*table.BENCHMARKS, "table", "record"])
def test_help(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as left:
        importlib.import_module(f"benchmarks.{name}").main()
    assert left.value.code == 0
    assert "--" in capsys.readouterr().out


def test_a_script_of_layers_keeps_what_it_measured(monkeypatch, capsys, tmp_path: Path):
    monkeypatch.setattr(record, "OWN", tmp_path)
    monkeypatch.setattr(measure, "require_green_tests", lambda *paths: None)
    # of one commit, without changes
    monkeypatch.setattr(measure, "machine", lambda: {"commit": "abc"})
    done: list[int] = []

    def measured(length: int) -> list[layer_steps.Row]:
        if length == 16 and len(done) == 1:
            done.append(0)
            raise KeyboardInterrupt
        done.append(length)
        return [{"length": length, "s": 0.5}]

    def judge(rows: list[layer_steps.Row]) -> list[layer_steps.Row]:
        return [measure.goal("lengths", 2, len(rows))]

    def tasks(lengths: tuple[int, ...], quick: bool) -> dict[str, Callable[[], list[layer_steps.Row]]]:
        return {f"T {length}": partial(measured, length) for length in lengths}

    script = layer_steps.Script("selection_cpu", "A script.", (), {}, (8, 16), tasks, judge, quick_lengths=(4,))
    monkeypatch.setattr(sys, "argv", ["script"])
    with pytest.raises(KeyboardInterrupt):
        script.main()
    # goes on after what it has, and leaves the result alone
    script.main()
    assert done == [8, 0, 16]
    assert "reached  lengths: 2" in capsys.readouterr().out
    (saved,) = tmp_path.iterdir()
    result = json.loads(saved.read_text())
    assert [row["length"] for row in result["rows"]] == result["settings"]["lengths"] == [8, 16]
    for options, lengths in ((["--quick"], [4]), (["--lengths", "16"], [16])):
        done[:] = [8, 8]
        monkeypatch.setattr(sys, "argv", ["script", *options])
        script.main()
        assert done[2:] == lengths
    assert json.loads(saved.read_text())["settings"]["lengths"] == [16]


def test_rows_of_selections(monkeypatch):
    monkeypatch.setattr(selection_cpu, "peak", lambda script, making, length: length * 2**20)
    rows = [row for length in (64, 128) for row in selection_cpu.compare(length, 1)]
    goals = selection_cpu.judge(rows)
    assert len(goals) == 2 * len(selection_cpu.MOST) + 2 * len(selection_cpu.MOST)
    assert goals[0]["measured"] == pytest.approx(rows[0]["window s"] / rows[0]["sparsek 64 s"], abs=1e-3)
    assert goals[-1]["measured"] == pytest.approx(1)


def test_rows_of_hybrids(monkeypatch):
    monkeypatch.setattr(hybrids_cpu, "peak", lambda script, making, length: length * 1000)
    monkeypatch.setattr(hybrids_cpu, "CHUNKS", (16, 32))
    rows = hybrids_cpu.compare_executions(0.25, (64, 256), 1)
    assert rows[1]["growth of bytes"] == pytest.approx(1)
    assert rows[0]["sparse times dense"] == pytest.approx(rows[0]["dense s"] / rows[0]["sparse s"])
    rows += hybrids_cpu.compare_recurrences((64, 128), 1)
    assert {row["its best"] for row in rows[2:]} <= {"chunk 16", "chunk 32"}
    goals = hybrids_cpu.judge(rows)
    assert [line["wanted"] for line in goals] == [1.0, 1.0, 3.0, 3.0]
    assert all(line["measured"] > 0 for line in goals)


@pytest.mark.parametrize("name", hybrid_peers.PEERS)
def test_rows_of_peers(monkeypatch, name):
    monkeypatch.setattr(hybrid_peers, "ROW", 16)
    row = hybrid_peers.compare_peer(name, 64, 32, 1, 1)
    assert row["length"] == 32
    if name == "jamba":
        assert row["largest difference"] == "another mixer"
        return
    assert row["largest difference"] < 1e-4
    assert row["loss, ours"] == pytest.approx(row["loss, theirs"], abs=1e-4)
    assert hybrids_cpu.judge([row]) == []


def test_goals_of_a_state_space():
    """Of time and of memory over both lengths, and a time that grows as the square misses its goal."""

    def row(length, seconds, mebibytes):
        own = {name: {"s": seconds, "MiB": mebibytes} for name in ("window", "spade kept")}
        figures = {f"{name} {unit}": value for name, found in own.items() for unit, value in found.items()}
        return {"length": length, "batch": 1, "spade kept / window": 2.0, "spade anew / window": 4.0, **figures}

    goals = spade_cpu.judge([row(2048, 1.0, 100), row(16384, 64.0, 800), {"taps": 2048}])
    reached = {line["goal"].split(",")[-1]: line["reached"] for line in goals if "linear" in line["goal"]}
    assert reached == {" 1 / the slope of log time": False, " 1 / the slope of log memory": True}
    assert [line["reached"] for line in goals if "kept: a window" in line["goal"]] == [True, True]


def test_training_row():
    row = train_cpu.compare(train_cpu.Task(256, WIDTH, VOCABULARY), rounds=1, memory=False)
    assert "not measured" not in row
    assert all(row[f"{name} s"] > 0 for name in train_cpu.BUILDERS)
    assert row["swat share / llama"] == pytest.approx(row["swat times llama"] / row["predicted / llama"])
    goals = train_cpu.judge(row)
    assert [line["measured"] for line in goals] == [
        round(row["swat share / mistral"], 3),
        round(row["swat share / llama"], 3),
    ]


def test_training_steps_learn_alike():
    # the same weights and tokens: the softmax window's and Mistral's losses stay equal over steps
    task = train_cpu.Task(200, WIDTH, VOCABULARY)
    ours, peer = train_cpu.TrainingStep("softmax window", task), train_cpu.TrainingStep("mistral sdpa", task)
    losses = [(ours(), peer()) for _ in range(3)]
    assert losses[0][0] > losses[2][0]
    for left, right in losses:
        assert left == pytest.approx(right, abs=1e-4)


def test_what_cannot_fit_is_left_out_beforehand(monkeypatch):
    assert "GiB" in (train_cpu.too_large("mistral eager", train_cpu.Task(16384, 512, 256)) or "")
    assert train_cpu.too_large("mistral eager", train_cpu.Task(4096, 512, 256)) is None
    assert train_cpu.too_large("mistral sdpa", train_cpu.Task(16384, 512, 256)) is None
    monkeypatch.setattr(train_cpu, "MEMORY_LIMIT", 2**20)
    row = train_cpu.compare(train_cpu.Task(256, WIDTH, VOCABULARY), rounds=1, memory=False)
    assert row["not measured"].startswith("mistral eager: its scores alone need")
    assert "mistral eager s" not in row
    assert row["best mistral"] == "mistral sdpa"


def test_predicted_ratio_counts_pairs_and_matrices():
    length, width = 1024, 128
    task = train_cpu.Task(length, width, VOCABULARY)
    weights = sum(
        p.numel()
        for name, p in models.mistral(width, VOCABULARY).named_parameters()
        if p.dim() == 2 and "embed" not in name
    )
    inside = sum(min(t + 1, models.WINDOW) for t in range(length))

    def flops(pairs: int) -> int:
        return 2 * weights * length + 4 * models.LAYERS * width * pairs

    assert train_cpu.predicted_ratio("mistral sdpa", task) == pytest.approx(flops(length**2) / flops(inside))
    causal = length * (length + 1) // 2
    assert train_cpu.predicted_ratio("llama sdpa", task) == pytest.approx(flops(causal) / flops(inside))


@torch.inference_mode()
def test_decoding_row():
    sizes = decode_cpu.Sizes(prompt=600, segments=2, steps=3, rounds=1)
    decode_cpu.check_same_function(VOCABULARY, WIDTH)
    row = decode_cpu.against_mistral(2, VOCABULARY, sizes, WIDTH)
    assert row["swat chunk"] in (256, 512)
    assert row["best prefill peer"] in decode_cpu.PEERS
    assert row["decode times mistral"] > 0
    assert 0 < row["swat ms per step, products alone"] < row["swat ms per step"]
    assert row["times mistral, were nothing else to do"] > 0
    # window places of keys and values in every layer, and one position per stream
    assert row["swat state bytes"] == 2 * (2 * models.LAYERS * models.WINDOW * WIDTH * 4 + 8)


@torch.inference_mode()
def test_bandwidth_row():
    sizes = decode_cpu.Sizes(prompt=300, rounds=1)
    row = decode_cpu.against_bandwidth(sizes, width=WIDTH, layers=2, vocabulary=VOCABULARY)
    assert row["share of bandwidth"] > 0
    parameters = row["parameters"] - VOCABULARY * WIDTH + WIDTH
    assert row["bytes per token"] == 4 * (parameters + 2 * 2 * models.WINDOW * WIDTH)


def test_unequal_models_are_not_measured():
    logits = torch.randn(1, 3, 5)
    models.check_equal("a model", logits + 1e-6, logits)
    with pytest.raises(SystemExit, match="a model differs from its peer by"):
        models.check_equal("a model", logits + 1e-2, logits)
    with pytest.raises(SystemExit, match="a model differs"):
        models.check_equal("a model", torch.full_like(logits, float("nan")), logits)


def test_same_weights_give_the_same_function():
    models.check_same_function(WIDTH, VOCABULARY)


@pytest.mark.parametrize("option", ["", "--quick", "--record"])
def test_runs_judge_their_rows_and_only_full_ones_are_saved(option, monkeypatch, capsys, tmp_path):
    own, committed = tmp_path / "own", tmp_path / "record"
    monkeypatch.setattr(record, "OWN", own)
    monkeypatch.setattr(measure, "RESULTS", committed)
    monkeypatch.setattr(sys, "argv", ["benchmark", "--threads", "1", *([option] if option else [])])
    monkeypatch.setattr(measure, "require_green_tests", lambda *paths: None)
    monkeypatch.setattr(models, "check_same_function", lambda *sizes: None)
    share = {"forward_share": 0.9, "backward_share": 0.7}
    monkeypatch.setattr(attention_cpu, "against_the_roof", lambda length, window, rounds: {"window": window, **share})
    monkeypatch.setattr(attention_cpu, "against_flex", lambda *sizes: {})
    monkeypatch.setattr(attention_cpu, "against_masks", lambda *sizes: {"times_sdpa": 50.0})
    monkeypatch.setattr(attention_cpu, "memory_by_length", lambda lengths: {})
    shares = {"swat share / mistral": 0.9, "swat share / llama": 0.7}
    monkeypatch.setattr(
        train_cpu,
        "compare",
        lambda task, rounds: {"length": task.length, "width": task.width, "vocabulary": task.vocabulary, **shares},
    )
    monkeypatch.setattr(decode_cpu, "check_same_function", lambda vocabulary: None)
    monkeypatch.setattr(
        decode_cpu, "against_mistral", lambda *sizes: {"decode times mistral": 2.5, "prefill times mistral": 0.9}
    )
    monkeypatch.setattr(decode_cpu, "against_bandwidth", lambda *sizes: {"share of bandwidth": 0.5})
    threads = torch.get_num_threads()
    for script in (attention_cpu, train_cpu, decode_cpu):
        script.main()
    torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert "MISSED   backward, W 128: share of its roof: 0.7" in out
    assert "MISSED   T 4096, width 512" in out or "MISSED   T 2048, width 512" in out
    assert "reached  batch 16, vocabulary 8192: times Mistral's tokens/s: 2.5" in out
    assert "MISSED   batch 1, vocabulary 256: times Mistral's prefill: 0.9" in out
    assert "MISSED   100M parameters: share of the read bandwidth: 0.5" in out
    # whole: what is kept for an interrupted run is gone; the record changes on request alone
    saved = {"attention_cpu.json": (4, 7), "train_cpu.json": (8, 16), "decode_cpu.json": (5, 9)}
    assert sizes(own) == ({} if option == "--quick" else saved)
    assert sizes(committed) == (saved if option == "--record" else {})
    if not option:
        assert f"python -m benchmarks.record {own / 'train_cpu.json'}    makes this the record" in out


def sizes(folder: Path) -> dict[str, tuple[int, int]]:
    """Of every file its rows and goals."""
    results = {path.name: json.loads(path.read_text()) for path in folder.glob("*")}
    return {name: (len(result["rows"]), len(result["goals"])) for name, result in results.items()}


def test_a_quick_run_is_no_record(monkeypatch, capsys):
    for script in (attention_cpu, train_cpu, decode_cpu):
        monkeypatch.setattr(sys, "argv", ["benchmark", "--quick", "--record"])
        with pytest.raises(SystemExit) as left:
            script.main()
        assert left.value.code == 2
        assert "--record goes without --quick" in capsys.readouterr().err
