"""Tile shapes of the kernels by window, head size, dtype and GPU: one table of rules, nothing is tuned at first use.

The shapes were chosen by registers, spills and shared memory of the compiled code (docs/kernels.md), not by timing: no
GPU was at hand. `autotune.py` measures alternatives where somebody asks for it.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from swat_lm.ops.triton.availability import gpu_of

BACKWARD_FORMS = ("two kernels", "five products")
# a wide window feeds large tiles, which waste more of a narrow one's two edges
WIDE_WINDOW = 1024
# names a file of `autotune.py`, whose tiles go before the table's
TILES_VARIABLE = "SWAT_LM_TILES"
_tiles_in_use: dict[str, "Tile"] = {}


class Tile(NamedTuple):
    """Rows of queries by keys of one product, warps of a block, and stages of its software pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int
    # most registers of a thread (`maxnreg`), for more blocks at once; None leaves it to the compiler
    registers: int | None = None


class Problem(NamedTuple):
    """What a choice of tiles depends on."""

    window: int
    head_dim: int
    group: int
    dtype: torch.dtype
    softmax: bool
    # compute capability, such as (9, 0)
    capability: tuple[int, int]
    # False under the interpreter
    hardware: bool
    # its name, by which tuned tiles are kept: cards of one capability differ in memory and in multiprocessors
    gpu: str = ""
    # whether the kernel rotates; tuned tiles are shared with calls that do not
    rotary: bool = False

    @property
    def block_dim(self) -> int:
        """Channels of a tile: the head size, padded to a power of two of at least 16."""
        return max(16, 1 << (self.head_dim - 1).bit_length())

    @property
    def family(self) -> str:
        """The generation whose rules apply: "hopper" (and data-centre Blackwell), "ampere" or "consumer"."""
        if (9, 0) <= self.capability < (12, 0):
            return "hopper"
        # everything else has 99 KiB of shared memory instead of 163
        return "ampere" if self.capability == (8, 0) else "consumer"

    @classmethod
    def of(cls, query: Tensor, key: Tensor, window: int, score_function: str) -> "Problem":
        """Read it off one call's tensors."""
        gpu = gpu_of(query.device)
        return cls(
            window, query.shape[3], query.shape[2] // key.shape[2], query.dtype, score_function == "softmax",
            gpu.capability if gpu else (0, 0), gpu is not None, gpu.name if gpu else "",
        )  # fmt: skip


