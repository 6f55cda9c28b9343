"""The pasts of layers: in slots, as a functional carry in training, in a cache of `transformers`.

To a layer all three are the same. Legend: N slots, B rows, T tokens of a chunk, P kept items before it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from swat_lm.layers.base import Layer, StateTensor
from swat_lm.layers.chunk import Chunk


@dataclass
class Rows:
    """Which slots a pass reads and writes, where they stand, and which columns of the chunk they keep."""

    slot: Tensor
    """int64 `[B]`."""
    position: Tensor
    """int64 `[B]`: items before the chunk."""
    num_tokens: int
    num_past: int
    """Items before the chunk in the row that has most of them, or more."""
    begin: Tensor | None = None
    """int64 `[B]`: the first column that is kept; None: 0."""
    end: Tensor | None = None
    """int64 `[B]`: one after the last column that is kept; None: T."""
    _made: dict[Any, Any] = field(default_factory=dict, repr=False)

    def counts(self) -> Tensor | int:
        """Columns that each row keeps, int64 `[B]`, or T."""
        if self.begin is None and self.end is None:
            return self.num_tokens
        return (self.num_tokens if self.end is None else self.end) - (0 if self.begin is None else self.begin)

    def past_places(self, places: int, count: int) -> tuple[Tensor, Tensor]:
        """Index of the last `count` items before the chunk, oldest first, into `[N, places]`."""
        key = ("past", places, count)
        if key not in self._made:
            back = torch.arange(-count, 0, device=self.position.device)
            self._made[key] = self.slot[:, None], (self.position[:, None] + back) % places
        return self._made[key]

    def new_places(self, places: int) -> tuple[tuple[Tensor, Tensor], Tensor | None, Tensor | None]:
        """Where the last columns are kept, index into `[N, places]`; these columns `[B, count]`, and which are real.

        The columns are None where they are the chunk's last, the mask where all of them are real.
        """
        key = ("new", places)
        if key not in self._made:
            self._made[key] = self._new_places(places)
        return self._made[key]

    def _new_places(self, places: int) -> tuple[tuple[Tensor, Tensor], Tensor | None, Tensor | None]:
        count = min(self.num_tokens, places)
        back = torch.arange(-count, 0, device=self.position.device)
        place = (self.position + self.counts())[:, None] + back
        column = real = None
        if self.end is not None:
            column = (self.end[:, None] + back).clamp(min=0)
        if self.begin is not None or self.end is not None:
            # older than the first that is kept: what stands there stays
            real = back >= -torch.as_tensor(self.counts(), device=back.device)[:, None]
        return (self.slot[:, None], place % places), column, real


class SlotPast:
    """One layer's past in slots, changed in place; inference only."""

    def __init__(self, kept: dict[str, Tensor], spec: Mapping[str, StateTensor], rows: Rows) -> None:
        """`kept` and `spec` by the names of the layer's state."""
        self.kept, self.spec, self.rows = kept, spec, rows
        self.slot, self.position = rows.slot, rows.position
        self.recorded: dict[str, Tensor] | None = None
        """While the chunk can be taken back: by name, all items before it and its own."""

    def extend(self, **new: Tensor) -> tuple[dict[str, Tensor], int]:
        """Kept items followed by the chunk's, `[B, P + T, *shape]`; then keep the last of them."""
        items, count = {}, 0
        for name, tensor in new.items():
            kept, spec = self.kept[name], self.spec[name]
            tensor = tensor.to(kept.dtype)
            most = self.rows.num_past
            count = most if spec.items is None else min(most, spec.items - 1)
            items[name] = tensor
            if count:
                items[name] = torch.cat((kept[self.rows.past_places(kept.shape[1], count)], tensor), dim=1)
            if self.recorded is not None:
                count_all = min(most, kept.shape[1])
                before = kept[self.rows.past_places(kept.shape[1], count_all)]
                self.recorded[name] = torch.cat((before, tensor.detach()), dim=1)
            self._write(kept, tensor.detach())
        return items, count

    def fold(self, name: str, decay: Tensor, value: Tensor) -> Tensor:
        """The summary from before the chunk; the slots then hold it decayed, and the value."""
        before = self.kept[name][self.slot]
        self.kept[name][self.slot] = (decay * before + value).detach().to(before.dtype)
        return before

    def merge(self, value: Mapping[str, Tensor], join: Callable[..., dict[str, Tensor]]) -> dict[str, Tensor]:
        """The summaries from before the chunk; the slots then hold them joined with the values."""
        before = {name: self.kept[name][self.slot] for name in value}
        for name, tensor in join(before, value).items():
            self.kept[name][self.slot] = tensor.detach().to(self.kept[name].dtype)
        return before

    def after(self) -> "SlotPast":
        """The same slots: they were changed in place."""
        return self

    def tensors(self) -> tuple[Tensor, ...]:
        """All that the layer keeps, of every slot."""
        return tuple(self.kept.values())

    def _write(self, kept: Tensor, new: Tensor) -> None:
        place, column, real = self.rows.new_places(kept.shape[1])
        count = place[1].shape[1]
        if column is None:
            new = new[:, new.shape[1] - count :]
        else:
            new = new[torch.arange(new.shape[0], device=new.device)[:, None], column]
        if real is not None:
            new = torch.where(real.view(*real.shape, *[1] * (new.dim() - 2)), new, kept[place])
        kept[place] = new


