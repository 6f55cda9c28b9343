"""`swat-lm tune` on a card of the tests' own: what is measured, shown, written, kept and refused."""

import io
import json
import os
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

from swat_lm.ops.triton import autotune, configurations
from swat_lm.ops.triton.autotune import BACKWARD, FIVE_PRODUCTS, KERNELS, Calls, Trials
from swat_lm.ops.triton.configurations import FORM, Tile, backward_form, configuration, tuned_key

CARD = "NVIDIA H100 80GB HBM3"
# of each kernel what is fastest on this card, of the tiles that are tried
FASTEST = {
    "forward": Tile(64, 32, 4, 3),
    "backward query": Tile(128, 32, 8, 2),
    "backward key": Tile(32, 128, 8, 3),
    FIVE_PRODUCTS: Tile(32, 64, 4, 2),
}
OPTIONS = ["--window", "1000", "--head-dim", "64", "--heads", "8", "--kv-heads", "2"]


class Card:
    """Stands for the GPU: milliseconds follow from the tiles and the form in use."""

    def __init__(self) -> None:
        self.calls: list[dict] = []
        self.measured = 0
        self.stop_at: int | None = None
        self.error: BaseException = KeyboardInterrupt()

    def call_for(self, problem, num_tokens, num_heads, batch, score_bias, packed):
        self.calls.append(
            {"problem": problem, "tokens": num_tokens, "heads": num_heads, "batch": batch, "bias": score_bias,
             "packed": packed}
        )  # fmt: skip

        def forward():
            return 0.5 if configuration("forward", problem) == FASTEST["forward"] else 1.0

        def backward():
            five = backward_form(problem) == "five products"
            kernels = [FIVE_PRODUCTS] if five else ["backward query", "backward key"]
            return 4.0 - 0.5 * five - sum(configuration(kernel, problem) == FASTEST[kernel] for kernel in kernels)

        return Calls(forward, backward)

    def bench(self, run):
        self.measured += 1
        if self.measured == self.stop_at:
            raise self.error
        return run()


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    pytest.importorskip("triton", reason="triton is not installed")
    card = Card()
    monkeypatch.delenv(configurations.TILES_VARIABLE, raising=False)
    monkeypatch.delenv(configurations.FORM_VARIABLE, raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device=None: CARD)
    monkeypatch.setattr(autotune, "call_for", card.call_for)
    monkeypatch.setattr(autotune, "_bench", card.bench)
    return card


def kernels_of(path: Path) -> list[str]:
    return [key.partition(" | ")[0] for key in json.loads(path.read_text())]


def words_of(line: str) -> list[str]:
    return re.split(r"\s{2,}", line.strip())


def test_a_preset(cli, here: Path, card: Card, monkeypatch):
    ran = cli("tune", "swat-340m", "--batch", 4, "--out", "new/tiles.json")
    assert ran.code == 0, ran.err
    title, head, *rows, legend, export = ran.out.splitlines()
    assert title == "sigmoid, window 1,024, 16 heads of 64, 24 layers; 4 x 4,096 tokens, bfloat16"
    assert words_of(head) == ["kernel", "without the file", "ms", "fastest", "ms", "gain"]
    assert [words_of(row) for row in rows] == [
        ["forward", "128x128 w8 s2", "1", "64x32 w4 s3", "0.5", "2.00 x"],
        ["backward query", "128x64 w8 s2", "4", "128x32 w8 s2", "3", "1.33 x"],
        ["backward key", "64x128 w8 s2", "3", "32x128 w8 s3", "2", "1.50 x"],
        ["five products", "64x128 w8 s2", "3.5", "32x64 w4 s2", "2.5", "1.40 x"],
        ["backward form", "five products", "2.5", "two kernels", "2", "1.25 x"],
    ]
    assert legend == "a tile: rows x keys, warps, stages, registers at most; ms of a whole forward or backward"
    # the path is as long as it is
    assert all(len(line) <= 88 for line in (title, head, *rows, legend))
    # one kind of attention in 24 layers, called as a model calls it
    (call,) = card.calls
    assert (call["tokens"], call["heads"], call["batch"], call["bias"], call["packed"]) == (4096, 16, 4, 0.0, False)
    assert call["problem"].rotary
    assert ran.err.startswith("sigmoid, window 1,024: forward: 0/9\n")
    assert "sigmoid, window 1,024: forward: 9/9  best 0.5 ms, 64x32 w4 s3  0:00 left\n" in ran.err
    assert ran.err.splitlines()[-1].startswith("sigmoid, window 1,024: backward form: 2/2  best 2 ms, two kernels")

    # the line that was printed is all it takes
    name, path = export.removeprefix("export ").split("=")
    assert path == str(here / "new" / "tiles.json")
    monkeypatch.setenv(name, path)
    assert {kernel: configuration(kernel, call["problem"]) for kernel in FASTEST} == FASTEST
    assert backward_form(call["problem"]) == "two kernels"