# by kernel and largest padded head: the tile of narrow windows and that of wide ones; float16 and bfloat16
_HOPPER = {
    "forward": {
        64: (Tile(64, 64, 4, 3, 168), Tile(128, 128, 8, 2)),
        128: (Tile(64, 64, 4, 2), Tile(128, 64, 8, 3)),
        256: (Tile(128, 32, 8, 2), Tile(128, 32, 8, 2)),
    },
    "backward query": {
        64: (Tile(64, 64, 4, 2), Tile(128, 64, 8, 2)),
        128: (Tile(64, 32, 4, 2), Tile(128, 32, 8, 2)),
        256: (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    },
    "backward key": {
        64: (Tile(64, 64, 4, 2), Tile(64, 128, 8, 2)),
        128: (Tile(32, 64, 4, 2), Tile(32, 128, 8, 2)),
        256: (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    },
    "backward key, five products": {
        64: (Tile(64, 128, 8, 2), Tile(64, 128, 8, 2)),
        128: (Tile(32, 128, 8, 2), Tile(32, 128, 8, 2)),
        256: (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    },
}
_AMPERE = {
    "forward": {
        64: (Tile(64, 64, 4, 3, 168), Tile(128, 64, 8, 3)),
        128: (Tile(64, 32, 4, 3), Tile(128, 64, 8, 2)),
        256: (Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
    },
    "backward query": {
        64: (Tile(64, 32, 4, 1), Tile(128, 32, 8, 2)),
        128: (Tile(64, 32, 4, 2), Tile(128, 32, 8, 2)),
        256: (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    },
    "backward key": {
        64: (Tile(32, 64, 4, 2), Tile(32, 128, 8, 2)),
        128: (Tile(64, 32, 4, 2), Tile(32, 128, 8, 2)),
        256: (Tile(16, 32, 8, 1), Tile(16, 32, 8, 1)),
    },
    # never chosen by rule there
    "backward key, five products": {
        64: (Tile(32, 64, 4, 2), Tile(32, 64, 4, 2)),
        128: (Tile(32, 64, 8, 2), Tile(32, 64, 8, 2)),
        256: (Tile(16, 32, 8, 1), Tile(16, 32, 8, 1)),
    },
}
# softmax keeps a maximum, a sum and a shift per row
_SOFTMAX_HOPPER = {
    "backward key": {
        64: (Tile(32, 64, 4, 2), Tile(32, 128, 8, 2)),
        128: (Tile(32, 128, 8, 2), Tile(32, 128, 8, 2)),
    },
}
# rotating a tile of queries takes registers of its own
_ROTARY_HOPPER = {"forward": {128: (Tile(128, 64, 8, 2), Tile(128, 64, 8, 3))}}


def configuration(kernel: str, problem: Problem) -> Tile:
    """Return the tile of a kernel for a problem.

    Args:
        kernel: "forward", "backward query", "backward key" or "backward key, five products".
        problem: one call.
    """
    if not problem.hardware:
        # small, so that small shapes have tiles of every kind
        return Tile(16, 16, 4, 1)
    tuned = _tiles_in_use or _tuned_tiles(os.environ.get(TILES_VARIABLE))
    if tuned and tuned_key(kernel, problem) in tuned:
        return tuned[tuned_key(kernel, problem)]
    size = next(limit for limit in (64, 128, 256) if problem.block_dim <= limit)
    if problem.dtype == torch.float32:
        # exact products are no work for tensor cores; four bytes a number
        return Tile(16, 16, 4, 1) if size == 256 else Tile(32, 32, 4, 1)
    wide = problem.window >= WIDE_WINDOW
    if problem.softmax and problem.family == "hopper":
        special = _SOFTMAX_HOPPER.get(kernel, {})
        if size in special:
            return special[size][wide]
    if problem.rotary and problem.family == "hopper" and size in _ROTARY_HOPPER.get(kernel, {}):
        return _ROTARY_HOPPER[kernel][size][wide]
    tile = (_HOPPER if problem.family == "hopper" else _AMPERE)[kernel][size][wide]
    return tile._replace(stages=min(tile.stages, 2)) if problem.family == "consumer" else tile


def tuned_key(kernel: str, problem: Problem) -> str:
    """Return under which name a tile is kept; windows share it up to the next power of two."""
    window = 1 << (problem.window - 1).bit_length()
    score = "softmax" if problem.softmax else "sigmoid"
    dtype = str(problem.dtype).removeprefix("torch.")
    return f"{kernel} | {problem.gpu} | {dtype} | {score} | head {problem.head_dim} x {problem.group} | window {window}"


@contextmanager
def using_tiles(tiles: dict[str, Tile]) -> Iterator[None]:
    """Use these tiles, by `tuned_key`, instead of any file's; for measuring, in one thread."""
    before = dict(_tiles_in_use)
    _tiles_in_use.clear()
    _tiles_in_use.update(tiles)
    try:
        yield
    finally:
        _tiles_in_use.clear()
        _tiles_in_use.update(before)


@lru_cache
def _tuned_tiles(path: str | None) -> dict[str, Tile]:
    if not path:
        return {}
    try:
        return read_tiles(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{TILES_VARIABLE}: {error}") from error


def read_tiles(path: str | Path) -> dict[str, Tile]:
    """Return the tiles of a file, by `tuned_key`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is none of `autotune.py`'s files, or holds a tile that no kernel can have.
    """
    try:
        tiles = {key: Tile(*tile) for key, tile in json.loads(Path(path).read_text()).items()}
        for key, tile in tiles.items():
            _check_tile(key, tile)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"expected a file written by swat_lm.ops.triton.autotune, got {path}: {error}") from error
    return tiles


def forget_tiles() -> None:
    """Read the file of tuned tiles again at the next call."""
    _tuned_tiles.cache_clear()


def _check_tile(key: str, tile: Tile) -> None:
    *numbers, registers = tile
    if not all(type(n) is int for n in numbers) or not (registers is None or type(registers) is int):
        raise ValueError(f"{key}: the numbers of a tile are whole, got {list(tile)}")
    if any(n < 1 or n & (n - 1) for n in numbers[:3]) or min(tile.rows, tile.keys) < 16 or tile.stages < 1:
        raise ValueError(f"{key}: rows and keys are powers of two from 16 on, warps one from 1 on, got {list(tile)}")


def backward_form(problem: Problem) -> str:
    """Return how the backward is computed: "two kernels" or "five products".

    Two kernels form every score twice (seven products in all) and add in a fixed order. Five products form it once and
    add the queries' gradients atomically, in float32, in an order that differs from run to run; the rule takes them
    for wide windows on Hopper, which is computed and not yet confirmed by a measurement. The environment's
    SWAT_LM_BACKWARD forces either; `torch.use_deterministic_algorithms` forces two kernels.
    """
    forced = os.environ.get("SWAT_LM_BACKWARD")
    if forced is not None:
        if forced not in BACKWARD_FORMS:
            raise ValueError(f"SWAT_LM_BACKWARD: expected one of {', '.join(BACKWARD_FORMS)}; got {forced!r}")
        return forced
    if torch.are_deterministic_algorithms_enabled():
        return BACKWARD_FORMS[0]
    # with heads of 128 the ragged kernel would spill
    fits = problem.family == "hopper" and problem.block_dim <= 64 and not problem.softmax
    return BACKWARD_FORMS[fits and problem.window >= WIDE_WINDOW and problem.dtype != torch.float32]
