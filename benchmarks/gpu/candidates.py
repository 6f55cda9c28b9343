"""What a comparison times: one way of computing windowed attention, the function it computes, and its inputs."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.shapes import Shape
from swat_lm.ops.slopes import slopes_for

# more copies of the inputs than a cache holds, but not more than needed to rotate through
CACHES, FEWEST_SETS, MOST_SETS = 3, 2, 16


class NotHereError(Exception):
    """A peer that cannot be measured; the message says why."""


@dataclass(frozen=True)
class Candidate:
    """One kernel with one setting."""

    name: str
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Query, key, value to output; differentiable."""
    score_function: str
    has_slopes: bool = False
    settings: str = ""
    heads_first: bool = False
    """Whether tensors are `[B, H, T, D]` instead of `[B, T, H, D]`."""

    environment: tuple[tuple[str, str], ...] = ()
    """Variables that are set while it runs."""

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Set its variables, and put back what was there."""
        before = {name: os.environ.get(name) for name, _ in self.environment}
        os.environ.update(self.environment)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value

    @property
    def label(self) -> str:
        """Name and setting."""
        return f"{self.name}, {self.settings}" if self.settings else self.name

    def arrange(self, tensor: Tensor) -> Tensor:
        """Bring `[B, T, H, D]` to the candidate's own layout, contiguous; its own inverse."""
        return tensor.transpose(1, 2).contiguous() if self.heads_first else tensor


@dataclass
class Inputs:
    """Several sets of query, key, value and gradient of the output, `[B, T, H, D]`, and the slopes `[H]`."""

    shape: Shape
    device: torch.device
    num_sets: int
    sets: list[tuple[Tensor, ...]] = field(init=False)
    slopes: Tensor = field(init=False)
    _heads_first: list[tuple[Tensor, ...]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        shape = self.shape
        generator = torch.Generator(self.device).manual_seed(0)

        def draw(heads: int) -> Tensor:
            return torch.randn(
                shape.batch, shape.length, heads, shape.head_dim, generator=generator, device=self.device,
                dtype=shape.dtype,
            )  # fmt: skip

        heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
        self.sets = [tuple(draw(n) for n in heads) for _ in range(self.num_sets)]
        slopes = slopes_for(shape.heads)
        assert slopes is not None
        self.slopes = slopes.to(self.device)

    def arranged(self, candidate: Candidate) -> list[tuple[Tensor, ...]]:
        """The sets in a candidate's layout, of which all candidates share one copy."""
        if not candidate.heads_first:
            return self.sets
        if not self._heads_first:
            self._heads_first = [tuple(candidate.arrange(tensor) for tensor in tensors) for tensors in self.sets]
        return self._heads_first


def sets_that_leave_the_cache(set_bytes: int, cache_bytes: int) -> int:
    """How many sets to rotate through, so that none is still cached when its turn comes again."""
    return max(FEWEST_SETS, min(MOST_SETS, -(-CACHES * cache_bytes // set_bytes)))


class Rotation:
    """Repeated calls of one candidate over rotating inputs: what one round times.

    `prepare` does what the clock must not see: a backward pass needs its forward done.
    """

    def __init__(self, candidate: Candidate, task: str, inputs: Inputs) -> None:
        self.candidate, self.task, self.inputs = candidate, task, inputs
        self.sets: list[tuple[Tensor, ...]] = []
        self.repeats = 1
        self.outputs: list[tuple[Tensor, tuple[Tensor, ...], Tensor]] = []

    def prepare(self) -> None:
        """Lay out the inputs, and run the forward passes whose backward is timed."""
        self.sets = self.inputs.arranged(self.candidate)
        if self.task == "backward":
            for *tensors, d_output in self.sets[: self.repeats]:
                leaves = tuple(t.detach().requires_grad_() for t in tensors)
                self.outputs.append((self.candidate.attend(*leaves), leaves, d_output))

    def __call__(self) -> None:
        """What is timed."""
        if self.task == "backward":
            for turn in range(self.repeats):
                output, leaves, d_output = self.outputs[turn % len(self.outputs)]
                torch.autograd.grad(output, leaves, d_output, retain_graph=True)
            return
        with torch.no_grad():
            for turn in range(self.repeats):
                query, key, value, _ = self.sets[turn % len(self.sets)]
                self.candidate.attend(query, key, value)

    def finish(self) -> None:
        """Drop what `prepare` made."""
        self.outputs.clear()

    def timed_by(self, clock: Callable[[Callable[[], Any]], float]) -> float:
        """Seconds of one call."""
        try:
            with self.candidate.applied():
                self.prepare()
                return clock(self) / self.repeats
        finally:
            # also where it does not fit the memory, which the next candidate needs
            self.finish()
