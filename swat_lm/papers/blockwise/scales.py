"""Blockwise parallel transformers at three scales: tiny and small are measured, the paper's sizes predicted. Data only.

The paper's models are those of its official code's README, trained by Ring Attention's authors as the baseline of their
table 3 on 8 A100 of 80 GB: thousand tokens of vanilla, memory-efficient and blockwise.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from swat_lm.papers.scales import Scale

__all__ = ["MEASURES", "SCALES", "Measure", "Size"]

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Size:
    """One model: GPT's shape, with a feed-forward of four widths."""

    name: str
    width: int
    layers: int
    heads: int
    vocabulary: int
    available: int
    """Bytes that rows are to fit in, with weights, gradients and optimizer."""
    shards: int = 1
    """Processes that weights, gradients and optimizer are shared out to."""
    printed: tuple[int, int, int] | None = None
    """Thousand tokens of vanilla, memory-efficient and blockwise, as printed."""


@dataclass(frozen=True)
class Measure:
    """What is done at a scale."""

    sizes: tuple[Size, ...]
    most_measured: int
    """Longest row that is run and counted, of attention to all tokens, whose time grows with the square of the row;
    beyond, and where 0, peaks are predicted by running shapes."""
    most_windowed: int
    """The same of attention to a window."""
    curve: tuple[int, ...]
    """Lengths of the curve of peaks."""
    exact: int
    """Length of the row whose gradients are compared, in float64; divided by no block."""
    narrow: bool = False
    """Whether products are in bfloat16."""


def scale(name: str, about: str, for_people: bool = True, **sizes: int) -> Scale:
    """A scale without budgets: nothing is trained. Sizes in tokens: block, keys (a block of them), window, chunk."""
    return Scale(name, about, budgets={}, sizes=sizes, lengths=(), pieces=0, for_people=for_people)


SCALES = {
    one.name: one
    for one in (
        scale("tiny", "width 32, 4 layers, 80 MiB for everything; for two cores",
              block=512, keys=1024, window=128, chunk=512),
        scale("small", "width 512, 8 layers, 16 GiB; longer rows than 16,384 are predicted",
              block=1024, keys=2048, window=512, chunk=2048),
        scale("paper", "3B, 7B and 13B in bfloat16, a share of eight A100 of 80 GB; all predicted",
              block=2048, keys=4096, window=4096, chunk=16_384),
        scale("miniature", "for tests: everything runs", False, block=16, keys=16, window=12, chunk=24),
    )
}  # fmt: skip
MEASURES: Mapping[str, Measure] = {
    "tiny": Measure(
        (Size("tiny", 32, 4, 4, 1024, 80 * MIB),), 8192, 24_576, (512, 1024, 2048, 4096, 8192, 16_384), 700
    ),
    "small": Measure(
        (Size("small", 512, 8, 8, 8192, 16 * GIB),), 16_384, 65_536, (1024, 2048, 4096, 8192, 16_384), 1500
    ),
    "paper": Measure(
        (
            Size("3B", 2560, 32, 32, 50_432, 80 * 10**9, 8, (4, 32, 64)),
            Size("7B", 4096, 32, 32, 50_432, 80 * 10**9, 8, (2, 16, 32)),
            Size("13B", 5120, 40, 40, 50_432, 80 * 10**9, 8, (2, 4, 16)),
        ),
        0, 0, (), 0, narrow=True,
    ),
    "miniature": Measure((Size("miniature", 32, 1, 2, 64, 2 * MIB),), 128, 128, (32, 64), 45),
}  # fmt: skip
