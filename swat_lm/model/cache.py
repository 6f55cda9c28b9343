"""The cache of `generate()`: Hugging Face's view on slots, for every plan of layers.

To whoever looks in it has `transformers`' layout: keys and values `[B, K, tokens, D]`, oldest first.
Legend: B sequences, T tokens, K key/value heads, D head size.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from swat_lm.layers.base import StateTensor
from swat_lm.layers.chunk import FARTHEST, Chunk
from swat_lm.model.configuration import SwatConfig
from swat_lm.model.kept import check_kept
from swat_lm.model.pasts import Rows, SlotPast
from swat_lm.model.slots import Slots


class SlotCacheLayer(CacheLayerMixin):
    """One layer of a `SlotCache`, as Hugging Face's tools look at it."""

    supports_early_init = False

    def __init__(
        self, cache: "SlotCache", index: int, window: int | None, keeps_keys: bool, beside: str | None
    ) -> None:
        """`beside` is what the layer keeps that is no list of items, in words."""
        self._cache, self._index = cache, index
        self.window, self.keeps_keys, self.beside = window, keeps_keys, beside
        self.is_sliding = window is not None
        self.num_updated = 0
        """Tokens that came by `update`."""

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        """Whether any token came."""
        return self._cache.slots is not None

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether tokens can be taken back."""
        return self.beside is None

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """`[B, K, tokens, D]` of what is still held, oldest first; None before the first token."""
        return self._in_order("key")

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """As `keys`."""
        return self._in_order("value")

    def _in_order(self, name: str) -> Tensor | None:
        slots = self._cache.slots
        if slots is None or not self.keeps_keys:
            return None
        kept = slots.layers[self._index][name]
        rows = Rows(slots._order, slots.position, 0, slots.fullest)
        held = kept[rows.past_places(kept.shape[1], min(slots.num_columns, kept.shape[1]))]
        return held.transpose(1, 2)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the model makes the slots, or `update` does."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hugging Face's entry, for batches without padding: returns the last W - 1 keys and the new ones, in order.

        Raises:
            ValueError: the layer keeps something else than keys and values.
        """
        if self.beside is not None or not self.keeps_keys:
            kept = f"{self.beside} beside keys and values" if self.keeps_keys else "no keys and values"
            raise ValueError(f"layer {self._index} keeps {kept}; its model fills this cache")
        key, value = key_states.transpose(1, 2), value_states.transpose(1, 2)
        slots = self._cache.prepare(self._cache.specs_like(self._index, key), key.shape[0], key.dtype, key.device)
        new = key.shape[1]
        slots.reserve(max(0, self.num_updated + new - slots.num_columns))
        rows = Rows(slots._order, torch.full_like(slots.position, self.num_updated), new, self.num_updated)
        past = SlotPast(slots.layers[self._index], slots.specs[self._index], rows)
        items, _ = past.extend(key=key, value=value)
        self.num_updated += new
        self._cache.note_update()
        return items["key"].transpose(1, 2), items["value"].transpose(1, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and first column of what `update` returns."""
        seen = self.get_seq_length()
        past = seen if self.window is None else min(seen, self.window - 1)
        return past + query_length, seen - past

    def get_seq_length(self) -> int:
        """Columns seen so far, padding included."""
        slots = self._cache.slots
        return max(self.num_updated, 0 if slots is None else slots.num_columns)

    def get_max_length(self) -> int:
        """The window: more is never held; -1: all is held, or a summary."""
        return -1 if self.window is None else self.window


class SlotCache(Cache):
    """What every layer of a model keeps, each sequence at its own position; left padding is not kept.

    Tokens can be taken back (`crop`) once `activate_past_recording` was called, unless a layer keeps a summary.
    """

    layers: list[SlotCacheLayer]

    def __init__(self, config: SwatConfig, max_length: int | None = None) -> None:
        """An empty cache, at first no longer than `max_length` tokens; it grows, up to the windows, if more come."""
        entries = config.plan()
        layers = []
        for index, entry in enumerate(entries):
            keeps_keys = entry.layer_type != "linear_attention"
            # a window beside something else is that layer's own affair
            window = getattr(entry.settings, "sliding_window", None) if keeps_keys else None
            beside = entry.kind.keeps_beside_keys(entry.settings)
            layers.append(SlotCacheLayer(self, index, window, keeps_keys, beside))
        super().__init__(layers=layers)  # type: ignore[arg-type]
        self.max_length = max_length
        self.slots: Slots | None = None
        """Where everything is kept; made with the first tokens."""
        self._records = False
        self._read: Tensor | None = None
        """Bool `[B, columns]`, what was real of the columns when a summary took them in; None: of no column known."""
        self._fits: list[tuple[StateTensor, ...]] | None = None

    @property
    def max_cache_len(self) -> int:
        """Tokens that are held at most, where every layer has a window; else -1."""
        lengths = [layer.get_max_length() for layer in self.layers]
        return -1 if -1 in lengths else max(lengths)

    def prepare(
        self, specs: list[tuple[StateTensor, ...]], batch: int, dtype: torch.dtype, device: torch.device
    ) -> Slots:
        """The slots for B sequences, made on first use; raises ValueError where they are another model's."""
        if self.slots is None:
            self.slots = Slots(specs, batch, dtype, device, length=self.max_length)
            if self._records:
                self.slots.record()
        elif self._fits != specs:
            check_kept(self.slots.specs, specs, "past_key_values")
        self._fits = specs
        return self.slots

    def specs_like(self, index: int, key: Tensor) -> list[tuple[StateTensor, ...]]:
        """What layers keep where keys and values come from outside, like `[B, T, K, D]`."""
        shape = tuple(key.shape[2:])
        return [
            tuple(StateTensor(name, shape, "growing" if layer.window is None else "window", layer.window)
                  for name in ("key", "value"))
            for layer in self.layers
        ]  # fmt: skip

    def note_update(self) -> None:
        """Count what came by `update` once every layer has it."""
        assert self.slots is not None
        seen = min(layer.num_updated for layer in self.layers)
        if seen > self.slots.num_columns:
            self.slots.position += seen - self.slots.num_columns
            self.slots.count(seen - self.slots.num_columns)

    def begin(self, chunk: Chunk, num_tokens: int, attention_mask: Tensor | None) -> Rows:
        """The rows of a chunk that the model is about to process; what padding there is moves tokens, not positions."""
        slots = self.slots
        assert slots is not None
        if any(layer.beside is not None for layer in self.layers):
            self._check_read(num_tokens, attention_mask, chunk)
        begin = None
        if attention_mask is not None and chunk.first is not None:
            # only what stands before a row's first real token is not kept
            begun = (attention_mask != 0).cumsum(dim=1) > 0
            padding = (~begun[:, -num_tokens:]).sum(dim=1)
            # a graph that is compiled cannot look
            if torch.compiler.is_compiling() or bool(padding.any()):
                begin, slots.ragged = padding, True
        rows = slots.rows(num_tokens, begin=begin)
        if slots.ragged:
            # columns of the mask become places in the slots: padding is not kept there
            first = (0 if begin is None else begin) - rows.position
            chunk.first = first.clamp(min=FARTHEST).to(torch.int32)[:, None].expand(-1, num_tokens).contiguous()
        return rows

    def _check_read(self, num_tokens: int, attention_mask: Tensor | None, chunk: Chunk) -> None:
        """Raise ValueError for a mask that hides what a summary has taken in already; remember what this one hides."""
        assert self.slots is not None
        if num_tokens == 1 and chunk.hidden is None and chunk.first is None:
            # a decoded token is real, and costs no look
            return
        before = self.slots.num_columns
        shape = self.slots.num_slots, before + num_tokens
        real = torch.ones(shape, dtype=torch.bool, device=self.slots.position.device)
        if attention_mask is not None:
            real = attention_mask != 0
        if self._read is not None:
            read = torch.nn.functional.pad(self._read, (0, before - self._read.shape[1]), value=True)
            hidden = (read & ~real[:, :before]).any(dim=1)
            if not torch.compiler.is_compiling() and bool(hidden.any()):
                raise ValueError(
                    f"attention_mask: row {int(hidden.nonzero()[0])} hides tokens that were read, and layers here keep "
                    "a summary of what they read, from which nothing can be taken out; read the whole rows anew, "
                    "without past_key_values"
                )
        self._read = real

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen so far, padding included."""
        return self.layers[layer_idx].get_seq_length()

    def activate_past_recording(self) -> None:
        """From now on keep what taking tokens back needs. Raises ValueError where a layer keeps a summary."""
        for index, layer in enumerate(self.layers):
            if layer.beside is not None:
                raise ValueError(
                    f"layer {index} keeps {layer.beside} of its past, which cannot be taken back: "
                    "generate without drafts (assistant_model, prompt_lookup_num_tokens)"
                )
        self._records = True
        if self.slots is not None:
            self.slots.record()

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last `-tokens_to_remove` tokens back. Raises ValueError for more than was recorded."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop: expected minus the number of tokens to take back, got {tokens_to_remove}")
        if self.slots is not None:
            self.slots.crop(-tokens_to_remove)
            for layer in self.layers:
                layer.num_updated = min(layer.num_updated, self.slots.num_columns)

    def reset(self) -> None:
        """Forget everything, keep the memory."""
        self._read = None
        if self.slots is not None:
            self.slots.reset()
        for layer in self.layers:
            layer.num_updated = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence, for beams and several samples per prompt."""
        if self.slots is not None:
            self.batch_select_indices(torch.arange(self.slots.num_slots).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the chosen sequences, in this order."""
        if self.slots is not None:
            indices = indices.to(self.slots.position.device)
            self.slots.select(indices)
            self._read = None if self._read is None else self._read[indices]