@dataclass
class Passed:
    """What a pass that may be taken back has changed: how many columns, and each layer's items before and with it."""

    num_tokens: int
    pasts: list[SlotPast]

    def select(self, slot: Tensor) -> None:
        """Follow the slots that are kept, int64 `[B]`."""
        for past in self.pasts:
            past.recorded = {name: items[slot] for name, items in (past.recorded or {}).items()}


class CarryPast:
    """One layer's past in training: functional, never changed in place; nothing is kept before the first chunk."""

    def __init__(self, spec: Mapping[str, StateTensor], kept: Mapping[str, Tensor] | None = None) -> None:
        self.spec, self.kept = spec, dict(kept or {})
        self._next: dict[str, Tensor] = {}

    def extend(self, **new: Tensor) -> tuple[dict[str, Tensor], int]:
        """Kept items followed by the chunk's, `[B, P + T, *shape]`."""
        items, count = {}, 0
        for name, tensor in new.items():
            before = self.kept.get(name)
            items[name] = tensor if before is None else torch.cat((before, tensor), dim=1)
            count = 0 if before is None else before.shape[1]
            most = self.spec[name].items
            start = 0 if most is None else max(0, items[name].shape[1] - (most - 1))
            self._next[name] = items[name][:, start:]
        return items, count

    def fold(self, name: str, decay: Tensor, value: Tensor) -> Tensor:
        """The summary from before the chunk; the next chunk finds it decayed, and the value."""
        before = self._summary(name, value)
        self._next[name] = decay * before + value
        return before

    def merge(self, value: Mapping[str, Tensor], join: Callable[..., dict[str, Tensor]]) -> dict[str, Tensor]:
        """The summaries from before the chunk; the next chunk finds them joined with the values."""
        before = {name: self._summary(name, tensor) for name, tensor in value.items()}
        self._next |= join(before, value)
        return before

    def after(self) -> "CarryPast":
        """What the next chunk finds."""
        return CarryPast(self.spec, self._next)

    def tensors(self) -> tuple[Tensor, ...]:
        """What is kept."""
        return tuple(self.kept.values())

    def changed(self, change: Callable[[Tensor], Tensor]) -> "CarryPast":
        """The same past with every tensor changed."""
        return CarryPast(self.spec, {name: change(tensor) for name, tensor in self.kept.items()})

    def _summary(self, name: str, like: Tensor) -> Tensor:
        return self.kept[name] if name in self.kept else torch.full_like(like, self.spec[name].fill)


