"""What the compiled kernels allow an H100 to reach at most: computed from machine code, no GPU is needed or used.

    python -m benchmarks.attention_gpu_code [--record]

For each shape and kernel the time that each part of the GPU needs at least, and the slowest of them: the floor.
"""

import argparse
import sys
from typing import Any

from benchmarks import record
from benchmarks.gpu.floors import H100, Floor, floor
from benchmarks.gpu.machine_code import compile_attention
from benchmarks.gpu.shapes import ANCHOR, Shape
from swat_lm.ops.triton.configurations import BACKWARD_FORMS, Problem, backward_form, configuration

SHAPES = (ANCHOR, *(Shape(8, 16, 16, 16384, window, size) for size in (64, 128) for window in (128, 256, 1024, 4096)))


def main(arguments: list[str] | None = None) -> int:
    """Compile, compute, save and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help=record.HELP)
    options = parser.parse_args(arguments)
    rows = [row(shape, kernel) for shape in SHAPES for kernel in kernels(shape)]
    for found in rows:
        sys.stdout.write("  ".join(f"{key} {value}" for key, value in found.items()) + "\n")
    settings = {
        "computed for": f"{H100.name}: {H100.multiprocessors} multiprocessors at {H100.hertz / 1e9} GHz, "
        f"{H100.bytes_per_second / 1e12} TB/s",
        "dtype": "bfloat16",
    }
    path = record.save("attention_gpu_code", rows, [], settings, lines=True)
    sys.stdout.write(record.finish(path, options.record))
    return 0


def kernels(shape: Shape) -> tuple[str, ...]:
    """Those that run forward and backward by rule."""
    if backward_form(problem(shape)) == BACKWARD_FORMS[1]:
        return "forward", "backward key, five products"
    return "forward", "backward query", "backward key"


def problem(shape: Shape) -> Problem:
    """As a Hopper GPU sees it."""
    return Problem(shape.window, shape.head_dim, 1, shape.dtype, False, (9, 0), True)


def row(shape: Shape, kernel: str) -> dict[str, Any]:
    """One kernel on one shape."""
    tile = configuration(kernel, problem(shape))
    compiled = compile_attention(kernel, problem(shape), tile)
    found = floor(kernel, shape, tile, compiled)
    per_score = [sum(loop.values()) * 32 * tile.warps / (tile.rows * tile.keys) for loop in compiled.loops]
    return {
        "kernel": kernel,
        "shape": str(shape),
        "tile": f"{tile.rows} x {tile.keys}, {tile.warps} warps",
        "registers": compiled.registers,
        "warps at once": found.warps,
        "instructions a score, masked": round(max(per_score), 1),
        "unmasked": round(min(per_score), 1) if len(per_score) > 1 else None,
        "ms of products": found.products * 1e3,
        "of tanh": found.special * 1e3,
        "of issuing": found.issue * 1e3,
        "of the cache": found.cache * 1e3,
        "of memory": found.memory * 1e3,
        "floor ms": found.seconds * 1e3,
        "slowest": slowest(found),
    }


def slowest(found: Floor) -> str:
    """Name the part that takes longest."""
    parts = {
        "products": found.products, "tanh": found.special, "issuing": found.issue, "cache": found.cache,
        "memory": found.memory,
    }  # fmt: skip
    return max(parts, key=lambda name: parts[name])


if __name__ == "__main__":
    sys.exit(main())
