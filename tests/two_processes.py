"""`torchrun --nproc-per-node 2` for tests that do not ask about torchrun: what takes seconds to import, imported once.

Run as a program, `python -m tests.two_processes PROGRAM ARGUMENT...`, it imports what such tests have in common and then
forks into both processes, each with the environment that torchrun gives.
"""

import os
import runpy
import socket
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[1]


def launch(program: str | Path, *arguments: str | Path, timeout: float = 300) -> None:
    """Run a module of the tests, or a file, in two processes; fails with what it said unless both end well."""
    ran = subprocess.run(
        [sys.executable, "-m", "tests.two_processes", *map(str, (program, *arguments))],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]


def main(program: str, arguments: list[str]) -> int:
    """Import, fork, wait; 1 if a process failed."""
    import swat_lm.train
    from swat_lm import SwatForCausalLM

    # what these names load
    assert swat_lm.train.run
    assert SwatForCausalLM
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in ("0", "1"):
        child = os.fork()
        if child == 0:
            here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            os.environ.update(here, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            os._exit(run(program, arguments))
        children.append(child)
    return max(int(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0) for child in children)


def run(program: str, arguments: list[str]) -> int:
    """One process's share, as if it had been started for itself."""
    sys.argv = [program, *arguments]
    try:
        if program.endswith(".py"):
            runpy.run_path(program, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__")
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
