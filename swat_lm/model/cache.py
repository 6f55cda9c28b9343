"""Caches for generation: an adapter to Hugging Face's own, and rings of constant size and address.

`RingCache` is what `generate()` uses where every layer has a window; the library's caches serve the rest.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from swat_lm.mixers.protocol import FARTHEST, Memory, RingMemory, Visible
from swat_lm.model.chunk import ChunkPlan
from swat_lm.model.configuration import SwatConfig
from swat_lm.ops.ring import empty_ring


class StockMemory:
    """One layer of any Hugging Face cache as the mixers' memory."""

    def __init__(self, cache: Cache, layer_index: int, num_columns: int) -> None:
        self._cache = cache
        self._layer_index = layer_index
        self._before = num_columns

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, int]:
        """Update the cache with `[B, T, K, D]`; it answers with what its layer still holds, chunk included."""
        num_tokens = key.shape[1]
        num_columns, first_column = self._cache.get_mask_sizes(num_tokens, self._layer_index)
        keys, values = self._cache.update(key.transpose(1, 2), value.transpose(1, 2), self._layer_index)
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        # a sliding layer of window 1 announces no past but returns all of it; what came back decides
        num_past = self._before - first_column if keys.shape[1] == num_columns else keys.shape[1] - num_tokens
        return keys, values, num_past

    def after(self, key: Tensor, value: Tensor) -> "StockMemory":
        """The same cache: it was changed in place."""
        return self


