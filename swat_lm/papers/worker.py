"""One model of an experiment in a process of its own: train, then evaluate, telling the parent in lines of JSON.

Two processes of few threads each use small models' cores better than one after the other with all threads, and do not
slow down when something else wants a core. `python -m swat_lm.papers.worker OUT NAME MODULE` calls
`MODULE.do_model(OUT, NAME, watcher)`.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

from typing_extensions import override

from swat_lm.papers.watching import InterruptedRunError, Watcher
from swat_lm.train.events import DivergedError, Event

__all__ = ["MOST_THREADS", "Telling", "run_workers", "usable_cores"]

INTERRUPTED = 130
FAILED = 2
# a model this small gains nothing from more, and each thread waits for the slowest
MOST_THREADS = 4


def usable_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Telling(Watcher):
    """Sends everything to the parent as lines of JSON."""

    def __init__(self, pipe: IO[str]) -> None:
        self._pipe = pipe

    def send(self, kind: str, *values: Any) -> None:
        """Send what a watcher's method of that name takes."""
        self._pipe.write(json.dumps([kind, *values], default=str) + "\n")
        self._pipe.flush()

    @override
    def stage(self, text: str) -> None:
        self.send("stage", text)

    @override
    def count(self, name: str, done: int, total: int) -> None:
        self.send("count", name, done, total)

    @override
    def event(self, name: str, event: Event) -> None:
        self.send("event", name, asdict(replace(event, preparing=None)))


def relay(line: str, watcher: Watcher) -> str | None:
    """Hand one line of a worker to the watcher; returns the sentence of an error that the user can act on, if any."""
    kind, *values = json.loads(line)
    if kind == "fail":
        return values[0]
    if kind == "event":
        path = values[1]["path"]
        values[1] = Event(**{**values[1], "path": None if path is None else Path(path)})
    getattr(watcher, kind)(*values)
    return None


def run_workers(out: Path, names: Sequence[str], num_threads: int, watcher: Watcher, module: str) -> None:
    """Train and evaluate the models side by side, by `do_model` of the module, and relay what they tell.

    Raises InterruptedRunError after Ctrl-C, when all have saved; ValueError with a worker's own sentence for an error
    of the user's, RuntimeError for any other end.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads), "MKL_NUM_THREADS": str(num_threads)}
    command = [sys.executable, "-m", "swat_lm.papers.worker", str(out)]
    # groups of their own: the terminal's Ctrl-C comes here only, and is handed on once
    workers = {
        name: subprocess.Popen(
            [*command, name, module],
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=environment,
            process_group=0,
        )
        for name in names
    }
    lines: SimpleQueue[str | None] = SimpleQueue()
    for worker in workers.values():
        threading.Thread(target=forward, args=(worker, lines.put), daemon=True).start()
    failures, open_pipes, interrupted = [], len(workers), False
    try:
        while open_pipes:
            try:
                line = lines.get()
                if line is None:
                    open_pipes -= 1
                else:
                    failures.append(relay(line, watcher))
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
                watcher.stage("stopping after this step, and saving ...")
                for worker in workers.values():
                    if worker.poll() is None:
                        worker.send_signal(signal.SIGINT)
        codes = {name: worker.wait() for name, worker in workers.items()}
    finally:
        # on the way out by an error nothing of ours may go on in the background
        for worker in workers.values():
            if worker.poll() is None:
                worker.kill()
    sentences = [sentence for sentence in failures if sentence]
    if sentences:
        raise ValueError(sentences[0])
    if interrupted or INTERRUPTED in codes.values():
        raise InterruptedRunError(f"stopped; everything so far is in {out}")
    wrong = {name: code for name, code in codes.items() if code}
    if wrong:
        raise RuntimeError(f"the workers ended with {wrong}; their messages are above")


def forward(worker: subprocess.Popen, put: Callable[[str | None], None]) -> None:
    """Move a worker's lines into the queue; None marks the end."""
    assert worker.stdout is not None
    for line in worker.stdout:
        put(line)
    put(None)


def work(out: Path, name: str, module: str) -> int:
    """Do one model; returns the exit code."""
    # the parent reads only our lines from stdout: whatever a library prints goes to stderr
    pipe = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    told = Telling(pipe)
    do_model = importlib.import_module(module).do_model
    try:
        do_model(out, name, told)
    except (KeyboardInterrupt, InterruptedRunError, BrokenPipeError):
        # the last where the parent is gone
        return INTERRUPTED
    except (ValueError, OSError, DivergedError) as error:
        told.send("fail", str(error))
        return FAILED
    return 0


if __name__ == "__main__":
    raise SystemExit(work(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))
