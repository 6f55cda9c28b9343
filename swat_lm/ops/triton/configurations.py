"""Tile shapes of the kernels: one table of rules by window, head size, dtype and GPU; nothing is tuned at first use."""

from typing import NamedTuple

import torch
from torch import Tensor

from swat_lm.ops.triton.availability import is_interpreted


class Tile(NamedTuple):
    """Rows of queries by keys of one product, warps of a block, and stages of its software pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


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
