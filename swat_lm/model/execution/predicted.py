"""What a training step will need of memory under an execution, found by running it on shapes without numbers.

Nothing of a model's size is allocated. A pass over many blocks or chunks is not run as a whole: two shorter ones tell
how the peak grows. Not counted: what kernels need for themselves, and PyTorch itself.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from transformers.initialization import no_init_weights

from swat_lm.model.building import layers_without_weights
from swat_lm.model.configuration import SwatConfig
from swat_lm.model.cost import count_parameters
from swat_lm.model.execution.live_bytes import LiveBytes
from swat_lm.model.execution.table import make_execution
from swat_lm.model.loss import default_chunk

__all__ = ["Line", "MemoryNeed", "Predicted"]

MANY = 8
"""Blocks or chunks from which a pass grows by the same for each."""
FLOAT = 4
"""Bytes of a weight, its gradient, and each of AdamW's two averages: training keeps them in float32."""


@dataclass(frozen=True)
class Line:
    """Bytes of a pass as a line over the tokens of a row."""

    start: float
    per_token: float

    def at(self, num_tokens: int) -> int:
        """Bytes at a length."""
        return math.ceil(self.start + self.per_token * num_tokens)


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes of one process."""

    weights: int
    optimizer: int
    one_pass: int
    """The most that lives at once of what a forward and a backward pass make, gradients included."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.optimizer + self.one_pass


class Predicted:
    """Predictions for one model under one execution."""

    def __init__(
        self,
        config: SwatConfig,
        name: str = "plain",
        settings: Mapping[str, Any] | None = None,
        *,
        rows: int = 1,
        narrow: bool = False,
        shards: int = 1,
    ) -> None:
        """Of `rows` per pass and process; `narrow`: under bfloat16 autocast; weights lie in `shards` parts.

        Raises ValueError for an execution that cannot run the model.
        """
        self.config, self.name, self.settings = config, name, dict(settings or {})
        self.rows, self.narrow, self.shards = rows, narrow, shards
        self._simulated: dict[int, int] = {}
        execution = make_execution(name, self.settings)
        layers = layers_without_weights(config)
        reason = execution.refuses(layers)
        if reason is not None:
            raise ValueError(f"execution: {name} cannot run this model: {reason}")
        chosen = execution.settings
        self.on_disk = getattr(chosen, "carries", None) == "disk"
        self.chunk = getattr(chosen, "chunk_size", None)
        windows = [tensor.items or 1 for layer in layers for tensor in layer.state_spec()]
        size = self.chunk or getattr(chosen, "block_size", None)
        self.is_scanned = size is not None
        """Whether the operations of a pass are as many as there are blocks or chunks."""
        self.unit = max([size or 1, *windows])
        self.carry = sum(
            tensor.num_elements() * tensor.dtype_in(torch.bfloat16 if narrow else torch.float32).itemsize
            for layer in layers if self.chunk for tensor in layer.state_spec()
        )  # fmt: skip

    @cached_property
    def parameters(self) -> int:
        """Weights of the model."""
        return count_parameters(self.config).total

    @cached_property
    def first(self) -> int:
        """Tokens of a row from which a pass grows by the same for each: of many blocks or chunks, and over two parts
        of the loss, which live together."""
        first = MANY * self.unit
        if not self.chunk:
            first = max(first, -(-2 * default_chunk(self.config.vocab_size) // (self.rows * self.unit)) * self.unit)
        return first

    @cached_property
    def line(self) -> Line:
        """Of longer rows."""
        return self._line(self.first, self.first + max(1, MANY // 2) * self.unit)

    def need(self, num_tokens: int) -> MemoryNeed:
        """For rows of this length; with gradients that are reduced to shards counted as such, but for chunks, which
        gather them first."""
        is_short = not self.is_scanned or num_tokens <= self.first
        peak = self.simulate(num_tokens) if is_short else self.line.at(num_tokens)
        whole = self.parameters * FLOAT
        if self.shards > 1 and not self.chunk:
            peak -= whole - whole // self.shards
        return MemoryNeed(whole // self.shards, 2 * whole // self.shards, max(peak, whole // self.shards))

    def longest(self, available: int, near: int = 1024) -> int:
        """Tokens of the longest row that this many bytes hold, to within a few per cent; 0: hardly any.

        `near` is a length to begin with. Each guess is where the line through the two before meets the size.
        """
        if self.is_scanned:
            near = max(near, self.first + 1)
        first, second = near, 2 * near
        for _ in range(3):
            low, high = self.need(first).total, self.need(second).total
            if high == low:
                break
            guess = second + math.floor((available - high) * (second - first) / (high - low))
            if guess <= 0 or guess == second:
                return max(0, guess)
            if abs(guess - second) < second // 100:
                return guess
            first, second = second, guess
        return max((each for each in (first, second) if self.need(each).total <= available), default=0)

    def _line(self, first: int, second: int) -> Line:
        low, high = self.simulate(first), self.simulate(second)
        slope = (high - low) / (second - first)
        return Line(low - slope * first, slope)

    def simulate(self, num_tokens: int) -> int:
        """Bytes of one pass over rows of this length, by running it on shapes.

        Raises ValueError for a model whose operations depend on numbers.
        """
        if num_tokens not in self._simulated:
            try:
                self._simulated[num_tokens] = self._simulate(num_tokens)
            except (DataDependentOutputException, DynamicOutputShapeException) as error:
                raise ValueError(
                    f"execution: {self.name} cannot be predicted: what a layer computes depends on numbers, and shapes "
                    f"have none ({error}); measure it instead"
                ) from None
        return self._simulated[num_tokens]

    def _simulate(self, num_tokens: int) -> int:
        from swat_lm.model.modeling import SwatForCausalLM

        settings = {key: value for key, value in self.settings.items() if key not in ("carries", "folder")}
        # no weight is drawn, and some start from numbers that shapes do not have
        with torch.random.fork_rng([]), FakeTensorMode(allow_non_fake_inputs=True), no_init_weights():
            model = SwatForCausalLM(self.config).train()
            model.set_execution(self.name, **settings)
            ids = torch.zeros(self.rows, num_tokens, dtype=torch.int64)
            with LiveBytes() as live:
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.narrow):
                    loss = model(ids, labels=ids).loss
                loss.backward()
        held = self.carry * self.rows * (-(-num_tokens // self.chunk) - 1) if self.chunk and self.on_disk else 0
        return live.peak - held
