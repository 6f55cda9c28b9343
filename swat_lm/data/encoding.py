"""Texts to token ids: the byte tokenizer by plain copying, all others in worker processes."""

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from swat_lm.data.source_text import Piece

# characters per message to a worker: small enough for bounded memory, large enough that messages cost nothing
BATCH_CHARACTERS = 1 << 19
Batch = list[Piece]


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
    # each worker is one thread: parallelism is ours, over processes
    with started(workers, "worker.py", parallel=False) as processes:
        for process in processes:
            send(process, (tokenizer_json, dtype.str))
        waiting: deque[tuple[subprocess.Popen, Batch]] = deque()
        for number, batch in enumerate(batches(pieces)):
            if len(waiting) == workers:
                yield from receive(*waiting.popleft())
            process = processes[number % workers]
            send(process, [piece.text for piece in batch])
            waiting.append((process, batch))
        while waiting:
            yield from receive(*waiting.popleft())


@contextmanager
def started(workers: int, script: str, parallel: bool) -> Iterator[list[subprocess.Popen]]:
    """Processes that run a script of this folder, each with the library's threads or as one.

    They are ended on the way out, at once when it is by an error.
    """
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": str(parallel).lower()}
    command = [sys.executable, "-P", str(Path(__file__).with_name(script))]
    processes: list[subprocess.Popen] = []
    try:
        for _ in range(workers):
            # a process group of its own: Ctrl-C reaches the parent only, which then ends the workers
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, process_group=0
            )
            processes.append(process)
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.communicate()


def send(process: subprocess.Popen, message: object) -> None:
    """Hand a message to an idle worker."""
    assert process.stdin is not None
    try:
        pickle.dump(message, process.stdin, protocol=5)
        process.stdin.flush()
    except BrokenPipeError:
        raise ended(process) from None


def receive(process: subprocess.Popen, batch: Batch) -> Iterator[tuple[Piece, np.ndarray]]:
    """Wait for a worker's answer."""
    assert process.stdout is not None
    try:
        encoded = pickle.load(process.stdout)
    except (EOFError, pickle.UnpicklingError):
        raise ended(process) from None
    return zip(batch, encoded, strict=True)


def ended(process: subprocess.Popen, advice: str = "set data.workers=1 if memory is short") -> RuntimeError:
    """The error for a worker that is gone; what it had to say stands on standard error."""
    return RuntimeError(f"a tokenising process ended with status {process.wait()}; {advice}")
