"""The least time that a kernel's machine code, its tiles and its bytes allow on a GPU: computed, nothing is run.

Five parts of a GPU work side by side: tensor cores, the units for tanh and exponentials, the schedulers that issue
instructions, the second-level cache, from which every block reads the tiles it visits, and memory. A kernel is never
faster than its slowest part alone; how far it stays behind depends on how well they overlap, which only a run shows.
"""

from dataclasses import dataclass

from benchmarks.gpu.machine_code import Compiled
from benchmarks.gpu.shapes import Shape
from swat_lm.ops.triton.configurations import Tile
from swat_lm.ops.triton.geometry import far_tiles_of_keys, far_tiles_of_rows

# products a pair takes part in
PRODUCTS = {"forward": 2, "backward query": 3, "backward key": 4, "backward key, five products": 5}
SCHEDULERS = 4
WARPS, REGISTERS, SHARED_BYTES = 64, 65536, 227 * 1024
# what a block needs beside its own shared memory
RESERVED_BYTES = 1024


@dataclass(frozen=True)
class Chip:
    """Rates of one GPU, from its data sheet."""

    name: str
    multiprocessors: int
    hertz: float
    # bfloat16, dense, of one multiprocessor
    flops_per_clock: int
    special_per_clock: int
    bytes_per_second: float
    # from the second-level cache to one multiprocessor; in no data sheet, this is what others measured
    cached_bytes_per_clock: float


# 989.4 TFLOP/s = 132 * 4096 * 1.83e9
H100 = Chip("H100 SXM", 132, 1.83e9, 4096, 16, 3.35e12, 27.6)


@dataclass(frozen=True)
class Floor:
    """Seconds each part needs at least for one kernel, and the warps that fit a multiprocessor at once."""

    products: float
    special: float
    issue: float
    cache: float
    memory: float
    warps: int

    @property
    def seconds(self) -> float:
        """Those of the slowest part."""
        return max(self.products, self.special, self.issue, self.cache, self.memory)


def floor(kernel: str, shape: Shape, tile: Tile, compiled: Compiled, chip: Chip = H100) -> Floor:
    """Compute the floor of one kernel.

    Every block is taken for one far into the sequence. Of the loops the first and the last are masked, the middle one,
    where there is one, is not.
    """
    owns_keys = "key" in kernel
    count_tiles = far_tiles_of_rows if owns_keys else far_tiles_of_keys
    left, right, count = count_tiles(shape.window, tile.rows, tile.keys)
    # all heads of a group go through the block that owns their keys, one after another
    blocks = shape.batch * shape.heads * -(-shape.length // (tile.keys if owns_keys else tile.rows))
    instructions = [sum(loop.values()) for loop in compiled.loops]
    once = sum(compiled.instructions.values()) - sum(instructions)
    if len(instructions) == 1:
        issued = once + count * instructions[0]
    else:
        masked = max(instructions[0], instructions[-1])
        issued = once + (left + count - right) * masked + (right - left) * instructions[1]
    clocks = blocks / chip.multiprocessors / chip.hertz
    scores = count * tile.rows * tile.keys
    block_dim = max(16, 1 << (shape.head_dim - 1).bit_length())
    special = sum(loop["MUFU"] for loop in compiled.loops) / len(compiled.loops)
    return Floor(
        products=clocks * PRODUCTS[kernel] * 2 * scores * block_dim / chip.flops_per_clock,
        special=clocks * count * special * 32 * tile.warps / chip.special_per_clock,
        issue=clocks * issued * tile.warps / SCHEDULERS,
        cache=clocks * block_bytes(kernel, shape, tile, count) / chip.cached_bytes_per_clock,
        memory=kernel_bytes(kernel, shape) / chip.bytes_per_second,
        warps=tile.warps * _blocks_at_once(tile, compiled),
    )


def kernel_bytes(kernel: str, shape: Shape) -> int:
    """Bytes of a kernel's tensors, each read or written once.

    Forward: q, k, v, o. Queries' gradients: q, k, v, do, dq. Keys': q, k, v, do, dk, dv, and with five products dq,
    which is float32 and is cleared, added to and read again to be rounded.
    """
    query, key = (shape.batch * shape.length * heads * shape.head_dim for heads in (shape.heads, shape.kv_heads))
    element = shape.dtype.itemsize
    if kernel == "forward":
        return element * (2 * query + 2 * key)
    if kernel == "backward query":
        return element * (3 * query + 2 * key)
    own = element * (2 * query + 4 * key)
    return own if "five" not in kernel else own + 4 * 4 * query + element * query


def block_bytes(kernel: str, shape: Shape, tile: Tile, count: int) -> int:
    """Bytes that one block of one head moves: two tensors of the tiles it visits, and its own.

    Own are q and o; q, do, dq; or k, v, dk, dv, which a group shares. Five products also add float32 to dq.
    """
    row = shape.head_dim * shape.dtype.itemsize
    if "key" not in kernel:
        return row * (count * tile.keys * 2 + tile.rows * (2 if kernel == "forward" else 3))
    visited = count * tile.rows * (2 * row + ("five" in kernel) * shape.head_dim * 4)
    return visited + 4 * row * tile.keys // shape.group


def _blocks_at_once(tile: Tile, compiled: Compiled) -> int:
    # registers are given out 8 at a time
    registers = -(-compiled.registers // 8) * 8 * 32 * tile.warps
    return min(REGISTERS // registers, SHARED_BYTES // (compiled.shared_bytes + RESERVED_BYTES), WARPS // tile.warps)