def test_a_file_is_extended(cli, here: Path, card: Card):
    assert cli("tune", *OPTIONS, "--kernels", "forward", "--out", "tiles.json").code == 0
    assert kernels_of(here / "tiles.json") == ["forward"]
    before = json.loads((here / "tiles.json").read_text())
    ran = cli("tune", *OPTIONS, "--kernels", "backward", "--dtype", "float16", "--length", 2000, "--out", "tiles.json")
    assert ran.code == 0
    assert ran.out.startswith("sigmoid, window 1,000, 8 heads over 2 of 64, 1 layer; 1 x 2,000 tokens, float16\n")
    after = json.loads((here / "tiles.json").read_text())
    assert before.items() <= after.items()
    assert sorted(kernels_of(here / "tiles.json")) == sorted(KERNELS)
    assert tuned_key(FORM, card.calls[1]["problem"]) in after
    assert [path.name for path in here.iterdir() if "tiles" in path.name] == ["tiles.json"]


def test_options_describe_a_call(cli, here: Path, card: Card):
    assert cli("tune", "--window", 10_000, "--head-dim", 33, "--heads", 6, "--score-function", "softmax", "--packed",
               "--no-rotary", "--out", "tiles.json").code == 0  # fmt: skip
    (call,) = card.calls
    problem = call["problem"]
    assert (problem.window, problem.head_dim, problem.group, problem.softmax) == (10_000, 33, 1, True)
    assert (problem.rotary, problem.dtype, call["packed"], call["tokens"]) == (False, torch.bfloat16, True, 20_000)


def test_every_kind_of_attention_of_a_recipe(cli, here: Path, card: Card):
    (here / "kinds.yaml").write_text(
        "model: {hidden_size: 32, intermediate_size: 48, num_hidden_layers: 5, num_attention_heads: 4, "
        "num_key_value_heads: 2, sliding_window: [600, 1000, 1000, null, 64], score_bias: [0, -3, -3, 0, 0]}\n"
        "data: {sources: [text], sequence_length: 4096}\n"
    )
    ran = cli("tune", "kinds.yaml", "--kernels", "forward", "--out", "tiles.json")
    assert ran.code == 0, ran.err
    titles = [line for line in ran.out.splitlines() if line.startswith("sigmoid")]
    told = "4 heads over 2 of 8, {}; 1 x 4,096 tokens, packed, bfloat16"
    assert titles == [
        f"sigmoid, window 1,000, {told.format('3 layers')}",
        f"sigmoid, full attention, {told.format('1 layer')}",
        f"sigmoid, window 64, {told.format('1 layer')}",
    ]
    # documents are kept apart unless a recipe says otherwise
    assert [(call["problem"].window, call["bias"], call["packed"]) for call in card.calls] == [
        (1000, -3.0, True), (4096, 0.0, True), (64, 0.0, True),
    ]  # fmt: skip
    assert ran.err.splitlines()[:2] == [
        "note: sigmoid, window 600: has the tiles of sigmoid, window 1,000, which are measured",
        "note: full attention is measured, and kept, as a window of the 4,096 tokens of --length",
    ]
    assert kernels_of(here / "tiles.json") == ["forward"] * 3
    cli("tune", "kinds.yaml", "data.documents=concatenate", "--kernels", "forward", "-o", "tiles.json")
    cli("tune", "kinds.yaml", "--not-packed", "--kernels", "forward", "-o", "tiles.json")
    assert not any(call["packed"] for call in card.calls[3:])


