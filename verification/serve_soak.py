"""`swat-lm serve` under many thousand short requests, with aborts, nonsense, dropped connections and a SIGKILL.

Books are kept of every turn of a session that the server has acknowledged. After the kill and a restart, and at the
end, each must be there as the books have it and go on as its text does without a session; nothing may be left over.
"""

import argparse
import asyncio
import importlib.metadata
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from verification.soak_client import Connection
from verification.soak_workers import Soak
from verification.workplace import CheckFailedError, Workplace, require

__all__ = ["Process", "add_options", "check", "run"]

PACKAGES = ("torch", "transformers", "fastapi", "uvicorn")
TEMPLATE = """{% for m in messages %}[{{ m.role }}]{{ m.content }}|{% endfor %}
{%- if add_generation_prompt %}[assistant]{% endif %}"""
SLOTS, WORKERS = 4, 12
# requests after which a process has nearly all the memory that it needs, and by how much it may grow later: a tokenizer
# remembers the last 10,000 different words, some 6 MB
WARM, GROWTH = 2000, 16 << 20
PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


class Process(Protocol):
    """A server's process."""

    pid: int | None

    def kill(self) -> None:
        """End it as SIGKILL does."""
        ...

    def ended(self, seconds: float) -> int | None:
        """Its exit code, as `subprocess` gives it; None where it still runs after so long."""
        ...


class Child:
    """A process that `python` begins."""

    def __init__(self, arguments: Sequence[str], output: Path) -> None:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        with output.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "swat_lm.cli", *arguments], stdout=file, stderr=file, env=environment
            )
        self.pid: int | None = self._process.pid

    def kill(self) -> None:
        """See Process."""
        self._process.kill()

    def ended(self, seconds: float) -> int | None:
        """See Process."""
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(seconds)
        return None


Launch = Callable[[Sequence[str], Path], Process]


def add_options(parser: argparse.ArgumentParser) -> None:
    """What this check may be told."""
    group = parser.add_argument_group("serve_soak")
    group.add_argument("--requests", type=int, default=20_000, help="how many; a SIGKILL comes after half of them")
    group.add_argument("--soak-seed", type=int, default=0, help="of what is asked, and when it is broken off")


def check(place: Workplace, options: argparse.Namespace) -> dict[str, str]:
    """Run it on a tiny model of random weights; returns the versions."""
    run(place.folder, options.requests, options.soak_seed, Child, place.done)
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def run(folder: Path, requests: int, seed: int, launch: Launch, done: Callable[[str], None]) -> None:
    """All of it, in an empty folder. Raises CheckFailedError."""
    make_model(folder / "tiny")
    soak = Soak(seed, WORKERS)
    asyncio.run(Life(folder, launch, soak, done).live(requests))


def make_model(folder: Path) -> None:
    """A model of two windows that writes letters, with logits far apart, and a tokenizer whose tokens are bytes."""
    import torch

    from swat_lm import SwatConfig, SwatForCausalLM
    from swat_lm.data import load_tokenizer

    torch.manual_seed(0)
    model = SwatForCausalLM(SwatConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        sliding_window=8, max_position_embeddings=64, initializer_range=0.3,
    ))  # fmt: skip
    letters = torch.tensor([*range(ord("a"), ord("z") + 1), *range(ord("A"), ord("Z") + 1)])
    with torch.no_grad():
        weight = model.lm_head.weight
        drawn = torch.randn(len(letters), weight.shape[1])
        weight.zero_()
        weight[letters] = drawn
    model.save_pretrained(folder)
    tokenizer = load_tokenizer("bytes")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


