"""One more token for rows of a pool: as a call of the model, or as a CUDA graph for each size of batch.

Legend: B rows of a batch, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from swat_lm.model.modeling import SwatForCausalLM
from swat_lm.model.slots import Slots

__all__ = ["CudaGraphs", "GraphedSteps", "Steps"]


class Steps:
    """Decodes batches whose sizes are few."""

    def __init__(self, model: SwatForCausalLM, slots: Slots) -> None:
        self._model, self._slots = model, slots

    def step(self, tokens: Sequence[int], slots: Sequence[int]) -> Tensor:
        """Let slots read a token each; returns the logits `[B, V]`, which the next step may overwrite.

        A row comes out the same to the bit whatever the others of a batch of this size hold.
        """
        token = self._on_device(tokens)[:, None]
        # a pool of one is a stream, which has a shorter way, and no mates
        slot = None if self._slots.num_slots == 1 else self._on_device(slots)
        return self._model.decode_step(token, self._slots, slot, batch_invariant=slot is not None)

    def _on_device(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, device=self._slots.position.device)


class CudaGraphs:
    """Records what functions do on the current device, in graphs that share one pool of memory."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        """What does it again, in one call; all that it reads and writes must stay where it is, outside of the pool."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # libraries choose their kernels and take their workspaces with the first calls
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            function()
        self._pool = graph.pool()
        return graph.replay


class GraphedSteps(Steps):
    """The same, with a graph for each size of batch that is recorded when it is made.

    A step is then two small copies and one call, and takes no memory: what it needs lies in the graphs' own pool. Has
    not run on a GPU; tested with a `record` that calls the function again.
    """

    def __init__(
        self,
        model: SwatForCausalLM,
        slots: Slots,
        sizes: Sequence[int],
        record: Callable[[Callable[[], None]], Callable[[], None]] | None = None,
    ) -> None:
        """Record all sizes, the largest first, whose memory the others use too; first of all, since slots are emptied.

        `record` gives what does a function again; None: CUDA graphs.

        Raises ValueError for a pool of one slot, and for layers that keep everything, which read another number of
        items in every step.
        """
        super().__init__(model, slots)
        record = record or CudaGraphs()
        if slots.grows:
            raise ValueError(
                "graphs: a layer of the model keeps all it has seen, and no step is like another; leave it out"
            )
        if slots.num_slots == 1:
            raise ValueError("graphs: expected a pool of at least two slots")
        self._token: dict[int, Tensor] = {}
        self._slot: dict[int, Tensor] = {}
        self._logits: dict[int, Tensor] = {}
        self._replay: dict[int, Callable[[], None]] = {}
        for size in sorted(sizes, reverse=True):
            self._token[size] = self._on_device([0] * size)[:, None]
            self._slot[size] = self._on_device(range(size))  # type: ignore[arg-type]
            self._replay[size] = record(lambda size=size: self._call(size))
        slots.reset()
        slots.ragged = True

    @torch.inference_mode()
    def _call(self, size: int) -> None:
        logits = self._model.decode_step(self._token[size], self._slots, self._slot[size], batch_invariant=True)
        if size in self._logits:
            self._logits[size].copy_(logits)
        else:
            self._logits[size] = logits

    def step(self, tokens: Sequence[int], slots: Sequence[int]) -> Tensor:
        """See Steps."""
        size = len(tokens)
        self._token[size].copy_(self._on_device(tokens)[:, None])
        self._slot[size].copy_(self._on_device(slots))
        columns, fullest = self._slots.num_columns, self._slots.fullest
        self._replay[size]()
        # a graph counts on the device alone
        self._slots.num_columns, self._slots.fullest = columns, fullest
        self._slots.count(1)
        self._slots.logits = None
        return self._logits[size]