@dataclass(frozen=True)
class Carry:
    """What one chunk hands to the next in training.

    `exact` lets gradients flow to older chunks; `detached` cuts them.
    """

    mode: Literal["exact", "detached"]
    pasts: tuple[CarryPast, ...]
    num_tokens: int = 0
    """Tokens before the next chunk."""
    document: Tensor | None = None
    """int64 `[B]`: id of the document that the last token belongs to; None where no ids are given."""
    document_length: Tensor | None = None
    """int64 `[B]`: tokens of that document so far."""
    planned: Chunk | None = None
    """Where the tokens of the next chunk stand, where somebody has planned them already; given for every chunk."""

    def repeated(self, counts: Tensor) -> "Carry":
        """Each row so many times (int64 `[B]`), in order: several continuations go on from one beginning."""

        def rows(tensor: Tensor) -> Tensor:
            return tensor.repeat_interleave(counts, dim=0)

        document, length = (
            None if tensor is None else rows(tensor) for tensor in (self.document, self.document_length)
        )
        return Carry(self.mode, tuple(past.changed(rows) for past in self.pasts), self.num_tokens, document, length)

    def detached(self) -> "Carry":
        """The same numbers, cut from the graph (and copied, so that a long chunk does not live on in them)."""
        pasts = tuple(past.changed(lambda tensor: tensor.detach().clone()) for past in self.pasts)
        return Carry(self.mode, pasts, self.num_tokens, self.document, self.document_length)


class CachePast:
    """One attention layer's past in any cache of `transformers`."""

    def __init__(self, cache: Cache, layer_index: int, num_columns: int) -> None:
        """`num_columns` is what the cache has seen before the chunk."""
        self._cache, self._layer_index, self._before = cache, layer_index, num_columns

    def extend(self, **new: Tensor) -> tuple[dict[str, Tensor], int]:
        """Update the cache with `key` and `value`; it answers with what its layer still holds, chunk included."""
        key, value = new["key"], new["value"]
        num_tokens = key.shape[1]
        num_columns, first_column = self._cache.get_mask_sizes(num_tokens, self._layer_index)
        keys, values = self._cache.update(key.transpose(1, 2), value.transpose(1, 2), self._layer_index)
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        # a sliding layer of window 1 announces no past but returns all of it; what came back decides
        count = self._before - first_column if keys.shape[1] == num_columns else keys.shape[1] - num_tokens
        # in a cache of fixed size, places after the newest key are not filled yet
        return {"key": keys[:, : count + num_tokens], "value": values[:, : count + num_tokens]}, count

    def fold(self, name: str, decay: Tensor, value: Tensor) -> Tensor:
        """Refused: these caches hold keys and values."""
        raise _keys_and_values_alone(name)

    def merge(self, value: Mapping[str, Tensor], join: Callable[..., dict[str, Tensor]]) -> dict[str, Tensor]:
        """Refused: these caches hold keys and values."""
        raise _keys_and_values_alone(", ".join(value))

    def after(self) -> "CachePast":
        """The same cache: it was changed in place."""
        return self

    def tensors(self) -> tuple[Tensor, ...]:
        """Keys and values, `[B, K, P, D]`."""
        layer = self._cache.layers[self._layer_index]
        held = (getattr(layer, name, None) for name in ("keys", "values"))
        return tuple(tensor for tensor in held if tensor is not None)


STOCK = ("key", "value")
"""What caches of transformers have places for."""


def check_foreign(layers: Iterable[Layer]) -> None:
    """Raise ValueError, naming what it keeps, where a layer keeps more than a cache of `transformers` holds."""
    for layer in layers:
        names = [entry.name for entry in layer.state_spec() if entry.kind == "summary" or entry.name not in STOCK]
        if names:
            raise _keys_and_values_alone(", ".join(names))


def _keys_and_values_alone(names: str) -> ValueError:
    return ValueError(
        "past_key_values: a cache of transformers keeps keys and values of attention only, a layer here keeps "
        f"{'first tokens (sinks)' if 'sink_key' in names else names}; leave past_key_values and cache_implementation "
        "out, or give swat_lm.model.cache.SlotCache(config)"
    )
