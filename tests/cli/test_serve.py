"""`swat-lm serve`: what it says, refuses, and leaves behind."""

import importlib.util
import json
import os
import re
import signal
import urllib.request
from pathlib import Path

import pytest

from swat_lm import SwatConfig, SwatForCausalLM
from swat_lm.cli.serving import KEY_VARIABLE, keys_of, model_name, size_of
from tests.forked import begin
from tests.serve.hosting import until

PROGRAM = "import sys; from swat_lm.cli.application import run_application; sys.exit(run_application(sys.argv[1:]))"


def test_bytes_are_written_as_people_do():
    assert [size_of(text, "--memory") for text in ("2GiB", "1.5 MiB", "10kb", "77")] == [2**31, 3 * 2**19, 10_000, 77]
    for text in ("", "2GiBs", "much", "-1", "0"):
        with pytest.raises(ValueError, match="--memory: expected bytes, such as 512MiB"):
            size_of(text, "--memory")


def test_the_model_has_the_folders_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine" / "export").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mine")
    assert model_name(".") == model_name("export") == model_name("./export/") == "mine"
    assert model_name("some/hub-name") == "hub-name"


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(KEY_VARIABLE, "in-the-environment")
    path = tmp_path / "keys"
    path.write_text("# mine\n\nfirst-key-1\n second-key \n")
    assert keys_of(path) == ("first-key-1", "second-key", "in-the-environment")
    path.write_text("first-key-1\nsecret with blanks\n")
    with pytest.raises(ValueError, match=r"key 2 of .*: expected at least 8 visible") as refused:
        keys_of(path)
    assert "secret" not in str(refused.value)
    monkeypatch.delenv(KEY_VARIABLE)
    path.write_text("# none\n")
    with pytest.raises(ValueError, match="holds no key"):
        keys_of(path)
    assert keys_of(None) == ()


def test_what_cannot_be_served_is_one_line(cli, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    full = tmp_path / "full"
    SwatForCausalLM(SwatConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        sliding_window=None, max_position_embeddings=64,
    )).save_pretrained(full)  # fmt: skip
    for arguments, said in (
        ((full,), "--context: a layer of this model keeps all it has seen"),
        ((exported, "--context", 100), "--context: every slot of this model holds a text of any length; leave it out"),
        ((exported, "--slots", 2, "--memory", "1GiB"), "--slots and --memory: give one of them"),
        ((exported, "--memory", "10"), "--memory: a slot takes"),
        ((exported, "--token-budget", 20, "--prefill-chunk", 20), "--token-budget: expected above"),
        ((exported, "--rate-limit", 0), "--rate-limit: expected a number above 0"),
        ((exported, "--max-body", "x"), "--max-body: expected bytes"),
        ((exported, "--panel-memory", "some"), "--panel-memory: expected bytes"),
        ((exported, "--host", "no.such.host.invalid"), "--host no.such.host.invalid: no such address"),
        (("nowhere",), "no checkpoint at nowhere"),
    ):  # fmt: skip
        ran = cli("serve", *arguments)
        assert (ran.code, ran.out) == (2, ""), ran.err
        assert ran.err.rstrip().splitlines()[-1].startswith(f"error: {said}"), ran.err
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else found(name))
    ran = cli("serve", exported)
    assert ran.code == 2
    assert "this command needs uvicorn, which is not installed: pip install -e '.[serve]'" in ran.err


def test_a_model_that_cannot_be_loaded_ends_the_server(cli, exported: Path, tmp_path: Path):
    ran = cli("serve", exported, "--port", 0, "--tokenizer", tmp_path / "none")
    assert ran.code == 2
    assert ran.err.rstrip().splitlines()[-1].startswith("error: no tokenizer at"), ran.err


def test_it_serves_and_ends_with_a_signal(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "tiny" / "export"
    place.parent.mkdir()
    place.symlink_to(exported)
    Path("keys").write_text("a-key-of-mine\n")
    said = tmp_path / "said"
    options = ("--port", "0", "--host", "0.0.0.0", "--slots", "2", "--api-key-file", "keys")
    process = begin(PROGRAM, "serve", "tiny", *options, output=said, environment={"HF_HUB_OFFLINE": "1"})
    try:
        until(lambda: said.exists() and "ready: 2 slots of" in said.read_text(), 60)
        assert "; weights a second time for batches, " in said.read_text()
        found = re.search(r"listening on http://0\.0\.0\.0:(\d+), model '(\w+)'; loading", said.read_text())
        assert found is not None
        body = json.dumps({"model": found[2], "prompt": "a", "max_tokens": 3, "ignore_eos": True}).encode()
        headers = {"content-type": "application/json", "authorization": "Bearer a-key-of-mine"}
        request = urllib.request.Request(f"http://127.0.0.1:{found[1]}/v1/completions", body, headers)
        answer = json.load(urllib.request.urlopen(request, timeout=20))
        assert answer["usage"]["completion_tokens"] == 3
        os.kill(process.pid or 0, signal.SIGTERM)
        process.join(20)
        assert process.exitcode == 0
    finally:
        process.kill()
    text = said.read_text()
    assert text.endswith("stopped\n")
    assert "a-key-of-mine" not in text
    assert "warning" not in text
    records = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert [record["message"] for record in records] == ["request", "draining"]


def test_another_address_without_a_key_is_warned_of(
    cli, exported: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    ran = cli("serve", exported, "--port", 0, "--host", "0.0.0.0", "--tokenizer", tmp_path / "none")
    assert "warning: whoever reaches 0.0.0.0 may ask, since no API key is set" in ran.err
