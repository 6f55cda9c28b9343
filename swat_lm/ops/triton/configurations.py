"""Tile shapes of the kernels: one table of rules by window, head size, dtype and GPU; nothing is tuned at first use."""

import os
from typing import NamedTuple

import torch
from torch import Tensor

from swat_lm.ops.triton.availability import is_interpreted

BACKWARD_FORMS = ("two kernels", "five products")


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
    bytes: int
    # compute capability, such as (9, 0)
    capability: tuple[int, int]
    # False under the interpreter
    hardware: bool

    @property
    def block_dim(self) -> int:
        """Channels of a tile: the head size, padded to a power of two of at least 16."""
        return max(16, 1 << (self.head_dim - 1).bit_length())

    @classmethod
    def of(cls, query: Tensor, key: Tensor, window: int) -> "Problem":
        """Read it off one call's tensors."""
        hardware = query.device.type == "cuda"
        assert hardware or is_interpreted()
        capability = torch.cuda.get_device_capability(query.device) if hardware else (0, 0)
        return cls(
            window, query.shape[3], query.shape[2] // key.shape[2], query.element_size(), capability, hardware
        )  # fmt: skip


def configuration(kernel: str, problem: Problem) -> Tile:
    """Return the tile of a kernel for a problem."""
    if not problem.hardware:
        return Tile(16, 16, 4, 1)
    return Tile(64, 64, 4, 3)


def backward_form(problem: Problem) -> str:
    """Return how the backward is computed: "two kernels" or "five products".

    Two kernels form every score twice (seven products in all) and add in a fixed order. Five products form it once and
    add the queries' gradients atomically, in float32, in an order that differs from run to run. The environment's
    SWAT_LM_BACKWARD forces either; so does `torch.use_deterministic_algorithms`.
    """
    forced = os.environ.get("SWAT_LM_BACKWARD")
    if forced is not None and forced not in BACKWARD_FORMS:
        raise ValueError(f"SWAT_LM_BACKWARD: expected one of {', '.join(BACKWARD_FORMS)}; got {forced!r}")
    if forced is not None:
        return forced
    return "two kernels"
