"""Tile shapes of the kernels by window, head size, dtype and GPU: one table of rules, nothing is tuned at first use.

The shapes were chosen by registers, spills and shared memory of the compiled code (docs/kernels.md), not by timing: no
GPU was at hand. `autotune.py` measures alternatives where somebody asks for it (`swat-lm tune`).
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swat_lm.ops.triton.availability import gpu_of

BACKWARD_FORMS = ("two kernels", "five products")
# a wide window feeds large tiles, which waste more of a narrow one's two edges
NARROW_WINDOW, WIDE_WINDOW = 128, 1024
# so many tiles may make a window that is masked throughout: three loops would spend as much on being started as they
# save of masks, and between them nothing is loaded ahead
ONE_LOOP_TILES = 4
# a product and a sum are one instruction; Triton 3.9 warns where this is not said, and from 3.10 on it means no
FUSED = {"enable_fp_fusion": True}
# names a file of `autotune.py`, whose choices go before the table's
TILES_VARIABLE = "SWAT_LM_TILES"
FORM_VARIABLE = "SWAT_LM_BACKWARD"
# under which a file keeps how the backward is computed, beside the kernels' tiles
FORM = "backward form"


class Tile(NamedTuple):
    """Rows of queries by keys of one product, warps of a block, and stages of its software pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int
    # most registers of a thread (`maxnreg`), for more blocks at once; None leaves it to the compiler
    registers: int | None = None


Tuned = dict[str, Tile | str]
"""What was found to be fastest, by `tuned_key`: tiles of kernels, and forms of the backward."""

# instead of a file's, while somebody measures
_in_use: list[Tuned] = []


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


