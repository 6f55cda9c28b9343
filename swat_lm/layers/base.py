"""The contract of every layer: what it keeps of the past, what it is called with, and what it gives back.

A layer maps hidden states `[B, T, M]` to hidden states; norms and residual connections are its own. The same code
serves training, chunks, streams, servers and `generate()`: they differ in the `Past` that they hand in.
Legend: B rows, T tokens of the chunk, P kept items, M width, N slots.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import register_dataclass
from transformers.modeling_layers import GradientCheckpointingLayer

from swat_lm.layers.chunk import Chunk, Rotary


class StateTensor(NamedTuple):
    """One tensor that a layer keeps per sequence; slots, carry, cache, snapshot and bytes all follow from these."""

    name: str
    shape: tuple[int, ...]
    """Of one item, where items are kept; of the whole, for a summary."""
    kind: Literal["window", "growing", "summary"] = "window"
    """window: the last `items` items; growing: all of them; summary: one tensor that each chunk updates."""
    items: int | None = None
    """Of a window: places needed, that of the token itself included."""
    dtype: torch.dtype | None = None
    """At least this wide, and just this for whole numbers; None: the model's."""
    fill: float = 0.0
    """What a sequence that has not begun keeps."""

    def dtype_in(self, model: torch.dtype) -> torch.dtype:
        """What it is kept in beside a model of this dtype."""
        if self.dtype is None or not self.dtype.is_floating_point:
            return self.dtype or model
        return torch.promote_types(model, self.dtype)

    def num_elements(self, context: int | None = None) -> int:
        """Elements for one sequence after `context` tokens; the context matters only where the tensor grows.

        Raises:
            ValueError: the tensor grows and no context is given.
        """
        places = {"summary": 1, "window": self.items, "growing": context}[self.kind]
        if places is None:
            raise ValueError(
                f"context: the state tensor {self.name!r} grows with the sequence; give the number of tokens"
            )
        return torch.Size(self.shape).numel() * places


def by_name(spec: tuple[StateTensor, ...]) -> dict[str, StateTensor]:
    """A layer's state tensors by their names. Raises ValueError for a spec that contradicts itself."""
    for tensor in spec:
        if tensor.kind not in ("window", "growing", "summary"):
            raise ValueError(f"state_spec: {tensor.name}: expected window, growing or summary, got {tensor.kind!r}")
        if (tensor.kind == "window") != (tensor.items is not None) or (tensor.items is not None and tensor.items < 1):
            raise ValueError(
                f"state_spec: {tensor.name}: expected `items` of at least 1 for a window and for no other kind, "
                f"got {tensor.kind} with items={tensor.items}"
            )
    found = {tensor.name: tensor for tensor in spec}
    if len(found) != len(spec):
        raise ValueError(f"state_spec: expected different names, got {[tensor.name for tensor in spec]}")
    return found


