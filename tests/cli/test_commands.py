"""The command line as a stranger uses it, also wrongly: one line on stderr, exit code 2, nothing touched."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from swat_lm import SwatConfig
from swat_lm.cli import failures
from swat_lm.cli.application import application
from swat_lm.cli.outputs import check_folder, check_new_file
from swat_lm.cli.progress import RunProgress, clock
from swat_lm.train import DivergedError, Event

ROOT = Path(__file__).parents[2]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_help_of_every_command_has_an_example():
    runner = CliRunner()
    for words in (
        ["demo"],
        ["train"],
        ["tokenizer"],
        ["prepare"],
        ["generate"],
        ["evaluate", "length"],
        ["evaluate", "tasks"],
        ["recipes"],
        ["study"],
        ["info"],
        ["convert"],
        ["tune"],
    ):
        shown = runner.invoke(application, [*words, "--help"])
        assert shown.exit_code == 0
        assert f"swat-lm {' '.join(words)}" in shown.output.split("Example", 1)[1], words


def test_version_and_bare_call(cli):
    assert cli("--version").out.startswith("swat-lm 0.")
    bare = cli()
    assert "Commands:" in bare.out + bare.err


def test_help_needs_no_large_library():
    program = (
        "import sys, types; package = types.ModuleType('swat_lm'); "
        f"package.__path__ = [{str(ROOT / 'swat_lm')!r}]; sys.modules['swat_lm'] = package\n"
        "from swat_lm.cli.application import run_application\n"
        # typer itself needs it when it reads arguments
        "assert 'pydantic' not in sys.modules\n"
        "assert run_application(['train', '--help']) == 0\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"


def test_missing_packages_are_named():
    program = (
        "import sys; sys.modules['typer'] = None\n"
        "from swat_lm.cli import main\n"
        "main()"
    )  # fmt: skip
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert ran.stderr == "error: the command line needs typer, which is not installed: " + (
        "pip install -e '.[train]' in the folder of swat-lm's clone\n"
    )
    missing = failures.describe_failure(ModuleNotFoundError("no", name="pyarrow.parquet"))
    assert missing is not None
    assert "needs pyarrow" in missing


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "No such command 'trian'"),
        (["train"], "Missing argument"),
        (["train", "rum.yaml"], "no recipe at rum.yaml; the nearest is run.yaml"),
        (["train", "text"], "text is a folder; a recipe is a YAML file"),
        (["train", "run.yaml", "train.step=3"], "unknown key train.step; the nearest valid key is train.steps"),
        (["train", "run.yaml", "model.hidden_sizes=3"], "hidden_size"),
        (["train", "run.yaml", "data.sources=nothing/"], "nothing"),
        (["train", "run.yaml", "data.sources=binary.txt"], "binary.txt: a binary file"),
        (["train", "run.yaml", "data.sources=empty.txt"], "empty.txt"),
        (["train", "run.yaml", "data.tokenizer=./none", "out=new/deep"], "no tokenizer at ./none"),
        (["train", "run.yaml", "model.num_attention_heads=3"], "num_attention_heads"),
        (["train", "run.yaml", "seed=10000000000000000000000000"], "seed must be at least 0 and below"),
        (["train", "run.yaml", "out=text/0.txt/x"], "text/0.txt/x"),
        (["train", "run.yaml", "model.vocab_size=100"], "vocab_size 100 is smaller than the tokenizer's 259"),
        (["train", "run.yaml", "model.sliding_window=0"], "sliding_window: expected at least 1"),
        (["tokenizer", "text", "--vocab-size", "9", "--out", "made"], "vocab_size must be at least 259"),
        (["tokenizer", "text", "--out", "text"], "text exists"),
        (["tokenizer", "nothing", "--out", "made"], "nothing"),
        (["prepare", "empty.txt", "--cache", "tokens"], "empty.txt"),
        (["prepare", "text", "--tokenizer", "./none"], "no tokenizer at ./none"),
        (["generate", "nothing"], "no checkpoint at nothing"),
        (["generate", "text"], "text holds no model"),
        (["generate", "empty.txt"], "empty.txt is a file"),
        (["evaluate", "length", "nothing", "--data", "text"], "no checkpoint at nothing"),
        (["evaluate", "length", "nothing", "--data", "text", "--lengths", "8,x"], "--lengths: expected whole numbers"),
        (["evaluate", "length", "nothing", "--data", "text", "--lengths", "1"], "at least 2"),
        (["evaluate", "length", "nothing", "--data", "text", "--window", "8,0"], "--window: expected numbers"),
        (["generate", "nothing", "--seed", "100000000000000000000000"], "'--seed'"),
        (["generate", "nothing", "--temperature", "inf"], "temperature: expected 0"),
        (["info", "swat-34m"], "no recipe, checkpoint or preset 'swat-34m'; did you mean 'swat-340m'? presets:"),
        (["info", "qqq"], "no recipe, checkpoint or preset 'qqq'; presets:"),
        (["info", "runs/nope"], "no folder runs/nope, and no such model could be had from the hub: "),
        (["info", "swat-340m", "a=b"], "override 'a=b': unknown key a"),
        (["info", "text", "a=b"], "only go with a recipe"),
        (["convert", "nothing", "made"], "nothing is not a checkpoint folder"),
        (["convert", "text", "made", "--window", "wide"], "--window: expected keep, none or a whole number"),
        (["convert", "text", "made", "--set", "slopes"], "--set slopes: write field=value"),
        (["demo", "--out", "text"], "text exists and is no demo"),
        (["demo", "--out", "new/demo", "--source", "nope"], "nope"),
        (["demo", "--minutes", "0"], "minutes: expected more than 0"),
    ],
)
def test_one_line_and_exit_code_two(cli, here: Path, arguments: list[str], message: str):
    (here / "binary.txt").write_bytes(b"\x00\x01\x02" * 100)
    (here / "empty.txt").write_bytes(b"")
    before = files_of(here)
    ran = cli(*arguments)
    assert ran.code == 2
    assert message in ran.err
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1
    assert "Traceback" not in ran.err
    assert files_of(here) == before
    assert not (here / "new").exists()
    assert not (here / "runs").exists()


def test_a_batch_far_beyond_the_data_ends_at_once(cli, here: Path):
    ran = cli("train", "run.yaml", "train.batch_size=1000000000", "train.evaluate_every=0")
    assert ran.code == 2
    assert ran.err.splitlines()[-1].startswith("error: train.batch_size (1000000000) is more than the ")
    assert not (here / "runs").exists()


def test_debug_shows_the_traceback(cli, here: Path):
    ran = cli("train", "rum.yaml", "--debug")
    assert ran.code == 2
    assert "Traceback" in ran.err
    assert ran.err.splitlines()[-1].startswith("error: no recipe at rum.yaml")


def test_what_is_ours_is_shown_whole(cli, here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("swat_lm.recipe.load_recipe", lambda *_: 1 / 0)
    ran = cli("train", "run.yaml")
    assert ran.code == 1
    assert "ZeroDivisionError" in ran.err
    assert failures.describe_failure(DivergedError("loss nan")) == "loss nan"
    assert (
        failures.describe_failure(OSError(28, "No space left on device", "a.bin")) == "No space left on device: a.bin"
    )


def test_train_generate_evaluate_info(cli, here: Path):
    trained = cli("train", "run.yaml")
    assert trained.code == 0, trained.err
    assert "step 6: loss" in trained.out
    assert "run: step 6/6" in trained.err
    run = here / "runs" / "run"
    assert {"recipe.yaml", "metrics.jsonl", "checkpoints", "export"} <= {path.name for path in run.iterdir()}

    again = cli("train", "run.yaml")
    assert again.code == 0
    assert "already trained to step 6" in again.out
    other = cli("train", "run.yaml", "model.hidden_size=64")
    assert other.code == 2
    assert "another architecture" in other.err

    told = cli("generate", run, "--prompt", "the ", "-n", 12, "--seed", 1)
    assert told.code == 0
    assert told.out == cli("generate", run / "export", "--prompt", "the ", "-n", 12, "--seed", 1).out
    assert "(constant)" in told.err
    checkpoint = next((run / "checkpoints").iterdir())
    assert "is a training checkpoint" in cli("generate", checkpoint, "--prompt", "x").err

    measured = cli("evaluate", "length", run, "--data", "text", "--lengths", "16,64", "--out", "measured")
    assert measured.code == 0, measured.err
    assert "reading only what the run held out of this text" in measured.err
    learnt = cli("evaluate", "length", run, "--data", "text", "--lengths", "16,64", "--held-out", 0, "--out", "all")
    assert "the model was trained on this text" in learnt.err
    counts = [
        json.loads((here / out / "length.json").read_text())["points"][0]["num_documents"]
        for out in ("measured", "all")
    ]
    assert counts[0] < counts[1]
    assert "another share would" in cli("evaluate", "length", run, "--data", "text", "--held-out", 0.5).err
    assert (here / "measured" / "length.png").read_bytes().startswith(b"\x89PNG")
    points = json.loads((here / "measured" / "length.json").read_text())["points"]
    assert [point["length"] for point in points] == [16, 64]
    assert cli("evaluate", "length", run, "--data", "text", "--out", "measured").code == 2
    nowhere = cli("evaluate", "length", run, "--data", "text", "--out", "run.yaml/below")
    assert (nowhere.code, nowhere.out) == (2, "")
    assert "cannot write --out" in nowhere.err
    matrix = ("evaluate", "length", run, "--data", "text", "--lengths", "16,64", "--window", "4,own,none")
    assert cli(*matrix, "--out", "matrix").code == 0
    windows = json.loads((here / "matrix" / "windows.json").read_text())
    assert list(windows) == ["4", "own", "none"]
    assert windows["own"]["points"] == points
    assert sorted(path.name for path in (here / "matrix").iterdir()) == ["windows.json", "windows.png"]

    info = cli("info", run)
    assert "reach" in info.out
    assert "15 tokens" in info.out
    # the recipe says 32 tokens, the checkpoint only its configuration's default
    assert cli("info", "run.yaml", "--length", 500).out == cli("info", run, "--length", 500).out


def test_tokenizer_and_prepare(cli, here: Path):
    assert "270 tokens" in cli("tokenizer", "text", "--vocab-size", 270, "--out", "made").out
    prepared = cli("prepare", "text", "--tokenizer", "made", "--cache", "tokens")
    assert prepared.code == 0
    assert "of 270 kinds" in prepared.out
    assert cli("prepare", "text", "--tokenizer", "made", "--cache", "tokens").out == prepared.out
    from_recipe = cli("prepare", "run.yaml", "data.sequence_length=16")
    assert "of 259 kinds" in from_recipe.out


def test_convert(cli, here: Path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(here / "llama")
    assert cli("convert", "llama", "same").code == 0
    assert cli("convert", "llama", "windowed", "--window", 8, "--set", "score_function=sigmoid").code == 0
    assert SwatConfig.from_pretrained(here / "windowed").window(1) == 8
    assert SwatConfig.from_pretrained(here / "same").window(1) is None
    assert "exists" in cli("convert", "llama", "same").err


def test_interrupted_training_saves_and_ends_with_130(here: Path):
    command = [sys.executable, "-m", "swat_lm.cli", "train", "run.yaml", "train.steps=100000", "train.save_every=0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=here, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    metrics = here / "runs" / "run" / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, err.decode()
    assert b"saved; the same command continues it" in err
    assert len(list((here / "runs" / "run" / "checkpoints").iterdir())) == 1


def test_places_for_folders_are_tried(here: Path):
    before = files_of(here)
    check_folder(here / "made" / "deep", "--out")
    check_folder(here / "text", "--out")
    for place in ("run.yaml", "run.yaml/made"):
        with pytest.raises(NotADirectoryError, match=rf"cannot write --out .*{place}: Not a directory"):
            check_folder(here / place, "--out")
    with pytest.raises(OSError, match="File name too long"):
        check_folder(here / "made" / ("x" * 300), "--out")
    with pytest.raises(OSError, match="File name too long"):
        # the file beside it has a longer name
        check_new_file(here / ("x" * 249), "--out")
    assert files_of(here) == before
    assert not (here / "made").exists()


def test_progress_on_a_terminal():
    from rich.console import Console

    console = Console(file=io.StringIO(), force_terminal=True, width=120, highlight=False)
    with RunProgress(console) as progress:
        progress.event("one", Event(kind="start", step=3, steps=10, tokens=0, path=Path("checkpoints/step-3")))
        progress.event(
            "one", Event(kind="step", step=4, steps=10, tokens=9, loss=2.5, tokens_per_second=1234, seconds_left=61)
        )
        progress.event("two", Event(kind="evaluate", step=10, steps=10, tokens=9, held_out_loss=3.25))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for words in ("continues from checkpoints/step-3", "loss 2.500", "1,234 tokens/s", "1:01 left", "held out 3.250"):
        assert words in shown
    assert clock(3723) == "1:02:03"
    assert clock(None) == "-:--"