# by kernel and largest padded head: the tiles of narrow, middling and wide windows; float16 and bfloat16
_HOPPER = {
    "forward": {
        64: (Tile(64, 64, 4, 3, 168), Tile(128, 64, 8, 2), Tile(128, 128, 8, 2)),
        128: (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
        256: (Tile(128, 32, 8, 2),) * 3,
    },
    "backward query": {
        64: (Tile(64, 64, 4, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
        128: (Tile(128, 32, 8, 2),) * 3,
        256: (Tile(32, 32, 4, 2),) * 3,
    },
    "backward key": {
        64: (Tile(64, 64, 4, 2), Tile(64, 128, 8, 2), Tile(64, 128, 8, 2)),
        128: (Tile(32, 128, 8, 2), Tile(32, 128, 8, 2), Tile(32, 128, 8, 3)),
        256: (Tile(32, 32, 4, 2),) * 3,
    },
    "backward key, five products": {
        64: (Tile(64, 128, 8, 2),) * 3,
        128: (Tile(32, 128, 8, 2),) * 3,
        256: (Tile(32, 32, 4, 2),) * 3,
    },
}
_AMPERE = {
    "forward": {
        64: (Tile(64, 64, 4, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 3)),
        128: (Tile(64, 32, 4, 3),) * 3,
        256: (Tile(64, 32, 8, 2),) * 3,
    },
    "backward query": {
        64: (Tile(64, 32, 4, 2), Tile(128, 32, 8, 2), Tile(128, 32, 8, 2)),
        128: (Tile(128, 32, 8, 2),) * 3,
        256: (Tile(32, 32, 8, 1),) * 3,
    },
    "backward key": {
        64: (Tile(32, 64, 4, 2), Tile(32, 128, 8, 2), Tile(32, 128, 8, 2)),
        128: (Tile(16, 128, 8, 2),) * 3,
        256: (Tile(16, 32, 8, 1),) * 3,
    },
    # never chosen by rule there
    "backward key, five products": {
        64: (Tile(16, 64, 4, 2),) * 3,
        128: (Tile(16, 64, 8, 2),) * 3,
        256: (Tile(16, 32, 8, 1),) * 3,
    },
}
# softmax keeps a maximum, a sum and a shift per row
_SOFTMAX_HOPPER = {
    "forward": {64: (Tile(128, 64, 8, 2),) * 3},
    "backward key": {
        64: (Tile(32, 64, 4, 2), Tile(32, 128, 8, 2), Tile(32, 128, 8, 2)),
        128: (Tile(16, 128, 8, 2),) * 3,
    },
    "backward key, five products": {64: (Tile(32, 128, 8, 2),) * 3, 128: (Tile(32, 32, 4, 2),) * 3},
}
_SOFTMAX_AMPERE = {
    "backward query": {128: (Tile(64, 16, 4, 2),) * 3},
    "backward key": {
        64: (Tile(16, 64, 4, 2), Tile(16, 128, 8, 2), Tile(16, 128, 8, 2)),
        128: (Tile(16, 64, 8, 2),) * 3,
    },
}
# rotated queries stay in registers
_ROTARY_HOPPER = {"forward": {128: (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 32, 8, 3))}}


def configuration(kernel: str, problem: Problem) -> Tile:
    """Return the tile of a kernel for a problem: the tuned one, or the table's.

    Args:
        kernel: "forward", "backward query", "backward key" or "backward key, five products".
        problem: one call.
    """
    if not problem.hardware:
        # small, so that small shapes have tiles of every kind
        return Tile(16, 16, 4, 1)
    tuned = _tuned()
    tile = tuned.get(tuned_key(kernel, problem)) if tuned else None
    return tile if isinstance(tile, Tile) else table_tile(kernel, problem)


def table_tile(kernel: str, problem: Problem) -> Tile:
    """Return the table's tile of a kernel for a problem on a GPU."""
    size = next(limit for limit in (64, 128, 256) if problem.block_dim <= limit)
    if problem.dtype == torch.float32:
        # exact products are no work for tensor cores; four bytes a number
        return Tile(16, 16, 4, 1) if size == 256 else Tile(32, 32, 4, 1)
    hopper = problem.family == "hopper"
    tables = [_HOPPER if hopper else _AMPERE]
    if problem.softmax:
        tables.insert(0, _SOFTMAX_HOPPER if hopper else _SOFTMAX_AMPERE)
    elif problem.rotary and hopper:
        tables.insert(0, _ROTARY_HOPPER)
    tiles = next(table[kernel][size] for table in tables if size in table.get(kernel, {}))
    tile = tiles[(problem.window > NARROW_WINDOW) + (problem.window >= WIDE_WINDOW)]
    return tile._replace(stages=min(tile.stages, 2)) if problem.family == "consumer" else tile


def launch_options(tile: Tile) -> dict[str, Any]:
    """Return what Triton is told of a launch beside the kernel's own arguments."""
    return {"num_warps": tile.warps, "num_stages": tile.stages, "maxnreg": tile.registers, **FUSED}


def is_one_loop(kernel: str, problem: Problem, tile: Tile) -> bool:
    """Whether all tiles of so narrow a window are masked, in one loop; by counting instructions, not by timing."""
    if "five" in kernel:
        # where the rule takes it, windows are wide
        return False
    if kernel == "forward" and problem.rotary and problem.family == "hopper" and problem.block_dim <= 64:
        # queries from registers: in one loop the compiler would wait for every product (ptxas says C7515)
        return False
    if problem.block_dim > 64 and problem.hardware:
        # products take longer than masks there, and three loops need registers that are not there
        return problem.window < WIDE_WINDOW or problem.softmax or problem.family != "hopper"
    # small windows of small tests must have three loops too
    tiles = ONE_LOOP_TILES if problem.hardware else 1
    return problem.window <= tiles * (tile.rows if "key" in kernel else tile.keys)


def tuned_key(kernel: str, problem: Problem) -> str:
    """Return under which name a tile or a form is kept; windows share it up to the next power of two."""
    window = 1 << (problem.window - 1).bit_length()
    score = "softmax" if problem.softmax else "sigmoid"
    dtype = str(problem.dtype).removeprefix("torch.")
    return f"{kernel} | {problem.gpu} | {dtype} | {score} | head {problem.head_dim} x {problem.group} | window {window}"


@contextmanager
def using_tuned(tuned: Tuned) -> Iterator[None]:
    """Use these tiles and forms instead of any file's, the forms also against the environment; for measuring."""
    _in_use.append(tuned)
    try:
        yield
    finally:
        _in_use.pop()


def _tuned() -> Tuned:
    return _in_use[-1] if _in_use else _tuned_file(os.environ.get(TILES_VARIABLE))


@lru_cache
def _tuned_file(path: str | None) -> Tuned:
    try:
        return read_tuned(path) if path else {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{TILES_VARIABLE}: {error}") from error


def read_tuned(path: str | Path) -> Tuned:
    """Return the tiles and forms of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is none of `autotune.py`'s files, or holds a tile that no kernel can have.
    """
    try:
        choices = json.loads(Path(path).read_text(encoding="utf-8")).items()
        return {key: _checked_choice(key, choice) for key, choice in choices}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"expected a file written by `swat-lm tune`, got {path}: {error}") from error


def forget_tuned() -> None:
    """Read the file of tuned tiles again at the next call."""
    _tuned_file.cache_clear()


def _checked_choice(key: str, choice: Any) -> Tile | str:
    if isinstance(choice, str):
        if choice not in BACKWARD_FORMS:
            raise ValueError(f"{key}: expected one of {', '.join(BACKWARD_FORMS)}; got {choice!r}")
        return choice
    tile = Tile(*choice)
    *numbers, registers = tile
    if not all(type(n) is int for n in numbers) or not (registers is None or type(registers) is int):
        raise ValueError(f"{key}: the numbers of a tile are whole, got {list(tile)}")
    if any(n < 1 or n & (n - 1) for n in numbers[:3]) or min(tile.rows, tile.keys) < 16 or tile.stages < 1:
        raise ValueError(f"{key}: rows and keys are powers of two from 16 on, warps one from 1 on, got {list(tile)}")
    return tile


def backward_form(problem: Problem) -> str:
    """Return how the backward is computed: "two kernels" or "five products".

    Two kernels form every score twice (seven products in all) and add in a fixed order. Five products form it once and
    add the queries' gradients atomically, in float32, in an order that differs from run to run. Who decides, the first
    that has something to say: the environment's SWAT_LM_BACKWARD; `torch.use_deterministic_algorithms`, for two
    kernels; what was measured on this GPU (`autotune.py`); `rule_form`.
    """
    being_measured = _in_use[-1].get(tuned_key(FORM, problem)) if _in_use else None
    if isinstance(being_measured, str):
        return being_measured
    forced = os.environ.get(FORM_VARIABLE)
    if forced is not None:
        if forced not in BACKWARD_FORMS:
            raise ValueError(f"{FORM_VARIABLE}: expected one of {', '.join(BACKWARD_FORMS)}; got {forced!r}")
        return forced
    if torch.are_deterministic_algorithms_enabled():
        return BACKWARD_FORMS[0]
    measured = _tuned().get(tuned_key(FORM, problem)) if problem.hardware else None
    return measured if isinstance(measured, str) else rule_form(problem)


def rule_form(problem: Problem) -> str:
    """Return the form by rule, which is computed and not yet confirmed by a measurement: five for wide windows."""
    # with heads of 128 the ragged kernel would spill
    fits = problem.family == "hopper" and problem.block_dim <= 64 and not problem.softmax
    return BACKWARD_FORMS[fits and problem.window >= WIDE_WINDOW and problem.dtype != torch.float32]
