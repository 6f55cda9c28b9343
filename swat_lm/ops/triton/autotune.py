"""Measures tiles on the GPU at hand, once, when asked to; `configurations.py` reads the file it writes.

Nothing is tuned at first use: a call without the file runs by the table. Under the interpreter there is nothing to
measure, and `tune` refuses.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from swat_lm.ops.triton.configurations import (
    TILES_VARIABLE,
    Problem,
    Tile,
    configuration,
    forget_tiles,
    read_tiles,
    tuned_key,
    using_tiles,
)

# a kernel, the tiles tried for it beside the table's own
CANDIDATES = {
    "forward": [
        Tile(64, 64, 4, 2), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3, 168), Tile(128, 64, 8, 2), Tile(128, 64, 8, 3),
        Tile(128, 128, 8, 2), Tile(64, 128, 4, 2), Tile(64, 32, 4, 3), Tile(128, 32, 8, 3),
    ],
    "backward query": [
        Tile(64, 64, 4, 2), Tile(64, 64, 4, 2, 168), Tile(128, 64, 8, 2), Tile(64, 32, 4, 2), Tile(128, 32, 8, 2),
    ],
    "backward key": [
        Tile(64, 64, 4, 2), Tile(64, 128, 8, 2), Tile(32, 64, 4, 2), Tile(32, 128, 8, 2), Tile(32, 128, 8, 3),
    ],
    "backward key, five products": [Tile(64, 128, 8, 2), Tile(32, 128, 8, 2), Tile(64, 64, 4, 2), Tile(32, 64, 4, 2)],
}  # fmt: skip


# milliseconds of a call
Timer = Callable[[Callable[[], object]], float]


class Measured(NamedTuple):
    """One tile's time."""

    kernel: str
    tile: Tile
    # None where it does not fit the GPU
    milliseconds: float | None


def tune(
    run: Callable[[], object],
    problem: Problem,
    kernels: tuple[str, ...],
    path: Path,
    measure: Timer | None = None,
    report: Callable[[Measured], None] = lambda measured: None,
) -> dict[str, Tile]:
    """Try the candidates of some kernels on one call and write the fastest to a file, beside what it holds already.

    Set the environment's SWAT_LM_TILES to the file's path to use it. The kernels are tuned one after another, each with
    the best of those before it.

    Args:
        run: the call, such as one forward and backward; it must run all of `kernels`.
        problem: of that call.
        kernels: names from CANDIDATES.
        path: a JSON file, made or extended.
        measure: milliseconds of a call; `triton.testing.do_bench` when None.
        report: called after every measurement.

    Raises:
        ValueError: there is no GPU to measure, a kernel's name is not known, `path` holds something else, or a kernel
            fits the GPU with no tile.
    """
    if not problem.hardware:
        raise ValueError("tune: there is nothing to measure under Triton's interpreter; run it on an NVIDIA GPU")
    unknown = set(kernels) - set(CANDIDATES)
    if unknown:
        raise ValueError(f"kernels: expected some of {', '.join(CANDIDATES)}; got {', '.join(sorted(unknown))}")
    # before minutes of measuring, not after
    known = read_tiles(path) if path.exists() else {}
    timer = _bench if measure is None else measure
    best: dict[str, Tile] = {}
    for kernel in kernels:
        times: dict[Tile, float] = {}
        for tile in dict.fromkeys([configuration(kernel, problem), *CANDIDATES[kernel]]):
            milliseconds = _time(run, timer, {tuned_key(k, problem): t for k, t in {**best, kernel: tile}.items()})
            report(Measured(kernel, tile, milliseconds))
            if milliseconds is not None:
                times[tile] = milliseconds
        if not times:
            raise ValueError(f"tune: no tile of the kernel {kernel!r} fits this GPU")
        best[kernel] = min(times, key=lambda tile: times[tile])
        # after every kernel: what is measured is kept
        _write(path, known | {tuned_key(k, problem): tile for k, tile in best.items()})
    return best


def _bench(run: Callable[[], object]) -> float:
    from triton.testing import do_bench

    median = do_bench(run, return_mode="median")
    assert isinstance(median, float)
    return median


def _time(run: Callable[[], object], measure: Timer, tiles: dict[str, Tile]) -> float | None:
    from triton.runtime.errors import OutOfResources, PTXASError

    with using_tiles(tiles):
        try:
            return measure(run)
        except (OutOfResources, PTXASError):
            return None


def _write(path: Path, tiles: dict[str, Tile]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(json.dumps({key: list(tile) for key, tile in tiles.items()}, indent=1, sort_keys=True) + "\n")
    beside.replace(path)
    # this process may have read the file as it was
    forget_tiles()


def call_for(problem: Problem, num_tokens: int, num_heads: int, batch: int = 1) -> Callable[[], object]:
    """Return a forward and backward of random tensors that is such a problem, for `tune`."""
    from swat_lm.ops import window_attention

    shapes = [(batch, num_tokens, heads, problem.head_dim) for heads in (num_heads, *[num_heads // problem.group] * 2)]
    tensors = [torch.randn(shape, dtype=problem.dtype, device="cuda").requires_grad_() for shape in shapes]
    slopes = -torch.rand(num_heads, device="cuda") / 8
    score_function = "softmax" if problem.softmax else "sigmoid"

    def run() -> None:
        output = window_attention(
            *tensors, window=problem.window, slopes=slopes, score_function=score_function, backend="triton"
        )
        assert isinstance(output, torch.Tensor)
        torch.autograd.grad(output, tensors, output.detach())

    return run


__all__ = ["CANDIDATES", "TILES_VARIABLE", "Measured", "call_for", "tune"]
