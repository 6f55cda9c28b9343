"""Runs checks under Triton's interpreter in a process of their own: it must be chosen before triton is imported."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Callable[..., None]]:
    """Call `interpreted(function, *arguments)`: a function of a test file runs there, and its failure here.

    The process is shared by the session's tests (one per worker of pytest-xdist), so it imports PyTorch once. The tests
    around it keep an interpreter-free triton.
    """
    pytest.importorskip("triton", reason="triton is not installed")
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_interpret)
    yield lambda function, *arguments: pool.submit(function, *arguments).result()
    pool.shutdown()


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    torch.set_num_threads(1)
