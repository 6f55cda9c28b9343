"""The kind `sparsek`: attention to a window and to the keys with the largest scores before it (arXiv 2406.16747).

A score per key/value head, which no query has a say in, decides which keys stay when they leave the window; a soft mask
gives the scores a gradient. What is kept is bounded: the window, M scores, and k keys and values.
Legend: B rows, T tokens, P kept tokens, M width, W window, H query heads, K key/value heads, D head size, k selected.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from swat_lm.layers.attention import HeadsLayer, own_rotary
from swat_lm.layers.base import NOTHING, Auxiliary, InPlace, Output, Part, Past, Shared, StateTensor, lay_out
from swat_lm.layers.chunk import FARTHEST, Chunk, Rotary
from swat_lm.layers.pre_norm import Mixer, start_normal
from swat_lm.layers.precise import PreciseLinear
from swat_lm.layers.sparsek_settings import SparsekSettings
from swat_lm.ops import selected_attention as dense
from swat_lm.ops.capped_simplex import NONE
from swat_lm.ops.flops import selected_flops
from swat_lm.ops.noise import uniform
from swat_lm.ops.rotary import apply_rotary
from swat_lm.ops.selected import BLOCK, selected_attention

Tensors = dict[str, Tensor]


class SparsekAttention(Mixer):
    """Projections and scores around `swat_lm.ops.selected`, which selects and attends."""

    def __init__(self, settings: SparsekSettings, width: int, index: int, rotary: Rotary | None) -> None:
        super().__init__()
        self.settings, self.index, self.rotary = settings, index, rotary
        self.scale = settings.head_dim**-0.5
        queries, keys = (
            heads * settings.head_dim for heads in (settings.num_attention_heads, settings.num_key_value_heads)
        )
        self.q_proj = nn.Linear(width, queries, bias=False)
        self.k_proj = nn.Linear(width, keys, bias=False)
        self.v_proj = nn.Linear(width, keys, bias=False)
        self.o_proj = nn.Linear(queries, width, bias=False)
        learns = settings.k > 0 and settings.selection == "learned"
        self.score_proj = PreciseLinear(width, settings.num_key_value_heads, bias=False) if learns else None

    def state_spec(self) -> tuple[StateTensor, ...]:
        """Rotated keys, values and scores of the window and of the token that leaves it; what is selected before it."""
        settings = self.settings
        heads, places = settings.num_key_value_heads, settings.window + 1
        item = heads, settings.head_dim
        spec = StateTensor("near_key", item, "window", places), StateTensor("near_value", item, "window", places)
        if not settings.k:
            return spec
        kept = heads, settings.k, settings.head_dim
        return (
            *spec,
            StateTensor("near_score", (heads,), "window", places, torch.float64),
            StateTensor("top_score", (heads, settings.num_candidates), "summary", dtype=torch.float64, fill=NONE),
            StateTensor("top_key", kept, "summary"),
            StateTensor("top_value", kept, "summary"),
        )

    def forward(self, hidden: Tensor, chunk: Chunk, past: Past | None = None) -> Output:
        """Mix a chunk `[B, T, M]`; the past, if any, is extended. In training, say how many scores are free."""
        attended, num_free = self._mix(self._project(hidden, chunk), chunk, past)
        said = NOTHING
        if self.training and self.score_proj is not None:
            real = torch.ones_like(chunk.positions, dtype=torch.bool) if chunk.real is None else chunk.real
            counted = real.expand(len(hidden), -1).to(torch.float32)
            # a mean over heads: near 0, scores lie so far apart that they have no gradient any more
            mean = (num_free.float().mean(1) * counted).sum() / counted.sum().clamp(min=1)
            said = Auxiliary(metrics={"free_scores": mean, f"free_scores_{self.index}": mean})
        return Output(self.o_proj(attended.flatten(2)), None if past is None else past.after(), said)

    def forward_packed(self, hidden: Tensor, parts: Sequence[Part]) -> Tensor:
        """Mix parts of a row `[1, T, M]`: projections for all at once."""
        query, key, value = self._linear(hidden)
        score = self._learned(hidden)
        mixed = []
        for part in parts:
            own = part.tokens
            taken = query[:, own], key[:, own], value[:, own], None if score is None else score[:, own]
            mixed.append(self._mix(self._placed(*taken, part.chunk), part.chunk, part.past)[0])
        return self.o_proj(lay_out(parts, mixed, hidden.shape[1]).flatten(2))

    def step(self, hidden: Tensor, chunk: Chunk, past: InPlace) -> Tensor:
        """Mix one token per row, `[B, 1, M]`, in place over slots."""
        # a step is not told how far back a row reaches
        first = (-past.position).clamp(min=FARTHEST).to(torch.int32)[:, None]
        given, chunk, settings = chunk, Chunk(chunk.positions, first), self.settings
        query, new = self._project(hidden, chunk)
        for name, own in new.items():
            past.kept[name][past.slot, past.position % (settings.window + 1)] = own[:, 0].to(past.kept[name].dtype)
        order = (past.position + 1)[:, None] + torch.arange(settings.window + 1, device=hidden.device)
        # the ring's items in the order of the stream, from the one that leaves the window to the row's own
        index = past.slot[:, None], order.remainder(settings.window + 1)
        key, value = past.kept["near_key"][index], past.kept["near_value"][index]
        place = torch.arange(settings.window, device=hidden.device) - settings.window + 1
        top_score, top_key, top_value = self._nothing(key)
        if settings.k:
            entering = self._entering(past.kept["near_score"][index], chunk, settings.window)
            own, join = self._own(entering, key, value, chunk)
            before = past.merge(own, join)
            after = join(before, own)
            top_score, top_key, top_value = (after[name] for name in ("top_score", "top_key", "top_value"))
        mixed = dense.step(
            query, key[:, 1:], value[:, 1:], place >= first, top_score, top_key, top_value, scale=self.scale,
            score_bias=settings.bias(), softmax=settings.score_function == "softmax", masking=settings.masking,
            row_by_row=given.batch_invariant and not query.is_cuda,
        )  # fmt: skip
        return self.o_proj(mixed.flatten(2))

    def _mix(self, projected: tuple[Tensor, Tensors], chunk: Chunk, past: Past | None) -> tuple[Tensor, Tensor]:
        """What heads give to queries, `[B, T, H, D]`, and how many scores are free; the past, if any, is extended."""
        settings, num_past = self.settings, 0
        query, items = projected
        if past is not None:
            items, num_past = past.extend(**items)
        top_score, top_key, top_value = self._nothing(items["near_key"])
        scores = top_score
        if settings.k:
            entering = self._entering(items["near_score"], chunk, num_past)
            if past is not None:
                key, value = (
                    padded_before(items[name], settings.window - num_past) for name in ("near_key", "near_value")
                )
                before = past.merge(*self._own(entering, key, value, chunk))
                top_score, top_key, top_value = (before[name] for name in ("top_score", "top_key", "top_value"))
            scores = torch.cat((top_score, entering), dim=-1)
        else:
            scores = query.new_full((len(query), settings.num_key_value_heads, query.shape[1]), NONE).double()
        found = selected_attention(
            query, items["near_key"], items["near_value"], scores, top_key, top_value, window=settings.window,
            segments=chunk.segments, first_visible=chunk.first_visible(num_past), hidden=chunk.hidden_items(num_past),
            scale=self.scale, score_function=settings.score_function, score_bias=settings.bias(),
            masking=settings.masking, block=max(1, min(BLOCK, query.shape[1])), return_free=True,
        )  # fmt: skip
        assert isinstance(found, tuple)
        return found

    def _nothing(self, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Candidates from before where there are none."""
        settings, batch = self.settings, len(key)
        kept = key.new_zeros(batch, settings.num_key_value_heads, settings.k, settings.head_dim)
        scores = torch.full(
            (batch, settings.num_key_value_heads, settings.num_candidates), NONE, dtype=torch.float64, device=key.device
        )
        return scores, kept, kept

    def _entering(self, score: Tensor, chunk: Chunk, num_past: int) -> Tensor:
        """The score that enters with each row, float64 `[B, K, T]`: of the token W before it, if it counts there."""
        window = self.settings.window
        rows, first, hidden = chunk.places, chunk.first_visible(num_past), chunk.hidden_items(num_past)
        # how many items the window lacks stand before the first
        lacking = window - num_past
        counts = rows >= lacking if first is None else rows >= first + lacking
        if hidden is not None:
            counts = counts & ~padded_before(hidden, lacking)[:, : len(rows)]
        entering = padded_before(score, lacking)[:, : len(rows)].to(torch.float64)
        return entering.masked_fill(~counts[..., None], NONE).transpose(1, 2)

    def _own(
        self, entering: Tensor, key: Tensor, value: Tensor, chunk: Chunk
    ) -> tuple[Tensors, Callable[[Tensors, Tensors], Tensors]]:
        """The largest candidates of the chunk's last document, and what joins them with those from before.

        `key` and `value` are items from W before the first row on.
        """
        settings, segments = self.settings, chunk.segments
        if segments is not None:
            entering = entering.masked_fill((segments != segments[:, -1:])[:, None], NONE)
        scores, index = entering.sort(dim=-1, descending=True, stable=True)
        missing = max(0, settings.num_candidates - scores.shape[-1])
        scores = nn.functional.pad(scores[..., : settings.num_candidates], (0, missing), value=NONE)
        index = nn.functional.pad(index, (0, missing))[..., : settings.k, None].expand(-1, -1, -1, settings.head_dim)
        found = {"top_score": scores} | {
            name: items.transpose(1, 2).gather(2, index) for name, items in (("top_key", key), ("top_value", value))
        }

        def join(before: Tensors, own: Tensors) -> Tensors:
            earlier = before["top_score"].to(torch.float64)
            if segments is not None:
                earlier = earlier.masked_fill((segments[:, -1] > 0)[:, None, None], NONE)
            both = torch.cat((earlier, own["top_score"]), dim=-1)
            both = both.sort(dim=-1, descending=True, stable=True).values[..., : settings.num_candidates]
            first = torch.cat((earlier[..., : settings.k], own["top_score"][..., : settings.k]), dim=-1)
            place = first.argsort(dim=-1, descending=True, stable=True)[..., : settings.k, None]
            place = place.expand(-1, -1, -1, settings.head_dim)
            return {"top_score": both} | {
                name: torch.cat((before[name].to(own[name].dtype), own[name]), dim=2).gather(2, place)
                for name in ("top_key", "top_value")
            }

        return found, join

    def _project(self, hidden: Tensor, chunk: Chunk) -> tuple[Tensor, Tensors]:
        return self._placed(*self._linear(hidden), self._learned(hidden), chunk)

    def _linear(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        size = self.settings.head_dim
        return tuple(  # type: ignore[return-value]
            proj(hidden).unflatten(-1, (-1, size)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )

    def _learned(self, hidden: Tensor) -> Tensor | None:
        """Learned scores `[B, T, K]`, never of fewer bits than float32."""
        return None if self.score_proj is None else self.score_proj(hidden)

    def _placed(
        self, query: Tensor, key: Tensor, value: Tensor, score: Tensor | None, chunk: Chunk
    ) -> tuple[Tensor, Tensors]:
        """Rotated queries, and what is kept of the tokens, by name."""
        if self.rotary is not None:
            angles = chunk.angles(self.rotary, query.dtype)
            query, key = apply_rotary(query, *angles), apply_rotary(key, *angles)
        new = {"near_key": key, "near_value": value}
        if self.settings.k:
            new["near_score"] = self._scores(score, chunk).expand(*key.shape[:3])
        return query, new

    def _scores(self, learned: Tensor | None, chunk: Chunk) -> Tensor:
        """float64 `[B or 1, T, K or 1]`: only differences count, and these are exact far into a stream.

        By chance, they are a function of the row's seed, the layer, the head and the position.
        """
        positions = chunk.positions[..., None]
        if self.settings.selection == "recent":
            return positions.double()
        if self.settings.selection == "random":
            heads = torch.arange(self.settings.num_key_value_heads, device=positions.device)
            # without a training step to draw for, the same places of every row
            seed = 0 if chunk.seed is None else chunk.seed[:, None, None]
            # whole numbers whose differences float32 holds, and 1 apart but where two are alike, so that the mask is 1
            return (uniform(seed, self.index, heads, positions) * 2.0**24).floor().double()
        assert learned is not None
        return learned.double() + self.settings.position_slope * positions.double()

    def flops(self, num_tokens: int, num_past: int = 0) -> int:
        """Projections, and the two products over the window and what is selected."""
        settings = self.settings
        modules = [self.q_proj, self.k_proj, self.v_proj, self.o_proj, self.score_proj]
        matrices = sum(module.weight.numel() for module in modules if module is not None)
        heads = settings.num_attention_heads
        attended = selected_flops(heads, settings.head_dim, num_tokens, settings.window, settings.k, num_past)
        return 2 * num_tokens * matrices + attended

    def reach(self) -> int | None:
        """Everything before; what is not selected counts through the scores it lost to."""
        return None if self.settings.k else self.settings.window

    def refuses(self, chunk: Chunk) -> str | None:
        """A prefix that is read in both directions, and windows drawn for a step."""
        if chunk.last is not None:
            return "selected keys stand before the query, so it cannot read a prefix in both directions; use attention"
        if chunk.windows is not None and chunk.windows[self.index] not in (None, self.settings.window):
            return "keys are selected as they leave its own window, so no other can be drawn for a step; use attention"
        return None


class SparsekLayer(HeadsLayer):
    """SPARSEK in Llama's layer."""

    name = "sparsek"
    Settings = SparsekSettings

    self_attn: SparsekAttention

    def __init__(self, settings: SparsekSettings, width: int, index: int, shared: Shared) -> None:
        mixer = SparsekAttention(settings, width, index, own_rotary(settings, shared))
        super().__init__(mixer, settings, width, shared)
        self.draws_noise = settings.selection == "random"

    def idle_in(self, num_tokens: int) -> str | None:
        """Scores, where all that leaves the window is kept."""
        settings = self.self_attn.settings
        if not settings.k or settings.k + settings.window < num_tokens:
            return None
        return (
            f"k + sliding_window are {settings.k + settings.window:,}, so no key is ever left out and scores have no "
            "gradient: take less of one"
        )

    def init_weights(self, shared: Shared) -> None:
        """Scores of normed tokens begin with the standard deviation that is asked for."""
        super().init_weights(shared)
        if self.self_attn.score_proj is not None:
            weight = self.self_attn.score_proj.weight
            start_normal(weight, self.self_attn.settings.score_std * weight.shape[1] ** -0.5)


def padded_before(items: Tensor, count: int) -> Tensor:
    """`[B, P, ...]` with `count` zeros before: `[B, count + P, ...]`."""
    return torch.cat((items.new_zeros(len(items), count, *items.shape[2:]), items), dim=1) if count else items
