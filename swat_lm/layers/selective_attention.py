"""Windowed attention for chosen queries over the keys and values of all tokens, with the gate that chooses them.

Taipan, arXiv 2410.18572, section 3; the layer around it is in taipan.py.
Legend: B rows, T tokens, N chosen tokens, P kept tokens, M width, H query heads, K key/value heads, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swat_lm.layers.base import NOTHING, Auxiliary, InPlace, Part, Past, lay_out
from swat_lm.layers.chunk import FARTHEST, Chunk
from swat_lm.layers.taipan_settings import TaipanSettings
from swat_lm.layers.window_attention import WindowAttention
from swat_lm.ops.flops import attention_flops
from swat_lm.ops.noise import logistic, uniform
from swat_lm.ops.ring import write

# so that a layer's choice by chance and its noise are two things
CHANCE = 1


class Gate(nn.Module):
    """Two logits for every token: to pass as it is, and to look back."""

    def __init__(self, width: int, num_layers: int) -> None:
        super().__init__()
        inner = width // 4
        self.in_proj = nn.Linear(width, inner) if num_layers == 2 else None
        self.out_proj = nn.Linear(inner if num_layers == 2 else width, 2)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `[B, T, M]` to `[B, T, 2]`, in float32 at least."""
        if self.in_proj is not None:
            hidden = F.silu(self.in_proj(hidden))
        logits = self.out_proj(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


class Choice(NamedTuple):
    """Which tokens look back."""

    chosen: Tensor
    """bool `[B, T]`."""
    through: Tensor
    """`[B, T]`: the same as numbers, with the gradient of the probability (straight-through)."""
    share: Tensor
    """`[B, T]`: what attention gets of a chosen token, without noise (alpha)."""
    open: Tensor
    """bool `[B, T]`: what would be chosen without noise."""


@dataclass(frozen=True)
class SomeRows:
    """Some of the rows of a decoding step."""

    kept: dict[str, Tensor]
    slot: Tensor
    position: Tensor


class SelectiveAttention(WindowAttention):
    """What moves information between positions in a Taipan layer."""

    def __init__(self, settings: TaipanSettings, width: int, index: int, norm_eps: float) -> None:
        super().__init__(settings.attention(), width, None, index, norm_eps)
        self.taipan = settings
        self.gate = Gate(width, settings.gate_layers)

    def choose(self, logits: Tensor, chunk: Chunk) -> Choice:
        """Decide by the gate's logits `[B, T, 2]`; in training with noise, which is a function of the chunk's seed.

        The difference of two Gumbel numbers is one logistic number, so that is what is drawn.
        """
        margin = logits[..., 1] - logits[..., 0]
        share, opens = margin.sigmoid(), margin > 0
        selection, seed = self.taipan.selection, chunk.seed
        if selection == "all":
            chosen = torch.ones_like(opens)
            return Choice(chosen, chosen.to(share.dtype), share, opens)
        if selection == "random":
            # without a training step to draw for, always the same
            words = (0 if seed is None else seed[:, None], self.index, CHANCE, chunk.positions)
            chosen = (uniform(*words) < self.taipan.capacity).expand(opens.shape)
            return Choice(chosen, chosen.to(share.dtype), share, opens)
        noisy = margin
        if seed is not None:
            noisy = margin + logistic(seed[:, None], self.index, chunk.positions).to(margin.dtype)
        chosen = noisy > 0
        probability = (noisy / self.taipan.temperature).sigmoid()
        through = chosen.to(share.dtype) + (probability - probability.detach())
        return Choice(chosen, through, share, opens)

    def forward(  # type: ignore[override]
        self, hidden: Tensor, chunk: Chunk, past: Past | None = None
    ) -> tuple[Tensor, Tensor, Auxiliary]:
        """Mix a normed chunk `[B, T, M]`; keys and values of all its tokens extend the past, if any.

        Returns what attention adds `[B, T, M]`, by which share `[B, T, 1]` (0 for tokens that pass as they are), and
        the budget's loss with the numbers of the gate.
        """
        logits, key, value = self._always(hidden)
        mixed, share, choice = self._mix(hidden, logits, key, value, chunk, past)
        return mixed, share, self._say(choice, chunk)

    def forward_parts(self, hidden: Tensor, parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
        """Mix parts of a normed row `[1, T, M]`: what every token needs for all at once; no budget."""
        logits, key, value = self._always(hidden)
        found = []
        for part in parts:
            own = (each[:, part.tokens] for each in (hidden, logits, key, value))
            found.append(self._mix(*own, chunk=part.chunk, past=part.past))
        mixed, share = (lay_out(parts, [one[place] for one in found], hidden.shape[1]) for place in (0, 1))
        return mixed, share

    def _always(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is computed of every token: the gate's logits `[B, T, 2]`, key and value `[B, T, K, D]`."""
        heads = *hidden.shape[:2], self.num_kv_heads, self.settings.head_dim
        return self.gate(hidden), self.k_proj(hidden).view(heads), self.v_proj(hidden).view(heads)

    def _mix(
        self, hidden: Tensor, logits: Tensor, key: Tensor, value: Tensor, chunk: Chunk, past: Past | None
    ) -> tuple[Tensor, Tensor, Choice]:
        """What attention adds, by which share, and the choice behind it."""
        choice = self.choose(logits, chunk)
        share = (choice.through * choice.share).to(hidden.dtype)[..., None]
        num_past = 0
        if past is not None:
            items, num_past = past.extend(key=key, value=value)
            key, value = items["key"], items["value"]
        if self.taipan.execution == "sparse":
            return *self._attend_chosen(hidden, key, value, choice.chosen, share, chunk, num_past), choice
        query = self.q_proj(hidden).view(*hidden.shape[:2], self.num_heads, self.settings.head_dim)
        mixed = self.o_proj(self.heads_output(self.attend(query, key, value, chunk, num_past)))
        return mixed * share, share, choice

    def _attend_chosen(
        self, hidden: Tensor, key: Tensor, value: Tensor, chosen: Tensor, share: Tensor, chunk: Chunk, num_past: int
    ) -> tuple[Tensor, Tensor]:
        """Attention times share `[B, T, M]`, and the share, computed for chosen tokens alone; zeros for the others."""
        batch, num_tokens, _ = hidden.shape
        if chunk.real is not None:
            chosen = chosen & chunk.real
        row, place = chosen.nonzero(as_tuple=True)
        counts = chosen.sum(dim=1)
        # one place at least, so that every projection has a gradient, of zeros, where nothing is chosen
        most = max(1, int(counts.max()))
        own = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
        query = self.q_proj(hidden[row, place]).view(-1, self.num_heads, self.settings.head_dim)
        gathered = query.new_zeros(batch, most, *query.shape[1:]).index_put((row, own), query)
        # places that are left over see nothing
        first, last = (
            torch.full((batch, most), end, dtype=torch.int32, device=row.device) for end in (num_tokens, num_tokens - 1)
        )
        last[row, own] = place.to(torch.int32)
        first[row, own] = FARTHEST if chunk.first is None else chunk.first[row, place]
        blind = chunk.hidden
        if blind is None and chunk.past_hidden is not None:
            blind = chunk.past_hidden.new_zeros(batch, num_tokens)
        rows = Chunk(chunk.positions, first, last, blind, chunk.past_hidden, chunk.windows)
        found = self.heads_output(self.attend(gathered, key, value, rows, num_past))[row, own]
        part = share[row, place]
        mixed = self.o_proj(found) * part
        return (
            mixed.new_zeros(hidden.shape).index_put((row, place), mixed),
            part.new_zeros(share.shape).index_put((row, place), part),
        )

    def _say(self, choice: Choice, chunk: Chunk) -> Auxiliary:
        """The budget's loss, `(capacity - mean over a row's tokens)^2` summed over rows, and the gate's numbers."""
        real = torch.ones_like(choice.chosen) if chunk.real is None else chunk.real.expand(choice.chosen.shape)
        if self.taipan.selection != "gate":
            return NOTHING
        counted = real.to(choice.through.dtype)
        sizes = counted.sum(dim=1)
        rows = (sizes > 0).to(counted.dtype)
        taken = (choice.through * counted).sum(dim=1) / sizes.clamp(min=1)
        loss = self.taipan.budget_weight * (rows * (self.taipan.capacity - taken).square()).sum()
        total = sizes.sum().clamp(min=1)
        selected, opens = (
            (which.detach().to(counted.dtype) * counted).sum() / total for which in (choice.chosen, choice.open)
        )
        metrics = {
            "selected": selected,
            "selected_without_noise": opens,
            f"selected_{self.index}": selected,
            f"selected_without_noise_{self.index}": opens,
        }
        return Auxiliary({"budget": (loss, rows.sum())}, metrics=metrics)

    def step_share(self, hidden: Tensor, chunk: Chunk, past: InPlace) -> tuple[Tensor, Tensor]:
        """Mix one normed token per row, `[B, 1, M]`, in place over rings; what attention adds, and by which share.

        Keys and values are kept of all rows; queries, attention and outputs are computed where the gate opens.
        """
        logits, key, value = self._always(hidden)
        choice, batch = self.choose(logits, chunk), len(hidden)
        share = (choice.chosen * choice.share).to(hidden.dtype)[..., None]
        if hidden.is_cuda or torch.compiler.is_compiling():
            # which rows are open is not known without waiting for the device, nor in a graph
            return self._step_rows(hidden, key, value, past, chunk.batch_invariant) * share, share
        chosen = choice.chosen[:, 0].tolist()
        if all(chosen) and not chunk.batch_invariant:
            return self._step_rows(hidden, key, value, past) * share, share
        opened, closed = (
            torch.tensor([row for row in range(batch) if chosen[row] is which], dtype=torch.long)
            for which in (True, False)
        )
        ring = past.kept["key"]
        if len(closed):
            kept = key[closed].to(ring.dtype), value[closed].to(ring.dtype)
            write(*kept, ring, past.kept["value"], past.slot[closed], past.position[closed])
        mixed = torch.zeros_like(hidden)
        # row by row where a row must not depend on how many others are open
        for rows in opened.split(1 if chunk.batch_invariant else max(1, len(opened))):
            if len(rows):
                some = cast(InPlace, SomeRows(dict(past.kept), past.slot[rows], past.position[rows]))
                found = self._step_rows(hidden[rows], key[rows], value[rows], some, chunk.batch_invariant)
                mixed[rows] = found * share[rows]
        return mixed, share

    def _step_rows(
        self, hidden: Tensor, key: Tensor, value: Tensor, past: InPlace, batch_invariant: bool = False
    ) -> Tensor:
        """What attention gives to one token per row, `[B, 1, M]`."""
        query = self.q_proj(hidden).view(len(hidden), 1, self.num_heads, self.settings.head_dim)
        return self.o_proj(self.attend_step(query, key, value, past, None, None, batch_invariant))

    def flops(self, num_tokens: int, num_past: int = 0) -> int:
        """Gate, keys and values of all tokens; queries, attention and outputs of all, or of the capacity's share."""
        gate = sum(module.weight.numel() for module in self.gate.children() if isinstance(module, nn.Linear))
        settings, dense = self.settings, self.taipan.execution == "dense"
        pairs = attention_flops(
            settings.num_attention_heads, settings.head_dim, num_tokens, settings.sliding_window, num_past
        )
        # the projections of queries and outputs are alike
        chosen = 4 * num_tokens * self.q_proj.weight.numel() + pairs
        always = 2 * num_tokens * (gate + 2 * self.k_proj.weight.numel())
        return always + (chosen if dense else round(self.taipan.capacity * chosen))
