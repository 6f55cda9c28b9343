"""`swat-lm chat` as a stranger uses it: turns, commands, conversations that are taken up again, interruptions."""

import contextlib
import io
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swat_lm import SwatConfig, SwatForCausalLM
from swat_lm.cli import chatting, hosting
from swat_lm.cli.application import run_application
from swat_lm.data import load_tokenizer
from swat_lm.serve.host import Host
from swat_lm.serve.sampling import Sampling

TEMPLATE = """{% for m in messages %}[{{ m.role }}]{{ m.content }}|{% endfor %}
{%- if add_generation_prompt %}[assistant]{% endif %}"""


def save_model(folder: Path, window: int | None = 8, template: str | None = TEMPLATE) -> Path:
    torch.manual_seed(0)
    SwatForCausalLM(SwatConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        sliding_window=window, max_position_embeddings=64,
    )).save_pretrained(folder)  # fmt: skip
    tokenizer = load_tokenizer("bytes")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("chat") / "tiny")


Talk = Callable[..., tuple[int, str, str]]


@pytest.fixture
def talk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Talk:
    """Lines typed into `swat-lm chat` in an empty folder; exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(lines: str, *arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        capfd.readouterr()
        code = run_application(["chat", "-n", "5", "--temperature", "0", *map(str, arguments)])
        out, err = capfd.readouterr()
        return code, out, err

    return call


def counts(err: str) -> list[int]:
    """Tokens of the conversation after each turn."""
    return [int(found.replace(",", "")) for found in re.findall(r"constant · ([\d,]+) tokens", err)]


def test_turns_and_commands(talk: Talk, model: Path, tmp_path: Path):
    lines = "hello\n//x\n\none \\\nmessage\n/fork copy\n/save saved.safetensors\n/sessions\n/go copy\n?\n/quit\nnever\n"
    code, out, err = talk(lines, model)
    assert code == 0, err
    assert out.count("\n") >= 4
    assert counts(err)[:3] == [
        len("[user]hello|[assistant]") + 5,
        len("[user]hello|[assistant]|[user]/x|[assistant]") + 10,
        len("[user]hello|[assistant]|[user]/x|[assistant]|[user]one \nmessage|[assistant]") + 15,
    ]
    assert "copy: a copy of chat; /go copy goes on with it" in err
    assert "copy: goes on after 3 turns" in err
    assert "* chat" in err
    # another one goes on where the copy does
    code, again, err = talk("/load saved.safetensors\n?\n/sessions\n", model)
    assert code == 0, err
    assert "saved: goes on after 3 turns" in err
    assert again.splitlines()[-1] == out.splitlines()[-1]


def test_a_conversation_is_taken_up_again(talk: Talk, model: Path):
    options = (model, "--sessions", "kept", "--session", "monday", "--system", "be brief")
    assert talk("one\n", *options)[2].count("monday: a new conversation") == 1
    code, _, err = talk("two\n", *options)
    assert code == 0
    assert "monday: goes on after 1 turn" in err
    # what the system said is read once
    assert counts(err) == [len("[system]be brief|[user]one|[assistant]|[user]two|[assistant]") + 10]


def test_beside_a_server_the_end_waits_and_the_state_is_written(talk: Talk, model: Path, tmp_path: Path):
    code, _, err = talk("hello\n", model, "--port", 0, "--sessions", "kept")
    assert code == 0, err
    assert "also on http://127.0.0.1:" in err
    assert len(list((tmp_path / "kept").glob("*.safetensors"))) == 1


def test_the_end_does_not_wait_for_a_load(monkeypatch: pytest.MonkeyPatch):
    go = threading.Event()

    def load() -> Any:
        go.wait(20)
        raise ValueError("too late")

    def stopped(seconds: float) -> None:
        raise KeyboardInterrupt

    host = Host(load)
    monkeypatch.setattr("time.sleep", stopped)
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt), chatting.running(host):
        pass
    assert time.monotonic() - begin < 5
    go.set()
    assert host.stop(20)


def test_an_engine_that_does_not_end_is_said(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    go = threading.Event()
    host = Host(lambda: SimpleNamespace(is_idle=True))  # type: ignore[arg-type]
    host.at_end.append(lambda engine: go.wait(20))
    monkeypatch.setattr(hosting, "DRAIN_SECONDS", 0.01)
    with chatting.running(host):
        pass
    assert "warning: the model did not stop within 0.02 s" in capfd.readouterr().err
    go.set()
    assert host.stop(20)


def test_a_seed_gives_every_turn_numbers_of_its_own():
    sampling = Sampling(seed=2**63 - 1)
    seeds = [chatting.of_turn(sampling, turn).seed for turn in range(3)]
    assert seeds[0] == sampling.seed
    assert len(set(seeds)) == 3
    assert seeds == [chatting.of_turn(sampling, turn).seed for turn in range(3)]
    assert chatting.of_turn(Sampling(), 1).seed is None


def test_a_model_without_a_template_goes_on_with_plain_text(talk: Talk, tmp_path: Path):
    plain = save_model(tmp_path / "plain", template=None)
    code, _, err = talk("one\ntwo\n", plain)
    assert code == 0
    assert counts(err) == [8, 16]
    code, _, err = talk("one\n", plain, "--system", "be brief")
    assert code == 2
    assert "--system: the model's tokenizer has no chat template" in err


def test_what_cannot_be_done_is_said_and_the_conversation_goes_on(talk: Talk, model: Path, tmp_path: Path):
    (tmp_path / "wrong.safetensors").write_bytes(b"no such file" * 10)
    lines = "/frok a\n/fork\n/fork a/b\n/load none\n/load wrong.safetensors\n/fork chat\nhello\n/save x\n/save x\n"
    code, _, err = talk(lines, model)
    # a script sees that something could not be done
    assert code == 2, err
    assert counts(err) == [28]
    for said in (
        "/frok: no such command; did you mean /fork?", "/fork: expected a name", "printable characters without a slash",
        "No such file", "damaged or none: it is no safetensors file", "session 'chat': there is none", "x: ",
        "x exists: name another file for /save",
    ):  # fmt: skip
        assert said in err, (said, err)


def test_errors_before_the_model_is_there(talk: Talk, model: Path, tmp_path: Path):
    full = save_model(tmp_path / "full", window=None)
    for arguments, said in (
        (("nowhere",), "no checkpoint at nowhere"),
        ((model, "--session", ""), "session_id: expected 1 to 256"),
        ((full,), "--context: a layer of this model keeps all it has seen"),
        ((model, "--top-p", "2"), "top_p: expected"),
        ((model, "--sessions", model / "config.json"), "File exists"),
    ):
        code, _, err = talk("hello\n", *arguments)
        assert code == 2, err
        assert said in err
    code, _, err = talk("hello\n" + "x" * 60 + "\n?\n", full, "--context", 60)
    assert code == 2
    assert "a slot here holds 60" in err
    assert err.count("the most that it may have") == 2


def test_a_reply_that_is_stopped_is_kept_as_it_was_shown(
    talk: Talk, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    shown: list[str] = []

    def write(text: str) -> None:
        shown.append(text)
        if len(shown) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(chatting, "write", write)
    code, _, err = talk("hello\n/sessions\n", model)
    assert code == 0
    assert "stopped" in err
    assert "1 turn" in err


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit(143)])
def test_whatever_stops_a_reply_it_is_kept_as_it_was_shown(
    error: Any, talk: Talk, model: Path, monkeypatch: pytest.MonkeyPatch
):
    shown: list[str] = []

    def write(text: str) -> None:
        shown.append(text)
        if len(shown) == 3:
            raise error

    options = (model, "--sessions", "kept", "-n", "300")
    with monkeypatch.context() as patched, contextlib.suppress(SystemExit):
        patched.setattr(chatting, "write", write)
        # what is said at once after it is heard
        code, _, err = talk("hello\nand now\n" if error is KeyboardInterrupt else "hello\n", *options)
        assert error is KeyboardInterrupt
        assert code == 0
        assert "has a request" not in err
    # "[user]hello|[assistant]" and at most the three that came
    found = re.search(r"goes on after (1 turn, 2[3-6]|2 turns, 3\d\d) tokens", talk("", *options)[2])
    assert found is not None
    assert found[1].startswith("2" if error is KeyboardInterrupt else "1")
