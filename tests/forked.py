"""Programs of tests in processes of their own, forked from a server that has imported what takes seconds to import.

For tests that ask what happens to a process, not how it begins: those run `python` itself.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import socket
import sys
from collections.abc import Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from unittest.mock import patch

import torch

ROOT = Path(__file__).parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preloaded"])


def begin(
    program: str, *arguments: str | Path, output: Path, threads: int = 1, environment: Mapping[str, str] | None = None
) -> ForkServerProcess:
    """Run Python as `python -c` would, from this working directory; what it prints and its errors go to a file.

    The process has `pid`, `is_alive()`, `kill()`, `join(timeout)` and `exitcode`, which is -9 after SIGKILL.
    """
    # the server itself must find this clone, wherever the tests were started
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(paths)):
        multiprocessing.forkserver.ensure_running()
    values = {**os.environ, **(environment or {})}
    asked = (program, [str(one) for one in arguments], str(output), os.getcwd(), threads, values)
    process = CONTEXT.Process(target=_run, args=asked)
    process.start()
    return process


def run(program: str, *arguments: str | Path, output: Path, timeout: float = 240, **options) -> str:
    """The same to its end, which must be a good one; returns what it printed."""
    process = begin(program, *arguments, output=output, **options)
    process.join(timeout)
    ended = process.exitcode
    process.kill()
    said = output.read_text() if output.exists() else ""
    assert ended == 0, f"exit code {ended}\n{said[-3000:]}"
    return said


def run_two(program: str, *arguments: str | Path, folder: Path, timeout: float = 300) -> None:
    """The same in two processes, each with the environment that torchrun gives; both must end well."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    outputs = [folder / f"said{rank}.txt" for rank in range(2)]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        begin(program, *arguments, output=output, environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, output in enumerate(outputs)
    ]
    for process in processes:
        process.join(timeout)
    ended = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert ended == [0, 0], f"exit codes {ended}\n" + "\n".join(output.read_text()[-3000:] for output in outputs)


def _run(program: str, arguments: list[str], output: str, folder: str, threads: int, values: dict[str, str]) -> None:
    """In the new process."""
    os.environ.clear()
    os.environ.update(values)
    os.chdir(folder)
    place = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(place, 1)
    os.dup2(place, 2)
    torch.set_num_threads(threads)
    sys.argv = ["-c", *arguments]
    exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
