"""The shapes of the operator's benchmark on GPUs, and how many of them a run takes."""

from dataclasses import dataclass
from itertools import product

import torch

TASKS = ("forward", "backward")


@dataclass(frozen=True)
class Shape:
    """One call: B sequences of T tokens, H query heads over K key/value heads of size D, window W."""

    batch: int
    heads: int
    kv_heads: int
    length: int
    window: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads

    def __str__(self) -> str:
        """The shape in the project's letters."""
        return f"B{self.batch} H{self.heads} K{self.kv_heads} T{self.length} D{self.head_dim} W{self.window}"


@dataclass(frozen=True)
class Plan:
    """What one run measures, in order of importance: a run that is out of time leaves the end out."""

    attention: tuple[Shape, ...]
    decode: tuple[Shape, ...]
    # batch and length of the training step
    training: tuple[tuple[int, int], ...]
    rounds: int
    # whether compilers search for the best tiles, which takes minutes per shape
    thorough: bool


# the one published figure of a window: FlashAttention-3 0.582 ms forward, 2.279 ms backward on an H100
# (https://github.com/pytorch/pytorch/pull/137036)
ANCHOR = Shape(batch=4, heads=16, kv_heads=16, length=16384, window=512, head_dim=64)


def _attention(length: int, window: int, head_dim: int, group: int) -> Shape:
    return Shape(8, 16, 16 // group, length, window, head_dim)


def _decode(batch: int, window: int, head_dim: int, group: int) -> Shape:
    # the stream is four windows old, so that every ring is full
    return Shape(batch, 16, 16 // group, 4 * window, window, head_dim)


LENGTHS, WINDOWS, HEAD_DIMS, GROUPS = (16384, 4096, 65536), (128, 256, 1024, 4096), (64, 128), (1, 4, 8)
FULL = Plan(
    (ANCHOR, *(_attention(*sizes) for sizes in product(LENGTHS, WINDOWS, HEAD_DIMS, GROUPS))),
    tuple(_decode(*sizes) for sizes in product((64, 8, 256), (128, 1024, 4096), (64, 128), (1, 4))),
    ((4, 4096), (1, 16384)),
    rounds=9,
    thorough=True,
)
QUICK = Plan(
    (ANCHOR, _attention(16384, 128, 64, 1), _attention(16384, 1024, 64, 1), _attention(16384, 1024, 128, 4)),
    (_decode(64, 1024, 64, 1), _decode(8, 1024, 128, 4)),
    ((4, 4096),),
    rounds=5,
    thorough=False,
)