class RingLayer(CacheLayerMixin):
    """Keys and values of one windowed layer in rings `[B, W, K, D]`: constant memory at a constant address."""

    is_sliding = True

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window
        self.cumulative_length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for states `[B, K, T, D]` (Hugging Face's layout)."""
        batch, heads, _, size = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = empty_ring(batch, self.window, heads, size, key_states)
        self.values = empty_ring(batch, self.window, heads, size, value_states)
        self.is_initialized = True

    def grow(self, size: int) -> None:
        """More places for a ring that has not wrapped yet, where a place is a position."""
        old, self.window = self.window, size
        if self.is_initialized and size > old:
            self.keys, self.values = (enlarged(ring, size) for ring in (self.keys, self.values))  # type: ignore[arg-type]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hugging Face's entry, for batches without padding: returns the last W - 1 keys and the new ones, in order."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch = key_states.shape[0]
        position = torch.full((batch,), self.cumulative_length, device=key_states.device)
        slot = torch.arange(batch, device=key_states.device)
        past = min(self.cumulative_length, self.window - 1)
        memory = RingMemory(self.keys, self.values, slot, position, reach_back=past)  # type: ignore[arg-type]
        keys, values, _ = memory.append(key_states.transpose(1, 2), value_states.transpose(1, 2))
        self.cumulative_length += key_states.shape[-2]
        return keys.transpose(1, 2), values.transpose(1, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and first column of what `update` returns."""
        past = min(self.cumulative_length, self.window - 1)
        return past + query_length, self.cumulative_length - past

    def get_seq_length(self) -> int:
        """Columns seen so far, padding included."""
        return self.cumulative_length

    def get_max_length(self) -> int:
        """The window: more is never held."""
        return self.window

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence, for beams and several samples per prompt."""
        if self.is_initialized:
            self.keys, self.values = (ring.repeat_interleave(repeats, dim=0) for ring in (self.keys, self.values))  # type: ignore[union-attr]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the chosen sequences."""
        if self.is_initialized:
            self.keys, self.values = self.keys[indices], self.values[indices]  # type: ignore[index]


class RingCache(Cache):
    """Rings for every layer of a model whose layers all have windows, each sequence at its own position.

    Left padding is never stored: place `position % W` belongs to the real token of that position. It cannot be
    rolled back, so assisted generation uses the library's cache.
    """

    layers: list[RingLayer]

    def __init__(self, config: SwatConfig, max_length: int | None = None) -> None:
        """Prepare empty rings, at first no longer than `max_length` tokens; they grow up to the window if more come.

        Raises:
            ValueError: a layer without a window.
        """
        windows = [config.window(index) for index in range(config.num_hidden_layers)]
        sizes = []
        for index, window in enumerate(windows):
            if window is None:
                raise ValueError(f"layer {index} has full attention: use transformers' DynamicCache(config=config)")
            sizes.append(window if max_length is None else min(window, max(max_length, 1)))
        super().__init__(layers=[RingLayer(size) for size in sizes])  # type: ignore[arg-type]
        self._windows: list[int] = windows  # type: ignore[assignment]
        assert config.num_key_value_heads is not None
        assert config.head_dim is not None
        self._heads, self._head_dim = config.num_key_value_heads, config.head_dim
        self.max_length = max_length
        self.position: Tensor | None = None
        """int64 `[B]`: real tokens of each sequence so far."""
        self._slot: Tensor | None = None
        self._ragged = False

    def memories(self, plan: ChunkPlan, num_tokens: int, like: Tensor) -> list[Memory]:
        """The layers' memories for a chunk of hidden states like `[B, T, M]`; allocates the rings on first use.

        Raises:
            ValueError: right padding (names the row), or packed documents.
        """
        if plan.packed:
            raise ValueError("packed documents cannot be decoded from: pass use_cache=False, or one document a row")
        seen = self.get_seq_length()
        if self.max_length is not None and seen + num_tokens > self.max_length:
            self.max_length = max(2 * self.max_length, seen + num_tokens)
            for layer, window in zip(self.layers, self._windows, strict=True):
                layer.grow(min(window, self.max_length))
        if plan.num_real is not None:
            _refuse_right_padding(plan, num_tokens)
        if self.position is None or self._slot is None:
            self.position = torch.zeros(like.shape[0], dtype=torch.int64, device=like.device)
            self._slot = torch.arange(like.shape[0], device=like.device)
        for layer in self.layers:
            if not layer.is_initialized:
                empty = like.new_empty(like.shape[0], self._heads, 0, self._head_dim)
                layer.lazy_initialization(empty, empty)
        num_real = self._num_real(plan, num_tokens)
        self._ragged = self._ragged or num_real is not None
        return [
            RingMemory(
                layer.keys,  # type: ignore[arg-type]
                layer.values,  # type: ignore[arg-type]
                self._slot,
                self.position,
                num_real,
                reach_back=min(seen, layer.window - 1),
            )
            for layer in self.layers
        ]

    def visible(self, plan: ChunkPlan, num_tokens: int) -> Visible:
        """What the chunk may see in the rings, where real tokens stand at their own positions."""
        if not self._ragged or num_tokens == 1:
            return Visible()
        assert self.position is not None
        num_real = self._num_real(plan, num_tokens)
        padding = 0 if num_real is None else num_tokens - num_real
        first = (padding - self.position).clamp(min=FARTHEST).to(torch.int32).unsqueeze(1)
        return Visible(first.expand(-1, num_tokens).contiguous())

    @staticmethod
    def _num_real(plan: ChunkPlan, num_tokens: int) -> Tensor | None:
        if plan.num_real is None or bool((plan.num_real == num_tokens).all()):
            return None
        return plan.num_real

    def advance(self, plan: ChunkPlan, num_tokens: int) -> None:
        """Count a chunk that went through all layers."""
        assert self.position is not None
        self.position = self.position + (num_tokens if plan.num_real is None else plan.num_real)
        for layer in self.layers:
            layer.cumulative_length += num_tokens

    def reset(self) -> None:
        """Forget everything, keep the memory."""
        super().reset()
        self.position = self._slot = None
        self._ragged = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        if self.position is not None:
            self.position = self.position.index_select(0, beam_idx.to(self.position.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        super().batch_repeat_interleave(repeats)
        if self.position is not None:
            self.position = self.position.repeat_interleave(repeats)
            self._slot = torch.arange(self.position.shape[0], device=self.position.device)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the chosen sequences."""
        super().batch_select_indices(indices)
        if self.position is not None:
            self.position = self.position[indices]
            self._slot = torch.arange(self.position.shape[0], device=self.position.device)


def enlarged(ring: Tensor, size: int) -> Tensor:
    """A ring `[B, W, K, D]` with more places, the new ones zero."""
    larger = empty_ring(ring.shape[0], size, ring.shape[2], ring.shape[3], ring)
    larger[:, : ring.shape[1]] = ring
    return larger


def _refuse_right_padding(plan: ChunkPlan, num_tokens: int) -> None:
    assert plan.num_real is not None
    assert plan.past_real is not None
    assert plan.visible.first is not None
    # a row that has real tokens must end with one: otherwise the padding stands on the right
    ends_padded = plan.visible.first[:, -1] >= num_tokens
    started = (plan.past_real + plan.num_real) > 0
    rows = (ends_padded & started).nonzero()
    if rows.numel():
        raise ValueError(
            f"attention_mask: row {int(rows[0])} is padded on the right, which cannot be followed by decoding; "
            "pad on the left (tokenizer.padding_side = 'left')"
        )
