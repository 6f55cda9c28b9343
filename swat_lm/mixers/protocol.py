"""What every token mixer is to the model: forward over a chunk, one lean step, and a statement of the state it keeps.

The cache, the bytes shown to users and the snapshots on disk are made from the state's statement alone.
Legend: B batch, T tokens of the chunk, M model width, K key/value heads, D head size.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn


class StateTensor(NamedTuple):
    """One tensor of what a mixer keeps for one sequence; a None in the shape grows with the sequence."""

    name: str
    shape: tuple[int | None, ...]

    def num_elements(self, context: int | None = None) -> int:
        """Elements after `context` tokens; the context matters only where the shape grows.

        Raises:
            ValueError: the tensor grows and no context is given.
        """
        count = 1
        for size in self.shape:
            if size is None and context is None:
                raise ValueError(
                    f"context: the state tensor {self.name!r} grows with the sequence; give the number of tokens"
                )
            count *= context if size is None else size  # type: ignore[operator]
        return count


# beyond what any layer keeps, and far from where 32-bit indices end: a stream has no end
FARTHEST = -(2**30)


@dataclass
class Visible:
    """The first key that each query may see, counted from the first token of the chunk (negative: in the past).

    `first` is int32 `[B, T]`, or None where only causality and the window limit what is seen.
    """

    first: Tensor | None = None
    _shifted: dict[int, Tensor] = field(default_factory=dict)

    def first_visible(self, num_past: int) -> Tensor | None:
        """Indices into keys of which `num_past` stand before the chunk; layers with equal pasts share the tensor."""
        if self.first is None:
            return None
        if num_past not in self._shifted:
            self._shifted[num_past] = (self.first + num_past).clamp(min=0)
        return self._shifted[num_past]


class Memory(Protocol):
    """The past of one attention layer while a chunk is processed."""

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, int]:
        """Take the chunk's `[B, T, K, D]`; return all keys and values to attend over and how many precede the chunk."""
        ...

    def after(self, key: Tensor, value: Tensor) -> "Memory":
        """The memory for the next chunk, given what `append` returned."""
        ...


@dataclass
class RingMemory:
    """Rings of one layer and where each sequence stands in them; changed in place, inference only.

    Place `position % W` of a ring `[B, W, K, D]` holds the key of that position. A full-attention layer is a ring that
    is enlarged before it would wrap.
    """

    key_ring: Tensor
    value_ring: Tensor
    slot: Tensor
    """int64 `[B]`: the ring of each sequence."""
    position: Tensor
    """int64 `[B]`: real tokens seen so far; the next token's position."""
    num_real: Tensor | None = None
    """int64 `[B]`: real tokens in the coming chunk, right-aligned; None when all are real."""
    reach_back: int | None = None
    """Keys before the chunk that a query may need, at most W - 1; None = W - 1."""

    def serves_step(self, hidden: Tensor) -> bool:
        """Whether the chunk `[B, T, M]` is one real token per sequence that nobody differentiates."""
        return hidden.shape[1] == 1 and self.num_real is None and not torch.is_grad_enabled()

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, int]:
        """Attend over old state followed by the chunk, then keep the last W of it."""
        size = self.key_ring.shape[1]
        num_past = size - 1 if self.reach_back is None else self.reach_back
        key, value = key.to(self.key_ring.dtype), value.to(self.value_ring.dtype)
        keys, values = key, value
        if num_past:
            keys = torch.cat((self._past(self.key_ring, num_past), key), dim=1)
            values = torch.cat((self._past(self.value_ring, num_past), value), dim=1)
        self._write(self.key_ring, key.detach())
        self._write(self.value_ring, value.detach())
        return keys, values, num_past

    def after(self, key: Tensor, value: Tensor) -> "RingMemory":
        """The same rings: they were changed in place."""
        return self

    def _past(self, ring: Tensor, count: int) -> Tensor:
        # chronological and right-aligned: the last of them is the token before the chunk
        back = torch.arange(-count, 0, device=ring.device)
        place = (self.position[:, None] + back) % ring.shape[1]
        return ring[self.slot[:, None], place]

    def _write(self, ring: Tensor, new: Tensor) -> None:
        num_tokens, size = new.shape[1], ring.shape[1]
        count = min(num_tokens, size)
        num_real = self.num_real
        end = self.position + (num_tokens if num_real is None else num_real)
        place = (end[:, None] + torch.arange(-count, 0, device=ring.device)) % size
        new = new[:, num_tokens - count :]
        slot = self.slot[:, None]
        if num_real is not None:
            # padded columns stand left of the text: what the ring holds there stays
            real = torch.arange(count, device=ring.device) >= (count - num_real)[:, None]
            new = torch.where(real[:, :, None, None], new, ring[slot, place])
        ring[slot, place] = new


@dataclass(frozen=True)
class CarryMemory:
    """Functional state for training chunk by chunk: the last `keep` keys and values; never changed in place.

    `keep` is window - 1, or None for full attention, which keeps everything.
    """

    keep: int | None
    key: Tensor | None = None
    value: Tensor | None = None

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, int]:
        """Old state followed by the chunk."""
        if self.key is None or self.value is None:
            return key, value, 0
        return torch.cat((self.key, key), dim=1), torch.cat((self.value, value), dim=1), self.key.shape[1]

    def after(self, key: Tensor, value: Tensor) -> "CarryMemory":
        """What the next chunk may need of these keys and values."""
        if self.keep is not None and key.shape[1] > self.keep:
            start = key.shape[1] - self.keep
            key, value = key[:, start:], value[:, start:]
        return CarryMemory(self.keep, key, value)

    def detached(self) -> "CarryMemory":
        """The same keys and values, cut from the graph (and copied, so that a long chunk does not live on in them)."""
        if self.key is None or self.value is None:
            return self
        return CarryMemory(self.keep, self.key.detach().clone(), self.value.detach().clone())


class Mixer(nn.Module, ABC):
    """The part of a layer that moves information between positions."""

    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def from_config(cls, config: Any, layer_index: int) -> "Mixer":
        """Build the mixer of one layer from a SwatConfig."""

    @staticmethod
    @abstractmethod
    def layer_type(window: int | None) -> str:
        """Hugging Face's name for such a layer; it chooses the stock cache."""

    @abstractmethod
    def state_spec(self) -> tuple[StateTensor, ...]:
        """What is kept of the past for one sequence."""

    @abstractmethod
    def forward(
        self, hidden: Tensor, angles: tuple[Tensor, Tensor] | None, visible: Visible, memory: Memory | None = None
    ) -> tuple[Tensor, Memory | None]:
        """Mix a chunk `[B, T, M]`; returns the mixed chunk and the memory for the next one (None without memory)."""

    @abstractmethod
    def step(self, hidden: Tensor, angles: tuple[Tensor, Tensor] | None, memory: RingMemory) -> Tensor:
        """Mix one token per sequence, `[B, 1, M]`, in place over the rings; inference only.

        The angles are laid out over whole heads, `[B, 1, 1, D]`, as `LayerRotary.step_angles` gives them.
        """
