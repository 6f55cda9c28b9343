"""Runs checks under Triton's interpreter in a process of their own: it must be chosen before triton is imported."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Callable[..., Any]]:
    """Call `interpreted(function, *arguments)`: a function of a test file runs there; its result or failure comes back.

    The process is shared by the session's tests (one per worker of pytest-xdist), so it imports PyTorch once. The tests
    around it keep an interpreter-free triton.
    """
    pytest.importorskip("triton", reason="triton is not installed")
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_interpret)
    yield lambda function, *arguments: pool.submit(function, *arguments).result()
    pool.shutdown()


@pytest.fixture(scope="session")
def stand_in(interpreted: Callable[..., Any]) -> Callable[..., Any]:
    """Call `stand_in(function, *arguments, capability=(9, 0), ...)`: it runs there, on what stands in for a GPU."""
    return lambda function, *arguments, **options: interpreted(_stand_in, function, arguments, options)


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    torch.set_num_threads(1)


def _stand_in(function: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    from tests.ops.triton.stand_in import standing_in

    with standing_in(**options):
        return function(*arguments)
