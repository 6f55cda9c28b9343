"""Texts to token ids: the byte tokenizer by plain copying, all others in worker processes."""

import itertools
import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from swat_lm.data.source_text import Piece

# characters per message to a worker: small enough for bounded memory, large enough that messages cost nothing
BATCH_CHARACTERS = 1 << 19
Batch = list[Piece]
LESS_MEMORY = "set data.workers=1 if memory is short"


def batches(pieces: Iterable[Piece]) -> Iterator[Batch]:
    """Group pieces into lists of about BATCH_CHARACTERS."""
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_bytes(pieces: Iterable[Piece]) -> Iterator[tuple[Piece, np.ndarray]]:
    """Each piece with its UTF-8 bytes, which are the byte tokenizer's ids."""
    for piece in pieces:
        yield piece, np.frombuffer(piece.text.encode("utf-8"), dtype=np.uint8)


def encode_parallel(
    pieces: Iterable[Piece], tokenizer_json: str, dtype: np.dtype, workers: int
) -> Iterator[tuple[Piece, np.ndarray]]:
    """Each piece with its token ids, in order, computed by `workers` processes.

    Batches go to the workers in turn and come back in turn, so the order never depends on their number. A worker holds
    at most one batch, which bounds memory and means that neither side ever waits for the other to read.
    """
    # each worker is one thread: parallelism is ours, over processes. The library's own two threads took 1.3 times as
    # long as two processes, two threads of Python 0.9 times (medians of 7 rounds, 7 MB of books), but in either Ctrl-C
    # waits for the library to return: 6 s of a text of 12 MB that must be seen whole, where processes end in 0.1 s
    with started(workers, "encode", tokenizer_json, dtype.str, parallel=False) as processes:
        waiting: deque[tuple[subprocess.Popen, Batch]] = deque()
        for batch, process in zip(batches(pieces), itertools.cycle(processes), strict=False):
            if len(waiting) == workers:
                yield from received(*waiting.popleft())
            send(process, [piece.text for piece in batch])
            waiting.append((process, batch))
        while waiting:
            yield from received(*waiting.popleft())


def received(process: subprocess.Popen, batch: Batch) -> Iterator[tuple[Piece, np.ndarray]]:
    """The pieces of a batch with their token ids."""
    return zip(batch, receive(process), strict=True)


@contextmanager
def started(workers: int, *job: object, parallel: bool) -> Iterator[list[subprocess.Popen]]:
    """Processes that have been told their job, see `worker.py`, each with the library's threads or as one.

    They are ended on the way out, at once when it is by an error.
    """
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": str(parallel).lower()}
    command = [sys.executable, "-P", str(Path(__file__).with_name("worker.py"))]
    processes: list[subprocess.Popen] = []
    with ExitStack() as stack:
        for _ in range(workers):
            # a process group of its own: Ctrl-C reaches the parent only, which then ends the workers
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, process_group=0
            )
            # the last first
            stack.callback(process.communicate)
            stack.callback(process.kill)
            processes.append(process)
        for process in processes:
            # waits for a process to begin, where the job is longer than a pipe holds: the others begin meanwhile
            send(process, job)
        yield processes


def send(process: subprocess.Popen, message: object) -> None:
    """Hand a message to an idle worker."""
    requests = cast(IO[bytes], process.stdin)
    try:
        pickle.dump(message, requests, protocol=5)
        requests.flush()
    except BrokenPipeError:
        raise ended(process) from None


def receive(process: subprocess.Popen, advice: str = LESS_MEMORY) -> Any:
    """Wait for a worker's answer."""
    try:
        return pickle.load(cast(IO[bytes], process.stdout))
    except (EOFError, pickle.UnpicklingError):
        raise ended(process, advice) from None


def ended(process: subprocess.Popen, advice: str = LESS_MEMORY) -> RuntimeError:
    """The error for a worker that is gone; what it had to say stands on standard error."""
    return RuntimeError(f"a tokenising process ended with status {process.wait()}; {advice}")