class Past(Protocol):
    """What one layer keeps, while a chunk is processed: slots in place, a functional carry, or a cache of others.

    Each name is asked for once per chunk. Of items, padding is not kept, and hidden tokens are, in their places; what
    goes into a summary is the layer's affair: it leaves both out (`Chunk.real`).
    """

    @abstractmethod
    def extend(self, **new: Tensor) -> tuple[dict[str, Tensor], int]:
        """Take new items `[B, T, *shape]` by name; return kept and new ones together `[B, P + T, *shape]`, and P."""

    @abstractmethod
    def fold(self, name: str, decay: Tensor, value: Tensor) -> Tensor:
        """Return the summary S `[B, *shape]` from before the chunk, and keep `decay * S + value` for after it.

        `decay` broadcasts to `value`. Over processes this is a scan, so both are known before S is.
        """

    @abstractmethod
    def merge(self, value: Mapping[str, Tensor], join: Callable[..., dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return summaries from before the chunk by name, and keep `join(before, value)`, which must be associative."""

    @abstractmethod
    def after(self) -> "Past":
        """The past of the next chunk, once every name was taken."""

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """What is kept; in training, what gradients cross between chunks."""


class InPlace(Past, Protocol):
    """The past of a decoding step: what is kept lies in slots, and the step may write there itself."""

    @property
    @abstractmethod
    def kept(self) -> Mapping[str, Tensor]:
        """By name: windows and growing `[N, places, *shape]`, place `position % places` holds an item; summaries
        `[N, *shape]`."""

    @property
    @abstractmethod
    def slot(self) -> Tensor:
        """int64 `[B]`: the slot of each row."""

    @property
    @abstractmethod
    def position(self) -> Tensor:
        """int64 `[B]`: items of each row before this step."""


@dataclass(frozen=True)
class Auxiliary:
    """What a layer says beside its output: returned, never stored in a module."""

    losses: Mapping[str, tuple[Tensor, Tensor | float]] = field(default_factory=dict)
    """By name, a sum in float32 and what it is divided by, once all rows of a step are added up."""
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    """Sums over the chunk that `Layer.absorb` takes in after the optimizer's step."""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """Numbers to show: means over the chunk's tokens, padding left out, so that chunks add up to rows. What is no such
    mean is made of statistics: `Layer.metrics_of`."""


# so that whoever looks for tensors in outputs finds these: FSDP gathers weights before the first gradient comes
register_dataclass(Auxiliary)

NOTHING = Auxiliary()


class Output(NamedTuple):
    """What a layer gives back."""

    hidden: Tensor
    """`[B, T, M]`; fewer tokens only where the layer `shortens`."""
    past: Past | None = None
    """For the next chunk; None where none was handed in."""
    auxiliary: Auxiliary = NOTHING


class Part(NamedTuple):
    """One of several sequences that lie one after the other in a row `[1, T, M]`."""

    tokens: slice
    """Of T: its own, which are t. There may be tokens of no part, which nobody reads."""
    chunk: Chunk
    """Where its t tokens stand, all of them real."""
    past: Past
    """Its own."""


def lay_out(parts: Sequence[Part], results: Sequence[Tensor], num_tokens: int) -> Tensor:
    """Results `[1, t, ...]` of parts in their places of `[1, T, ...]`; zeros in places of no part."""
    row = results[0].new_zeros(1, num_tokens, *results[0].shape[2:])
    for part, result in zip(parts, results, strict=True):
        row[:, part.tokens] = result
    return row


@dataclass(frozen=True)
class Shared:
    """What the layers of a model have in common."""

    norm_eps: float = 1e-6
    initializer_range: float = 0.02
    output_projection_init_scale: float = 1.0
    """Multiplies the start of the projections that write to the residual stream."""
    rotary: Callable[[int, Mapping[str, Any]], Rotary] | None = None
    """Rotary of a head size and Hugging Face's `rope_parameters`."""
    nth: int = 0
    """Of the layer that is built: its number, from 0, among those of its kind."""
    modules: dict[str, nn.Module] = field(default_factory=dict)
    """What several layers hold one of, by name: made by the first that asks, and owned by the model."""

    def once(self, name: str, make: Callable[[], nn.Module]) -> Any:
        """The module of this name, made if it is the first time that a layer asks for it.

        The layer must not register it: it is the model's parameter, saved, sharded and trained once.
        """
        if name not in self.modules:
            self.modules[name] = make()
        return self.modules[name]


class TokenMixer(nn.Module, ABC):
    """What moves information between positions: a layer, or what stands in one between norm and residual connection."""

    @abstractmethod
    def state_spec(self) -> tuple[StateTensor, ...]:
        """What is kept of the past for one sequence."""

    @abstractmethod
    def forward(self, hidden: Tensor, chunk: Chunk, past: Past | None = None) -> Output:
        """Process a chunk `[B, T, M]` after its past."""

    def step(self, hidden: Tensor, chunk: Chunk, past: InPlace) -> Tensor:
        """One real token per row, `[B, 1, M]`, nothing hidden, in place over slots; inference only."""
        return self.forward(hidden, chunk, past).hidden

    def forward_packed(self, hidden: Tensor, parts: Sequence[Part]) -> Tensor:
        """Process parts of a row `[1, T, M]`, each after its past; inference only. In places of no part, any numbers.

        A part must come out as `forward` has it. What is computed token by token may be computed for all at once.
        """
        results = [self.forward(hidden[:, part.tokens], part.chunk, part.past).hidden for part in parts]
        return lay_out(parts, results, hidden.shape[1])

    @abstractmethod
    def flops(self, num_tokens: int, num_past: int = 0) -> int:
        """FLOPs of the matrix products of one row of T tokens after `num_past`: a multiply-add is 2, no recomputation.

        Pairs that a window or causality hide do not count.
        """

    @abstractmethod
    def reach(self) -> int | None:
        """Tokens, itself included, that the output at one place depends on through this layer; None: all before it.

        The first tokens of its document do not count where they are kept.
        """

    def aligned_to(self) -> int | None:
        """Tokens of the segments, counted from the document's start, to which what it sees is aligned; None: none.

        Then the last token of a segment alone sees as far as `reach` says, and from the first of one.
        """
        return None

    def first_kept(self) -> int:
        """First tokens of each document that every later output depends on, however far away."""
        return 0

    def refuses_past(self) -> str | None:
        """Why the layer cannot go on from a past, in one sentence; None where it can."""
        return None

    def refuses(self, chunk: Chunk) -> str | None:
        """Why the layer cannot process such a chunk, in one sentence; None where it can."""
        return None


class Layer(TokenMixer, GradientCheckpointingLayer):
    """A kind of layer: one file, one row of `LAYERS`, its settings.

    Hugging Face's base class checkpoints `forward` where a tool asks for it (every so many layers), and lets such tools
    find the layers. So arguments of `forward` are positional.
    """

    name: ClassVar[str]
    """What `SwatConfig.layers` calls it."""
    Settings: ClassVar[type]
    """A frozen dataclass of what may be set; a configuration's fields of the same names are its defaults."""
    remark: ClassVar[str] = ""
    """What must be said wherever its name is shown to people."""
    shortens: ClassVar[bool] = False
    """Whether it returns fewer tokens than it gets."""
    draws_noise: bool = False
    """Whether its training draws from `Chunk.seed`."""
    judges_rows: str | None = None
    """The weight, by its setting's name, of an auxiliary loss of each row as a whole, to which those of a row's chunks
    do not add up; None where there is no such loss."""

    @classmethod
    def build(cls, settings: Any, width: int, index: int, shared: Shared) -> "Layer":
        """Layer number `index` of a model of this width. Raises ValueError for settings that do not fit the width."""
        return cls(settings, width, index, shared)

    @classmethod
    def settle(cls, values: dict[str, Any], given: frozenset[str], width: int) -> dict[str, Any]:
        """Fill in what follows from other settings, before they are checked.

        Args:
            values: all settings by name: the entry's own over the configuration's fields over the kind's defaults.
            given: those that the entry itself names.
            width: M.
        """
        return values

    @staticmethod
    def layer_type(settings: Any) -> str:
        """Hugging Face's name for such a layer."""
        return "linear_attention"

    @classmethod
    def keeps_beside_keys(cls, settings: Any) -> str | None:
        """What such a layer keeps that is no list of items, in words; None: keys and values alone. As `state_spec`."""
        return "a summary" if cls.layer_type(settings) == "linear_attention" else None

    def num_handed_on(self, num_tokens: int) -> int:
        """How many of so many tokens it hands on; another number only where it `shortens`."""
        return num_tokens

    def idle_in(self, num_tokens: int) -> str | None:
        """What of the layer does nothing in rows of so many tokens, in words, and what to do; None where all counts."""
        return None

    def init_weights(self, shared: Shared) -> None:
        """Start the parameters that are neither linear, embedding nor norm weights; others may be started again."""

    def optimizer_options(self) -> dict[str, dict[str, Any]]:
        """By parameter name, what the optimizer does otherwise: `{"A_log": {"weight_decay": 0.0}}`.

        `weight_decay` stands in the place of the recipe's; `learning_rate_factor` multiplies the step's learning rate.
        """
        return {}

    def metrics_of(self, statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Numbers to show of the statistics of one step, summed over micro-batches and processes, before `absorb`."""
        return {}

    def absorb(self, statistics: Mapping[str, Tensor]) -> None:
        """Take in the statistics of one step, summed over micro-batches and processes, after the optimizer's step."""
        raise AssertionError(f"{self.name} returned statistics {sorted(statistics)} but does not absorb them")

    def decoding_plan(self) -> Any:
        """The layer laid out for decoding on a CPU, see `swat_lm.model.decoding`; None: `step` serves."""
        return None