class Life:
    """Two servers, one after the other, on one folder of sessions."""

    def __init__(self, folder: Path, launch: Launch, soak: Soak, done: Callable[[str], None]) -> None:
        self._folder, self._launch, self._soak, self._done = folder, launch, soak, done
        self._number = 0
        self._process: Process | None = None
        self._memory: list[tuple[int, int]] = []
        """Of the process that runs: requests so far, and bytes."""

    async def live(self, requests: int) -> None:
        """All of it. Raises CheckFailedError."""
        begin = time.monotonic()
        try:
            await self._start()
            await self._work(requests // 2, kill=True)
            under_way = sum(book.open is not None or book.uncertain is not None for book in self._soak.books.values())
            await self._start()
            await self._soak.settle_all(was_killed=True)
            turns = sum(book.turns for book in self._soak.books.values())
            self._done(
                f"SIGKILL with {under_way} requests to sessions under way; after it all {turns:,} acknowledged turns "
                f"of {len(self._soak.books)} sessions are there, and each goes on as its text does without one"
            )
            await self._work(requests)
            await self._soak.settle_all(was_killed=False)
            await self._quiet()
            code = await self._end(signal.SIGTERM)
            require(code == 0, f"after SIGTERM: exit code {code}, expected 0\n{self._log()[-2000:]}")
            self._check_left()
        finally:
            if self._process is not None:
                self._process.kill()
        seconds = time.monotonic() - begin
        self._done(f"{self._soak.sent:,} requests in {seconds:.0f} s: {self._soak.summary()}")

    async def _start(self) -> None:
        """Begin a server and wait until it is ready."""
        self._number += 1
        options = ["--port", "0", "--slots", str(SLOTS), "--sessions", str(self._folder / "sessions"),
                   "--session-every", "64", "--session-idle", "1"]  # fmt: skip
        self._process = self._launch(["serve", str(self._folder / "tiny"), *options], self._output)
        end = time.monotonic() + 90
        while "ready: " not in (said := self._log()):
            code = self._process.ended(0)
            require(code is None and time.monotonic() < end, f"the server does not start: exit code {code}\n{said}")
            await asyncio.sleep(0.02)
        found = re.search(r"listening on http://127\.0\.0\.1:(\d+)", said)
        assert found is not None
        self._soak.port, self._soak.is_killed, self._memory = int(found[1]), False, []

    @property
    def _output(self) -> Path:
        return self._folder / f"said-{self._number}"

    def _log(self) -> str:
        return self._output.read_text(encoding="utf-8") if self._output.exists() else ""

    async def _work(self, until: int, kill: bool = False) -> None:
        """Requests until there were so many; then the process may be killed in the middle of others."""
        begin = self._soak.sent
        watching = asyncio.ensure_future(self._watch())
        working = asyncio.ensure_future(self._soak.work(sys.maxsize if kill else until))
        try:
            while kill and self._soak.sent < until and not working.done():
                await asyncio.sleep(0.001)
            if kill and not working.done():
                self._soak.is_killed = True
                await self._end(signal.SIGKILL)
            await working
        finally:
            working.cancel()
            watching.cancel()
        self._check_memory(begin)

    async def _watch(self) -> None:
        """Take the process's memory now and then."""
        assert self._process is not None
        path = Path(f"/proc/{self._process.pid}/statm")
        while True:
            with suppress(OSError, IndexError):
                self._memory.append((self._soak.sent, int(path.read_text().split()[1]) * PAGE))
            await asyncio.sleep(0.1)

    def _check_memory(self, begin: int) -> None:
        """Raise CheckFailedError where the last quarter of the requests took more memory than the first after WARM."""
        warm = [(sent, size) for sent, size in self._memory if sent >= begin + WARM]
        if len(warm) < 20:
            self._done(f"memory: not looked at, since {WARM:,} requests only warm a server up")
            return
        quarter = len(warm) // 4
        first, last = (statistics.median(size for _, size in part) for part in (warm[:quarter], warm[-quarter:]))
        said = f"{first / 2**20:.1f} MiB after {warm[0][0] - begin:,} requests, {last / 2**20:.1f} MiB at the end"
        require(last - first < GROWTH, f"resident memory grew: {said}")
        self._done(f"resident memory (medians): {said}")

    async def _quiet(self) -> None:
        """Raise CheckFailedError unless the server has come to rest with nothing in use, and has answered no 5xx."""
        end = time.monotonic() + 10
        while True:
            async with Connection(self._soak.port) as line:
                said = (await line.ask("GET", "/metrics")).content.decode()
            numbers = dict(found.rsplit(" ", 1) for found in said.splitlines() if not found.startswith("#"))
            busy = {name: numbers[name] for name in (
                "swat_queue_length", "swat_running_requests", 'swat_slots{use="used"}',
            ) if float(numbers[name])}  # fmt: skip
            if not busy:
                break
            require(time.monotonic() < end, f"the server does not come to rest: {busy}")
            await asyncio.sleep(0.1)
        kept = float(numbers['swat_slots{use="kept"}'])
        require(kept + float(numbers['swat_slots{use="free"}']) == SLOTS, "a slot is neither kept nor free")
        require(kept <= len(self._soak.books), f"{kept:g} slots are kept for {len(self._soak.books)} sessions")
        failed = [f"{name} {count}" for name, count in numbers.items() if 'status="5' in name and float(count)]
        require(not failed, f"answers that no client can cause: {failed}")
        require(float(numbers["swat_engine_failed_steps_total"]) == 0, "steps of the engine have failed")
        self._done("no slot is used, nothing waits, no step failed, and no answer was a 5xx")

    async def _end(self, how: signal.Signals) -> int | None:
        """Its exit code after a signal."""
        assert self._process is not None
        assert self._process.pid is not None
        os.kill(self._process.pid, how)
        code = await asyncio.to_thread(self._process.ended, 60)
        if code is None:
            raise CheckFailedError(f"the server still runs 60 s after {how.name}")
        return code

    def _check_left(self) -> None:
        """Raise CheckFailedError unless the folder has one file for each session, and the log no error."""
        left = sorted(path.name for path in (self._folder / "sessions").iterdir() if path.name != ".lock")
        wrong = [name for name in left if not name.endswith(".safetensors")]
        require(not wrong, f"files are left over: {wrong[:5]}")
        require(len(left) == len(self._soak.books), f"{len(left)} files for {len(self._soak.books)} sessions")
        for number in range(1, self._number + 1):
            said = (self._folder / f"said-{number}").read_text(encoding="utf-8")
            wrong = [line for line in said.splitlines() if '"level": "error"' in line.lower() or "Traceback" in line]
            require(not wrong, f"server {number} has logged errors:\n" + "\n".join(wrong[:3]))
        self._done(f"SIGTERM: exit code 0; {len(left)} files for as many sessions, no journal, no error in the log")