def test_layers_of_other_kinds_are_passed_over(cli, here: Path, card: Card):
    layers = "model.layers=[{kind: mamba2, ssm_head_dim: 16}, attention]"
    ran = cli("tune", "run.yaml", layers, "--kernels", "forward", "--out", "tiles.json")
    assert ran.code == 0, ran.err
    assert len(card.calls) == 1


def test_a_checkpoint(cli, here: Path, card: Card, exported: Path):
    assert cli("tune", exported, "--kernels", "forward", "--out", "tiles.json").code == 0
    assert card.calls[0]["problem"].window == 8
    assert card.calls[0]["tokens"] == 64


def test_what_is_measured_in_another_way_is_said(cli, here: Path, card: Card, monkeypatch):
    monkeypatch.setenv(configurations.FORM_VARIABLE, "two kernels")
    ran = cli("tune", *OPTIONS, "--length", 300, "--out", "tiles.json")
    assert ran.err.splitlines()[:2] == [
        "note: window 1,000 is longer than a sequence of 300 tokens, which sees no more: measured, and kept, as window "
        "300; for its own, raise --length",
        "note: SWAT_LM_BACKWARD is set: it goes before the form of the backward that is found here",
    ]
    assert card.calls[0]["problem"].window == 300
    assert tuned_key("forward", card.calls[0]["problem"]) in json.loads((here / "tiles.json").read_text())


def test_an_interruption_keeps_what_is_finished(cli, here: Path, card: Card):
    # after the tiles of the forward, among those of the next kernel
    card.stop_at = 12
    ran = cli("tune", *OPTIONS, "--out", "tiles.json")
    assert ran.code == 130
    assert ran.err.endswith("tiles.json holds what is shown; the same command begins anew\ninterrupted\n")
    assert [words_of(line)[0] for line in ran.out.splitlines()[2:3]] == ["forward"]
    assert "export SWAT_LM_TILES=" in ran.out
    assert kernels_of(here / "tiles.json") == ["forward"]
    card.measured, card.stop_at = 0, 3
    ran = cli("tune", *OPTIONS, "--out", "other.json")
    assert (ran.code, ran.out) == (130, "")
    assert ran.err.endswith(
        "no kernel was finished, so nothing was written; the same command begins anew\ninterrupted\n"
    )
    assert not (here / "other.json").exists()


