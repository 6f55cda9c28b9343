"""`swat-lm evaluate tasks` as a stranger uses it, also wrongly."""

import json
import re
from pathlib import Path

import pytest
from transformers import PreTrainedModel

pytest.importorskip("lm_eval")

from swat_lm.cli.application import run_application
from swat_lm.data import load_tokenizer
from tests.evaluate import models
from tests.evaluate.benchmark_rows import FILES, write_files


def save(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)
    load_tokenizer("bytes").save_pretrained(folder)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with two models, and the benchmarks' files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # set by the command for its own process
    monkeypatch.setenv("TQDM_DISABLE", "1")
    save(models.tiny_swat(vocab_size=259), tmp_path / "run/export")
    save(models.tiny_llama(vocab_size=259), tmp_path / "llama")
    write_files(tmp_path / "data")
    return tmp_path


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]):
    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = run_application(["evaluate", "tasks", *map(str, arguments)])
        return code, *capfd.readouterr()

    return call


def test_two_models_beside_the_paper(cli, here: Path):
    code, out, err = cli("run", "Llama=llama", "--data", "data", "--out", "table")
    assert code == 0, err
    lines = [line.split() for line in out.splitlines()]
    assert ["run", "Llama", "|", "(guessing)"] in lines
    assert "measured here | expected of guessing, not measured" in out
    assert ["SWAT", "(-+)", "35.53", "45.06", "45.85", "23.34", "21.36", "51.01"] in lines
    assert "run: piqa done" in err
    rows = json.loads((here / "table/table.json").read_text())["rows"]
    assert [row["name"] for row in rows[:3]] == ["run", "Llama", "(guessing)"]
    assert [row["group"] for row in rows[:3]] == ["measured here"] * 2 + ["expected of guessing, not measured"]
    assert "| (guessing) | expected of guessing, not measured |" in (here / "table/table.md").read_text()
    page = (here / "table/table.html").read_text()
    assert page.index("Llama") < page.index("expected of guessing, not measured</th>") < page.index("(guessing)")
    assert '<div class="scroll"><table>' in page
    # nor do the harness's own bars get into a file
    bars = [part for part in re.split(r"[\r\n]", err) if "%|" in part]
    # transformers' own is away where the command begins the process
    assert [part for part in bars if "Loading weights" not in part] == []
    assert "Average" in rows[1]["cells"]
    assert "acc,none" in json.loads((here / "table/Llama/results.json").read_text())["results"]["boolq"]
    times = {path: path.stat().st_mtime_ns for path in (here / "table").glob("*/*.json")}

    code, again, err = cli("run", "Llama=llama", "--data", "data", "--out", "table")
    assert code == 0
    assert again == out
    assert "run: all results are there already" in err
    assert {path: path.stat().st_mtime_ns for path in (here / "table").glob("*/*.json")} == times

    code, _, err = cli("run", "--data", "data", "--out", "table", "--limit", 1)
    assert code == 2
    assert "limit is none there, 1 now" in err


def test_what_is_there_is_taken_up(cli, here: Path):
    assert cli("run", "--data", "data", "--tasks", "piqa", "--out", "table")[0] == 0
    code, _, err = cli("run", "--data", "data", "--tasks", "piqa,wikitext_streamed", "--out", "table")
    assert code == 0
    assert not list((here / "table").rglob("samples_*"))
    assert "wikitext_streamed done" in err
    assert "piqa done" not in err
    harness = json.loads((here / "table/run/results.json").read_text())
    assert list(harness["results"]) == ["piqa", "wikitext_streamed"]
    code, _, err = cli("run", "--data", "data", "--tasks", "piqa", "--out", "table", "--log-samples")
    assert code == 0
    assert "piqa done" in err
    (first, _) = map(json.loads, (here / "table/run/samples_piqa.jsonl").read_text().splitlines())
    assert first["arguments"]["gen_args_1"] == {
        "arg_0": "Question: Open a jar\nAnswer:", "arg_1": " turn the jar into a lid"
    }  # fmt: skip
    assert first["acc"] in (0.0, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none", "--data", "data"], "no folder none, and the hub gave no model of that name"),
        (["./none", "--data", "data"], "no checkpoint at ./none"),
        (["run", "run/export", "--data", "data"], "two checkpoints are called run: name them apart"),
        (["run", "--data", "nothing"], "no folder nothing: expected one with the benchmarks' files, or `hub`"),
        (["run", "--data", "data", "--tasks", "picqa"], "no local form of task 'picqa'; did you mean 'piqa'"),
        (["run", "--data", "data", "--out", "run/export/config.json"], "config.json is a file: expected a folder"),
        (
            ["run", "--data", "data", "--out", "run/export/config.json/below"],
            "cannot write --out run/export/config.json",
        ),
        (["run", "--data", "data", "--tasks", ","], "--tasks: no task named"),
        (["run", "--data", "data", "--batch-size", "0"], "--batch-size: expected auto or a whole number"),
        (["run", "--data", "few"], "few lacks the file of task wikitext: expected lm/wikitext-2-raw.test.txt"),
        (["run", "--data", "few"], "; of task hellaswag: expected commonsense/hellaswag_validation.jsonl; of task "),
        (["run", "--data", "few", "--tasks", "qqqq"], "boolq, wikitext_streamed. The harness"),
        (["run", "--data", "few", "--tasks", "piqa"], "piqa_validation.jsonl:1: task piqa needs field 'sol2'"),
        (["run", "--data", "data", "--tokenizer", "big"], "has 300 ids, the model run/export only 259"),
        (["run", "--tasks", "piqa"], "task piqa: no data from the hub"),
        (
            ["run", "gpt2=gpt2", "--data", "data", "--max-length", "500"],
            "max_length: GPT2LMHeadModel has 128 positions",
        ),
    ],
)
def test_one_line_before_anything_is_measured(cli, here: Path, arguments: list[str], message: str):
    if "few" in arguments:
        write_files(here / "few", ("piqa",))
        path = here / "few" / FILES["piqa"]
        path.write_text(path.read_text().replace("sol2", "second"))
    if "big" in arguments:
        tokens = load_tokenizer("bytes")
        tokens.add_tokens([f"word{number}" for number in range(300 - 259)])
        tokens.save_pretrained(here / "big")
    if "gpt2=gpt2" in arguments:
        save(models.tiny_gpt2(vocab_size=259, bos_token_id=0, eos_token_id=0), here / "gpt2")
    code, out, err = cli("--out", "table", *arguments)
    assert code == 2
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert out == ""
    assert not (here / "table").exists()


def test_samples_need_a_folder(cli, here: Path):
    code, _, err = cli("run", "--data", "data", "--log-samples")
    assert code == 2
    assert err == "error: --log-samples writes to the folder of --out: name one\n"
