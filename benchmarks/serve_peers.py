"""The servers under comparison as processes of their own, each with its best settings, and plain `generate` as one.

Who does not have its turn is stopped by a signal, so that it takes no time from whoever has.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from benchmarks.serve_load import HOST, Answer, Question, Server
from benchmarks.serve_models import GGUF, HF, OURS

# tokens of a page of transformers' cache
PAGE = 256
PATIENCE = 180.0
"""Seconds in which a server has to be ready."""
GENERATE = "benchmarks.serve_generate"


@dataclass
class Process:
    """A running candidate."""

    name: str
    running: subprocess.Popen[str]
    log: Path
    server: Server | None = None
    """None for plain `generate`, which is asked over its pipes."""

    def rest(self) -> None:
        """Stop working until `wake`."""
        self.running.send_signal(signal.SIGSTOP)

    def wake(self) -> None:
        """Go on."""
        self.running.send_signal(signal.SIGCONT)

    def cpu_seconds(self) -> float:
        """What the process has computed so far, all its threads together (Linux)."""
        fields = Path(f"/proc/{self.running.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> None:
        """Ask it to leave, then make it."""
        self.wake()
        self.running.terminate()
        try:
            self.running.wait(10)
        except subprocess.TimeoutExpired:
            self.running.kill()
            self.running.wait()

    def generate(self, asked: Sequence[Question], concurrency: int) -> tuple[list[Answer], float]:
        """What plain `generate` takes for batches of so many, one after the other."""
        job = {"concurrency": concurrency, "asked": [[one.prompt, one.num_tokens] for one in asked]}
        sent, got = self.running.stdin, self.running.stdout
        assert sent is not None
        assert got is not None
        print(json.dumps(job), file=sent, flush=True)
        line = got.readline()
        if not line:
            raise RuntimeError(f"{self.name} has ended: {tail(self.log)}")
        found = json.loads(line)
        return [Answer(**{**one, "texts": tuple(one["texts"])}) for one in found["answers"]], found["seconds"]


@dataclass(frozen=True)
class Settings:
    """What all candidates get."""

    threads: int
    slots: int
    context: int
    """Tokens of a request, at most."""
    llama_server: Path | None
    transformers: str
    """The command."""
    logs: Path
    is_stream: bool = False
    """One slot that goes on with a kept conversation, instead of many that forget."""


def commands(name: str, folder: Path, port: int, with_: Settings) -> tuple[list[str], Server | None, str]:
    """How a candidate is started, whom to ask then, and which address says that it is ready."""
    at, model = ["--port", str(port)], str(folder / HF)
    if name == "swat-lm":
        kept = ["--sessions", str(with_.logs / f"sessions-{port}"), "--session-every", "1000000"]
        command = [
            sys.executable, "-m", "swat_lm.cli", "serve", str(folder / OURS), "--slots", str(with_.slots), *at,
            *(kept if with_.is_stream else ()),
        ]  # fmt: skip
        fields = {"ignore_eos": True, **({"session_id": "stream"} if with_.is_stream else {})}
        return command, Server(port, OURS, fields), "/ready"
    if name == "llama.cpp":
        threads = str(with_.threads)
        command = [
            str(with_.llama_server), "--model", str(folder / GGUF), *at, "--host", HOST,
            "--parallel", str(with_.slots), "--ctx-size", str(with_.slots * with_.context), "--threads", threads,
            "--threads-batch", threads, "--cache-type-k", "f32", "--cache-type-v", "f32", "--cache-ram", "0",
            # on a CPU, behind 4,096 tokens, a token takes eight times as long with it
            "--flash-attn", "off",
        ]  # fmt: skip
        return command, Server(port, name, {"cache_prompt": with_.is_stream, "ignore_eos": True}), "/health"
    if name == "transformers serve":
        blocks = with_.slots * -(-with_.context // PAGE) + with_.slots
        command = [
            with_.transformers, "serve", model, "--continuous-batching", "--dtype", "float32", "--device", "cpu",
            "--cb-num-blocks", str(blocks), "--cb-max-batch-tokens", "512", *at,
        ]  # fmt: skip
        return command, Server(port, model), "/health"
    return [sys.executable, "-m", GENERATE, model], None, ""


@contextlib.contextmanager
def started(name: str, folder: Path, settings: Settings) -> Iterator[Process]:
    """A candidate that is ready. Raises RuntimeError, with the end of its log, where it is not in time."""
    port = free_port()
    command, server, address = commands(name, folder, port, settings)
    environment = {
        **os.environ, "OMP_NUM_THREADS": str(settings.threads), "MKL_NUM_THREADS": str(settings.threads),
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    log = settings.logs / f"{name.replace(' ', '-')}-{port}.log"
    with log.open("w") as written:
        running = subprocess.Popen(
            command, env=environment, text=True, stderr=written, stdout=written if server else subprocess.PIPE,
            stdin=None if server else subprocess.PIPE,
        )  # fmt: skip
    process = Process(name, running, log, server)
    try:
        if server is None:
            assert running.stdout is not None
            wait_for_line(running.stdout, process)
        else:
            wait_for_address(f"http://{HOST}:{port}{address}", process)
        yield process
    finally:
        process.end()


def wait_for_line(stream: IO[str], process: Process) -> None:
    """Until it says that it is ready."""
    if not stream.readline():
        raise RuntimeError(f"{process.name} did not start: {tail(process.log)}")


def wait_for_address(url: str, process: Process) -> None:
    """Until it answers there with 200."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.running.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.2)
    raise RuntimeError(f"{process.name} did not become ready: {tail(process.log)}")


def free_port() -> int:
    """One where nobody listens."""
    with socket.socket() as made:
        made.bind((HOST, 0))
        return made.getsockname()[1]


def tail(path: Path) -> str:
    """The end of a log."""
    return path.read_text(errors="replace")[-1500:]


def version_of(binary: Path) -> str:
    """What `llama-server --version` says first."""
    said: Any = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True)
    return (said.stdout + said.stderr).strip().splitlines()[0]