def test_a_full_card_keeps_what_is_finished(cli, here: Path, card: Card):
    card.stop_at, card.error = 12, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    ran = cli("tune", *OPTIONS, "--out", "tiles.json")
    assert ran.code == 2
    assert ran.err.endswith("error: CUDA out of memory. Tried to allocate 2 GiB\n")
    assert "forward" in ran.out
    assert kernels_of(here / "tiles.json") == ["forward"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [],
            "name a recipe, a checkpoint or a preset whose attention to measure, or describe it; missing for that: --w",
        ),
        (["--window", "8", "--heads", "2"], "missing for that: --head-dim"),
        (["swat-34m"], "; did you mean 'swat-340m'?"),
        (["runs/none"], "no folder runs/none"),
        (["run.yaml", "model.sliding_windows=3"], "sliding_window"),
        (["run.yaml", "model.sliding_window=null"], "run.yaml: no layer has a window, so there is nothing to tune"),
        (["run.yaml", "model.layers=[mamba2]"], "run.yaml: no layer has a window, so there is nothing to tune"),
        (["llama.yaml"], "llama.yaml: a llama of a library, whose layers these kernels do not serve; llama, mist"),
        (["swat-340m", "--window", "8"], "--window describes attention without a source, and swat-340m has its own"),
        (["swat-340m", "--kv-heads", "8"], "--kv-heads describes attention without a source"),
        ([*OPTIONS, "--kv-heads", "3"], "--kv-heads: 8 query heads cannot be shared evenly by 3 key/value heads"),
        ([*OPTIONS, "--head-dim", "33"], "--head-dim: rotary needs an even head size, got 33; or add --no-rotary"),
        ([*OPTIONS, "--head-dim", "512"], "tune: the kernels hold heads of up to 256 channels, these have 512"),
        ([*OPTIONS, "--score-function", "relu"], "--score-function: expected sigmoid or softmax; got 'relu'"),
        ([*OPTIONS, "--score-function", ""], "--score-function: expected sigmoid or softmax; got ''"),
        ([*OPTIONS, "--dtype", "float32"], "--dtype: expected bfloat16 or float16; got 'float32'"),
        ([*OPTIONS, "--kernels", "both"], "--kernels: expected all, forward or backward; got 'both'"),
        ([*OPTIONS, "--window", "0"], "'--window'"),
        ([*OPTIONS, "--out", "text"], "text is a folder: name a file for --out"),
        ([*OPTIONS, "--out", "run.yaml/t.json"], "cannot write --out run.yaml/t.json: Not a directory"),
        ([*OPTIONS, "--out", "run.yaml"], "--out: expected a file written by `swat-lm tune`, got run.yaml: "),
    ],
)
def test_bad_input_is_one_line_and_measures_nothing(cli, here: Path, card: Card, arguments, message):
    (here / "llama.yaml").write_text(
        "model: {architecture: llama, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2}\n"
        "data: {sources: [text]}\n"
    )
    before = sorted(here.rglob("*"))
    ran = cli("tune", *(() if "--out" in arguments else ("--out", "new/t.json")), *arguments)
    assert ran.code == 2
    assert message in ran.err
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1
    assert card.measured == 0
    assert sorted(here.rglob("*")) == before


def test_without_a_gpu_nothing_is_done(cli, here: Path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    before = sorted(here.rglob("*"))
    for arguments in (["swat-340m"], ["nothing"], OPTIONS):
        ran = cli("tune", *arguments, "--out", "new/tiles.json")
        assert (ran.code, ran.out) == (2, "")
        assert ran.err.startswith("error: tune measures on an NVIDIA GPU, and PyTorch sees none here: run it on the ")
        assert ran.err.count("\n") == 1
    assert sorted(here.rglob("*")) == before
    assert os.environ.get(configurations.TILES_VARIABLE) is None


def test_out_is_needed(cli, here: Path, card: Card):
    ran = cli("tune", "swat-340m")
    assert (ran.code, ran.err) == (2, "error: Missing option '--out' / '-o'.\n")


def test_progress_on_a_terminal():
    from swat_lm.cli.progress import RunProgress
    from swat_lm.cli.tuning import Watch

    console = Console(file=io.StringIO(), force_terminal=True, width=100, highlight=False)
    trials = Trials("backward key, five products", [Tile(64, 64, 4, 2), Tile(32, 64, 4, 2), Tile(64, 32, 4, 2)], {})
    with RunProgress(console) as progress:
        watch = Watch("sigmoid, window 8", progress)
        watch(trials)
        for candidate, milliseconds in zip(trials.candidates[:2], (None, 0.12345), strict=True):
            trials.times[candidate] = milliseconds
            watch(trials)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for words in ("sigmoid, window 8: five products", "2/3  best 0.1235 ms, 32x64 w4 s2", "0:00 left"):
        assert words in shown
    # the third was not measured
    assert watch.finished == []


def test_backward_kernels_alone(cli, here: Path, card: Card):
    assert cli("tune", *OPTIONS, "--kernels", "backward", "--out", "tiles.json").code == 0
    assert sorted(kernels_of(here / "tiles.json")) == sorted(BACKWARD)
