"""`swat-lm info` and `convert` as a stranger uses them: baselines of libraries, wrong names and wrong values."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants
from transformers import LlamaConfig, LlamaForCausalLM, Mamba2Config, Mamba2ForCausalLM
from transformers.models.gpt2 import GPT2Config

from swat_lm import hub
from swat_lm.cli.application import run_application
from swat_lm.data import load_tokenizer
from swat_lm.recipe import load_recipe

RECIPE = """
model: {hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 2, sliding_window: 8}
data: {sources: [text]}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a recipe, and a run that trained a Llama."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(RECIPE)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "one.txt").write_text("some words\n" * 20)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text(RECIPE)
    config = LlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "runs" / "ll" / "export")
    load_tokenizer("bytes").save_pretrained(tmp_path / "runs" / "ll" / "export")
    return tmp_path


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]):
    """Call the command line in this process; returns exit code, stdout and the last line of stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = run_application([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return code, out, err.rstrip("\n").rpartition("\n")[2]

    return call


def test_a_run_that_trained_a_baseline(cli, here: Path):
    code, out, _ = cli("info", "runs/ll")
    assert code == 0
    total = sum(weight.numel() for weight in LlamaForCausalLM.from_pretrained("runs/ll/export").parameters())
    assert f"{total:,} (" in out
    refused = cli("generate", "runs/ll", "--prompt", "a")[2]
    assert "convert it first with `swat-lm convert runs/ll/export OUT`" in refused
    assert cli("convert", "runs/ll", "converted")[0] == 0
    assert cli("generate", "converted", "--prompt", "a", "-n", 2)[0] == 0


def test_memory_is_predicted_for_every_execution_that_runs_the_plan(cli, here: Path):
    plan = "model.layers=[{kind: attention, sliding_window: null, score_function: softmax, slopes: none}]"
    words = ["info", "run.yaml", plan, "model.num_hidden_layers=1", "train.batch_size=4", "--memory", "--length", 64]
    code, out, refused = cli(*words, "--processes", 2)
    assert code == 0
    assert "2 rows of 64 tokens a pass, 2 processes" in out
    for name in ("plain", "checkpoint", "blockwise"):
        assert re.search(rf"{name} .* \d\.\d\d", out), name
    assert "bytes in MiB" in out
    assert "0.00" not in out
    # refused by name, on the other stream
    assert "chunks " not in out
    assert re.search(r"^chunks cannot run this model: layer 0", refused, re.MULTILINE)
    assert cli(*words, "--processes", 3)[2] == "error: --processes: 3 cannot share train.batch_size (4) equally"
    assert "--memory: name a recipe" in cli("info", "runs/ll", "--memory")[2]
    assert "belong to --memory" in cli("info", "run.yaml", "--processes", 2)[2]
    assert "expected a size such as 80GiB or 512M; got 'much'" in cli(*words, "--available", "much")[2]
    assert "16 bytes hold no training step; write the unit too" in cli(*words, "--available", 16)[2]
    assert "--memory and --plans are two tables" in cli(*words, "--plans", "--window", 8)[2]


def test_memory_of_what_no_shape_can_say_leaves_the_other_rows(cli, here: Path, monkeypatch):
    from torch._subclasses.fake_tensor import DynamicOutputShapeException

    from swat_lm.model.execution.predicted import Predicted

    simulate = Predicted._simulate

    def some(self, num_tokens: int) -> int:
        if self.name == "plain":
            raise DynamicOutputShapeException("aten.nonzero")
        return simulate(self, num_tokens)

    monkeypatch.setattr(Predicted, "_simulate", some)
    code, out, refused = cli("info", "run.yaml", "train.batch_size=1", "--memory", "--length", 32)
    assert code == 0
    assert "1 row of 32 tokens a pass, 1 process, bytes in MiB" in out
    assert re.search(r"checkpoint .* \d\.\d\d", out)
    assert "plain cannot be predicted: what a layer computes depends on numbers" in " ".join(refused.split())


def test_the_plan_is_printed_once_per_kind_of_layer(cli, here: Path):
    layers = "[{kind: mamba2, ssm_head_dim: 16, repeat: 2}, attention]"
    code, out, err = cli(
        "info", "run.yaml", "data.tokenizer=bytes", "model.num_hidden_layers=12", f"model.layers={layers}"
    )
    assert code == 0, err
    assert "8 x mamba2, 4 x window 8" in out
    assert [line.split("  ")[0] for line in out.splitlines() if line.startswith("layers ")] == [
        "layers",
        "layers 0 to 1, 3 to 4, 6 to 7, 9 to 10",
        "layers 2, 5, 8, 11",
    ]
    assert cli("info", "run.yaml", "data.tokenizer=bytes", "model.layers=mamba2")[2] == (
        "error: model: layers must be null or a list; got 'mamba2'"
    )


def test_other_architectures(cli, here: Path):
    config = Mamba2Config(
        vocab_size=259, hidden_size=32, num_hidden_layers=1, num_heads=4, head_dim=16, state_size=8, n_groups=1
    )
    Mamba2ForCausalLM(config).save_pretrained("mamba")
    code, out, err = cli("info", "mamba")
    assert code == 0, err
    assert "at 2,048 tokens (estimate" in out
    load_tokenizer("bytes").save_pretrained("mamba")
    assert "convert it first with `swat-lm convert mamba OUT`" in cli("generate", "mamba", "--prompt", "a")[2]
    assert re.fullmatch(
        "error: window is a setting of attention.*, of which a Mamba-2 model has no layer; leave it out",
        cli("convert", "mamba", "out", "--window", "8")[2],
    )
    code, _, err = cli("convert", "mamba", "out")
    assert code == 0, err
    assert "1 x mamba2" in cli("info", "out")[1]
    code, out, err = cli("generate", "out", "--prompt", "a", "-n", 2)
    assert code == 0, err
    GPT2Config().save_pretrained("gpt2")
    code, _, err = cli("info", "gpt2/")
    assert code == 2
    assert "of type 'gpt2', whose costs are not known here; known are swat, llama" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "runs/l1", "--prompt", "a"], "no checkpoint at runs/l1: expected a run's folder"),
        (["generate", "runs/l1", "--prompt", "a"], "; the nearest is runs/ll"),
        (["evaluate", "length", "runs/l1", "--data", "run.yaml"], "; the nearest is runs/ll"),
        (["info", "runs/l1"], "; the nearest is runs/ll"),
        (["convert", "runs/l1", "out"], "runs/l1 is not a checkpoint folder or a GGUF file; the nearest is runs/ll"),
        (["prepare", "run.yaml", "--tokenizer", "runs/zz"], "; runs/zz does not exist"),
    ],
)
def test_a_mistyped_path_asks_no_hub(cli, here: Path, monkeypatch, arguments: list[str], message: str):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("asked the hub"))
    hub.hub_answers.cache_clear()
    code, _, err = cli(*arguments)
    assert code == 2
    assert message in err


def test_a_hub_that_does_not_answer_is_tried_once(cli, here: Path, monkeypatch):
    tries = []

    def urlopen(*_: object, **__: object) -> None:
        tries.append(1)
        raise OSError("no network")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    hub.hub_answers.cache_clear()
    try:
        assert "cannot load tokenizer 'nobody/none'" in cli("prepare", "text", "--tokenizer", "nobody/none")[2]
        assert "no checkpoint at nobody/none" in cli("generate", "nobody/none", "--prompt", "a")[2]
        assert "no folder nobody/none" in cli("info", "nobody/none")[2]
    finally:
        hub.hub_answers.cache_clear()
    assert len(tries) == 1


def test_costs_need_no_tokenizer_where_the_preset_has_its_size(cli, here: Path):
    hubs = ("data.tokenizer=nobody/none",)
    code, out, err = cli("info", "run.yaml", *hubs, "model={preset: swat-340m}")
    assert code == 0, err
    assert "32,000" in out
    assert err == "tokenizer nobody/none is not here: counted with the 32,000 tokens of the preset swat-340m"
    code, _, err = cli("info", "run.yaml", *hubs)
    assert code == 2
    assert err.endswith("costs need only its size: give model.vocab_size=32000, say, or data.tokenizer=bytes")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["info", "run.yaml", "model.sliding_window=abc"],
            "model: sliding_window must be a whole number or null or a list of these, one per layer; got 'abc'",
        ),
        (["info", "run.yaml", "model.sliding_window=99999999999999999999"], "expected at most 1073741824"),
        (["info", "run.yaml", "model.qk_norm=3"], "model: qk_norm must be true or false; got 3"),
        (
            ["info", "run.yaml", "model={architecture: llama, hidden_size: wide}"],
            "model (llama): hidden_size must be a whole number; got 'wide'",
        ),
        (
            ["info", "run.yaml", "model.sliding_window=[8,null]", "model.score_bias=-log(window)"],
            "has no meaning; set score_bias=0 or another number, or a list with one entry per layer",
        ),
        (
            ["convert", "runs/ll", "out", "--set", "hidden_size=64", "--set", "vocab_size=9"],
            "changes: vocab_size, hidden_size would change the shapes of the weights",
        ),
        (["generate", "runs/ll", "--prompt", "a", "--device", "foo"], "holds a llama model"),
        (["train", "mine"], "no recipe at mine; did you mean recipes/mine.yaml?"),
        (["train", "own-txt"], "no recipe at own-txt; did you mean own-text?"),
        (["recipes", "own-txt"], "no recipe is called 'own-txt'; did you mean own-text? recipes: "),
        (["info", "Own-Text"], "no recipe, checkpoint or preset 'Own-Text'; did you mean 'own-text'?"),
        (["info", "runs/ll", "model.sliding_window=8"], "a .yaml file, or a name that `swat-lm recipes` lists); got"),
    ],
)
def test_wrong_values_are_one_line_with_advice(cli, here: Path, arguments: list[str], message: str):
    code, _, err = cli(*arguments)
    assert code == 2
    assert err.startswith("error: ")
    assert message in err


def test_recipes_of_ours_go_by_name(cli, here: Path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = cli("recipes")
    assert code == 0
    assert re.search(r"^own-text +A small model of your own text", out, re.MULTILINE)
    code, out, _ = cli("recipes", "own-text")
    (here / "copied.yaml").write_text(out)
    assert load_recipe("copied.yaml") == load_recipe("own-text")
    assert "window 128" in cli("info", "own-text")[1]
    assert "window 64" in cli("info", "own-text", "model.sliding_window=64")[1]
    listed = cli("info")[1]
    assert "presets: ecp-130m" in listed
    assert "recipes: deltanet-340m" in listed
    code, out, _ = cli("prepare", "own-text", "data.sources=text", "data.cache=tokens", "data.held_out=0")
    assert code == 0
    assert "held out" in out
    # what lies on disk under that name goes first
    (here / "own-text").mkdir()
    (here / "own-text" / "one.txt").write_text("other words")
    assert "1" in cli("prepare", "own-text", "--cache", "tokens")[1]
    assert cli("info", "own-text")[0] == 2


def test_devices_that_are_not_there(cli, here: Path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli("convert", "runs/ll", "made")[0] == 0
    assert cli("generate", "made", "--prompt", "a", "--device", "foo")[2] == (
        "error: device foo: unknown; expected cpu, cuda, or cuda:1 for the second GPU"
    )
    assert cli("generate", "made", "--prompt", "a", "--device", "cuda")[2] == (
        "error: device cuda: no GPU here: leave --device out, or use cpu"
    )


def test_bars_of_libraries_stay_out_of_a_redirected_output(here: Path):
    command = [sys.executable, "-m", "swat_lm.cli", "convert", "runs/ll", "out"]
    ran = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert (ran.stdout, ran.stderr) == ("out\n", "")


def test_what_is_stored_is_found_without_the_hub(cli, here: Path, monkeypatch):
    stored = here / "cache" / "models--nobody--ll"
    (stored / "refs").mkdir(parents=True)
    (stored / "refs" / "main").write_text("0" * 40)
    (stored / "snapshots").mkdir()
    assert cli("convert", "runs/ll", stored / "snapshots" / ("0" * 40))[0] == 0
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(here / "cache"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(here / "cache"))
    monkeypatch.setattr("swat_lm.model.loading.hub_answers", lambda: False)
    code, _, err = cli("generate", "nobody/ll", "--prompt", "a", "-n", 2, "--tokenizer", "bytes")
    assert code == 0, err
