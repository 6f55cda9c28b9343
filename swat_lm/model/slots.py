"""Slots: what the layers keep of many sequences, side by side at constant addresses, each at its own position.

A stream's state, a server's pool and the cache of `generate()` are all this. Constant in size where no layer keeps
everything. Legend: N slots, B rows of a call, T tokens of a chunk, P kept items before it.
"""

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import ReferenceType

import torch
from torch import Tensor

from swat_lm.layers.base import StateTensor, by_name
from swat_lm.model.kept import check_kept
from swat_lm.model.pasts import Passed, Rows, SlotPast
from swat_lm.ops.ring import empty_ring, like_ring

FIRST_CAPACITY = 64
NO_BOUND = 2**62


class Slots:
    """N slots for the layers of one model, by what each layer says it keeps."""

    def __init__(
        self,
        specs: Sequence[tuple[StateTensor, ...]],
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device | str,
        capacity: int | None = None,
        length: int | None = None,
    ) -> None:
        """Empty slots.

        Args:
            specs: per layer, `Layer.state_spec()`.
            capacity: items that a growing tensor may hold; more are refused. None: it doubles when it is full.
            length: places that windows have at first, where they are to hold fewer items than the window; None: all.
        """
        if num_slots < 1:
            raise ValueError(f"num_slots: expected at least 1, got {num_slots}")
        self.specs = [by_name(spec) for spec in specs]
        self.capacity, self.length = capacity, length
        self.dtype = dtype
        like = torch.empty(0, device=device)
        # never inference tensors, so that slots made under inference_mode can be used outside it
        with torch.inference_mode(False):
            self.layers = [
                {name: self._empty(num_slots, entry, self._places(entry), like) for name, entry in spec.items()}
                for spec in self.specs
            ]
            self.position = torch.zeros(num_slots, dtype=torch.int64, device=device)
            """int64 `[N]`: items of each slot, hidden ones included, padding not."""
            self.skipped = torch.zeros(num_slots, dtype=torch.int64, device=device)
            """int64 `[N]`: how many of these are hidden."""
            self._order = torch.arange(num_slots, device=device)
        self.num_columns = 0
        """Columns of all chunks since the slots were empty; of padding too."""
        self.fullest = 0
        """Items in the fullest slot, or more: known without asking the device."""
        self.ragged = False
        """Whether slots may stand apart."""
        self.has_holes = False
        """Whether any kept item may be hidden."""
        self.logits: Tensor | None = None
        """`[N, V]` after the last token, where whoever stopped put them; gone as soon as the slots read another."""
        self.fits: ReferenceType[Any] | None = None
        """The model whose layers were found to keep just this."""
        self.fingerprint: str | None = None
        """Of the model that made slots read from a file (swat_lm/model/fingerprint.py); None: not known."""
        self._holes: dict[str, Tensor] = {}
        self._step: list[SlotPast] = []
        self._room = 0
        self.passed: list[Passed] | None = None
        """While passes can be taken back: those since the last `crop`."""

    @property
    def num_slots(self) -> int:
        """N."""
        return self.position.shape[0]

    batch_size = num_slots  # a batch of streams fills all slots in order

    @property
    def num_bytes(self) -> int:
        """Bytes held for all slots: what layers keep and positions, which is all that reading on needs."""
        tensors = [tensor for layer in self.layers for tensor in layer.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in (*tensors, self.position))

    @property
    def grows(self) -> bool:
        """Whether any layer keeps everything, so that the state grows with the stream (in blocks)."""
        return any(entry.kind == "growing" for _, entry in self._by_entry())

    def common_position(self) -> int | None:
        """Where all slots stand, or None where they stand apart; asks the device."""
        positions = set(self.position.tolist())
        return positions.pop() if len(positions) == 1 else None

    def rows(
        self, num_tokens: int, slot: Tensor | None = None, begin: Tensor | None = None, end: Tensor | None = None
    ) -> Rows:
        """What a chunk of T columns reads and writes; makes room for it.

        Raises:
            ValueError: more items than the slots may hold; nothing is changed then.
        """
        position = self.position.clone() if slot is None else self.position[slot]
        rows = Rows(self._order if slot is None else slot, position, num_tokens, 0, begin, end)
        self._make_room(self.fullest + num_tokens, rows)
        rows.num_past = self.fullest
        return rows

    def pasts(self, rows: Rows) -> list[SlotPast]:
        """The layers' pasts for one chunk."""
        made = [SlotPast(kept, spec, rows) for kept, spec in zip(self.layers, self.specs, strict=True)]
        if self.passed is not None:
            for past in made:
                past.recorded = {}
            self.passed.append(Passed(rows.num_tokens, made))
        return made

    def step_pasts(self) -> list[SlotPast]:
        """The layers' pasts for one more token of every slot, made once; they follow `position`."""
        self.reserve(1)
        if not self._step:
            rows = Rows(self._order, self.position, 1, 0)
            self._step = [SlotPast(kept, spec, rows) for kept, spec in zip(self.layers, self.specs, strict=True)]
        return self._step

    def advance(self, rows: Rows, num_hidden: Tensor | None = None) -> None:
        """Count a chunk that went through all layers; `num_hidden [B]` of each row's items are hidden."""
        given = rows.counts()
        counts = given.to(self.position.device) if isinstance(given, Tensor) else torch.full_like(rows.slot, given)
        self.position.index_add_(0, rows.slot, counts)
        if num_hidden is not None:
            self.skipped.index_add_(0, rows.slot, num_hidden)
        self.count(rows.num_tokens)

    def count(self, num_tokens: int) -> None:
        """Note that a chunk of T columns went through, whose positions are counted already."""
        self.num_columns += num_tokens
        self.fullest += num_tokens

    def remember_holes(self, rows: Rows, hidden: Tensor | None) -> Tensor | None:
        """Keep which of the chunk's items `[B, T]` are hidden; returns that of the last P items before it."""
        if hidden is None and not self.has_holes:
            return None
        spec = self._hold_holes()
        self._enlarge(spec, self._holes, self.fullest + rows.num_tokens)
        if hidden is None:
            hidden = torch.zeros(len(rows.slot), rows.num_tokens, dtype=torch.bool, device=self.position.device)
        items, count = SlotPast(self._holes, spec, rows).extend(hidden=hidden)
        return items["hidden"][:, :count]

    def _hold_holes(self) -> dict[str, StateTensor]:
        """From now on keep which items are hidden, as long as any layer keeps items."""
        items = [entry.items for spec in self.specs for entry in spec.values() if entry.kind != "summary"]
        most = None if None in items else max((count for count in items if count is not None), default=1)
        spec = StateTensor("hidden", (), "growing" if most is None else "window", most, torch.bool)
        if not self._holes:
            self._holes = {"hidden": self._empty(self.num_slots, spec, self._places(spec), self.position)}
        self.has_holes = True
        return {"hidden": spec}

    def reset(self, slot: Tensor | None = None) -> None:
        """Empty slots, all of them by default, for other sequences."""
        at: Any = slice(None) if slot is None else slot
        for spec, kept in zip(self.specs, self.layers, strict=True):
            for name, tensor in kept.items():
                tensor[at] = spec[name].fill
        self.position[at] = 0
        self.skipped[at] = 0
        if self._holes:
            self._holes["hidden"][at] = False
        self.logits = None
        if slot is None:
            self.num_columns, self.fullest, self.ragged, self.has_holes = 0, 0, False, False
        else:
            self.ragged = True

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Let slots `target` int64 `[B]` hold what `source` hold: forks, beams, several samples of a prompt."""
        for tensor in self._all():
            tensor[target] = tensor[source]
        self.logits = None

    def select(self, slot: Tensor) -> None:
        """Keep the chosen slots, in this order and as often as they are named: beams and their like."""
        for kept in (*self.layers, self._holes):
            for name, tensor in kept.items():
                # in the layout of the old one: the fast step asks for it
                chosen = tensor.index_select(0, slot)
                kept[name] = chosen if chosen.stride()[1:] == tensor.stride()[1:] else like_ring(chosen)
        self.position, self.skipped = self.position[slot], self.skipped[slot]
        for done in self.passed or ():
            done.select(slot)
        self._order = torch.arange(len(slot), device=self.position.device)
        self._step, self.logits = [], None

    def snapshot(self, slot: Tensor) -> dict[str, Tensor]:
        """Copies of all that slots `[B]` hold, by name; `restore` puts them back, here or into other slots."""
        found = {"position": self.position[slot], "skipped": self.skipped[slot]}
        for index, kept in enumerate(self.layers):
            found |= {f"layers.{index}.{name}": tensor[slot] for name, tensor in kept.items()}
        return found | ({"hidden": self._holes["hidden"][slot]} if self._holes else {})

    def restore(self, slot: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """Put a snapshot of as many slots back, of these slots or of others of the same model.

        Raises:
            ValueError: a snapshot of another model, or more items than the slots may hold; nothing is changed then.
        """
        self.check_tensors(tensors)
        used = int(tensors["position"].max()) if tensors["position"].numel() else 0
        # items of growing tensors lie at their own places, and so do those of windows that have not wrapped
        self._make_room(max(self.fullest, used), used=used)
        self.num_columns, self.fullest = max(self.num_columns, used), max(self.fullest, used)
        self.ragged, self.logits = True, None
        self.position[slot] = tensors["position"].to(self.position.device)
        self.skipped[slot] = tensors["skipped"].to(self.position.device)
        for index, kept in enumerate(self.layers):
            for name, tensor in kept.items():
                put(tensor, slot, tensors[f"layers.{index}.{name}"])
        self._restore_holes(slot, tensors.get("hidden"))

    def _restore_holes(self, slot: Tensor, hidden: Tensor | None) -> None:
        if hidden is None and not self._holes:
            return
        spec = self._hold_holes()
        if hidden is None:
            self._holes["hidden"][slot] = False
        else:
            self._enlarge(spec, self._holes, hidden.shape[1])
            put(self._holes["hidden"], slot, hidden)

    def check_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise ValueError unless these are the tensors of a snapshot of slots like these."""
        wanted = {f"layers.{i}.{name}": entry for i, spec in enumerate(self.specs) for name, entry in spec.items()}
        held = {name for name in tensors if name.startswith("layers.")}
        if held != wanted.keys():
            odd = sorted(held ^ wanted.keys())[0]
            problem = "missing" if odd in wanted else "unknown"
            raise ValueError(f"state: {odd} is {problem}; it belongs to another model")
        for name, spec in wanted.items():
            shape = tuple(tensors[name].shape[1:])
            shape = shape if spec.kind == "summary" else shape[1:]
            if shape != spec.shape:
                raise ValueError(f"state: {name} holds {list(shape)}, expected {list(spec.shape)}; of another model")

    def check_specs(self, specs: Sequence[tuple[StateTensor, ...]]) -> None:
        """Raise ValueError, naming the layer, unless layers that keep `specs` can go on from these slots."""
        check_kept(self.specs, specs, "state")

    def crop(self, count: int) -> None:
        """Take the last `count` columns back: of recorded passes (see `record`) any, else what still lies there.

        Raises ValueError, and changes nothing, for more than that, or where a layer's past is a summary.
        """
        if count == 0:
            return
        self._refuse_summaries()
        held = self._untouched() if self.passed is None else sum(done.num_tokens for done in self.passed)
        if count > held:
            advice = "activate_past_recording() on the cache, before tokens come, keeps what more need"
            raise ValueError(f"crop: only the last {held} tokens can be taken back, got {count}; {advice}")
        if self.passed is None:
            self.position.sub_(count).clamp_(min=0)
        else:
            self._undo(count, self.passed)
            self.passed = []
        self.logits = None
        self.num_columns -= count
        self.fullest -= count

    def _untouched(self) -> int:
        """Columns that can be taken back though nothing was recorded: until windows go round, places are positions."""
        windows = [(tensor.shape[1], entry.items) for tensor, entry in self._by_entry() if entry.items]
        # then they hold a few items more than the next token sees, or none
        spare = [places - items + 1 for places, items in windows if items and self.fullest > places]
        return min([self.num_columns, *spare])

    def _undo(self, count: int, passed: list[Passed]) -> None:
        left = count
        while left > 0:
            last = passed.pop()
            self.position -= last.num_tokens
            stay = max(0, last.num_tokens - left)
            for past in last.pasts:
                for name, items in (past.recorded or {}).items():
                    num_past = items.shape[1] - last.num_tokens
                    self._put_back(past.kept[name], items[:, : num_past + stay], stay)
            self.position += stay
            left -= last.num_tokens

    def record(self) -> None:
        """From now on keep what `crop` needs to take passes back. Raises ValueError for summaries."""
        self._refuse_summaries()
        self.passed = self.passed or []

    def _put_back(self, kept: Tensor, items: Tensor, stay: int) -> None:
        count = min(items.shape[1], kept.shape[1])
        rows = Rows(self._order, self.position - (count - stay), count, 0)
        place, _, _ = rows.new_places(kept.shape[1])
        kept[place] = items[:, items.shape[1] - count :]

    def _refuse_summaries(self) -> None:
        for index, spec in enumerate(self.specs):
            for name in (name for name, entry in spec.items() if entry.kind == "summary"):
                raise ValueError(
                    f"layer {index} keeps {name}, a summary of its past, which cannot be taken back: "
                    "use generation without drafts"
                )

    def reserve(self, num_tokens: int) -> None:
        """Make room for T more columns. Raises ValueError where growing tensors would pass their bound."""
        self._make_room(self.fullest + num_tokens)

    def _make_room(self, needed: int, rows: Rows | None = None, used: int = 0) -> None:
        """For `needed` items in the fullest slot, or for fewer where these rows or `used` items need no more."""
        if needed <= self._room:
            return
        if self.grows and needed > self._growing_places():
            # so much would be needed if all chunks had gone to one slot: time to look
            added, self.fullest = needed - self.fullest, int(self.position.max())
            needed = max(self.fullest, used)
            if rows is not None:
                needed = max(needed, int((rows.position + rows.counts()).max()))
            elif not used:
                needed += added
        if self.capacity is not None and needed > self.capacity and self.grows:
            raise ValueError(
                f"slots: {needed} tokens do not fit, a layer that keeps everything may hold {self.capacity} here; "
                "raise the capacity, or end the sequence"
            )
        changed = [self._enlarge(spec, kept, needed) for spec, kept in zip(self.specs, self.layers, strict=True)]
        if any(changed):
            self._step = []
        places = [(tensor.shape[1], entry.items) for tensor, entry in self._by_entry() if entry.kind != "summary"]
        self._room = min((have for have, most in places if most is None or have < most), default=NO_BOUND)

    def _growing_places(self) -> int:
        """Items that every growing tensor has room for now."""
        return min(tensor.shape[1] for tensor, entry in self._by_entry() if entry.kind == "growing")

    def _enlarge(self, spec: Mapping[str, StateTensor], kept: dict[str, Tensor], needed: int) -> bool:
        """More places, where items have not wrapped: places are positions then, so copying is enough."""
        changed = False
        for name, entry in spec.items():
            tensor = kept[name]
            wanted = needed if entry.items is None else min(needed, entry.items)
            if entry.kind == "summary" or tensor.shape[1] >= wanted:
                continue
            places = tensor.shape[1] if entry.items is None else entry.items
            while entry.items is None and places < needed:
                places *= 2
            if self.capacity is not None and entry.items is None:
                # rows that are padded on the right are shorter than they look
                places = max(tensor.shape[1], min(places, self.capacity))
            if places == tensor.shape[1]:
                continue
            kept[name] = self._empty(tensor.shape[0], entry, places, tensor)
            kept[name][:, : tensor.shape[1]] = tensor
            changed = True
        return changed

    def _places(self, entry: StateTensor) -> int:
        if entry.items is None:
            return self.capacity or max(FIRST_CAPACITY, self.length or 0)
        return entry.items if self.length is None else min(entry.items, max(self.length, 1))

    def _empty(self, num_slots: int, entry: StateTensor, places: int, like: Tensor) -> Tensor:
        like = torch.empty(0, dtype=entry.dtype_in(self.dtype), device=like.device)
        if entry.kind == "summary":
            tensor = like.new_zeros(num_slots, *entry.shape)
        elif len(entry.shape) == 2:
            tensor = empty_ring(num_slots, places, *entry.shape, like)
        else:
            tensor = like.new_zeros(num_slots, places, *entry.shape)
        return tensor.fill_(entry.fill) if entry.fill else tensor

    def _by_entry(self) -> list[tuple[Tensor, StateTensor]]:
        layers = zip(self.specs, self.layers, strict=True)
        return [(kept[name], entry) for spec, kept in layers for name, entry in spec.items()]

    def _all(self) -> list[Tensor]:
        kept = [tensor for layer in (*self.layers, self._holes) for tensor in layer.values()]
        return [*kept, self.position, self.skipped]


def put(tensor: Tensor, slot: Tensor, given: Tensor) -> None:
    """Copy into slots; of tensors with more or fewer places the first ones, which hold all there is."""
    given = given.to(tensor.device, tensor.dtype)
    if tensor.shape[1:] == given.shape[1:]:
        tensor[slot] = given
        return
    places = min(tensor.shape[1], given.shape[1])
    tensor[slot, :places] = given[:, :places]
