"""The kind `ecp`: attention of segments to themselves and the one before (ECP, first LLP, arXiv 2412.06106).

What a token knows moves on by one segment per layer. One projection serves as keys and values, so the state is half of
a window's. Segments count from the document's start. Two integers per row say all of this to the operator.
Legend: B rows, T tokens, P kept tokens, M width, m segment, H query heads, K key/value heads, D head size.
"""

import torch
from torch import Tensor, nn

from swat_lm.layers.attention import HeadsLayer, own_rotary
from swat_lm.layers.base import InPlace, Output, Past, Shared, StateTensor
from swat_lm.layers.chunk import Chunk, Rotary
from swat_lm.layers.ecp_settings import EcpSettings
from swat_lm.layers.pre_norm import Mixer, start_normal
from swat_lm.ops import window_attention
from swat_lm.ops.flops import attention_flops
from swat_lm.ops.hiding import hide_keys
from swat_lm.ops.rotary import apply_rotary

TIED, APART = ("key_value",), ("key", "value")


class EcpAttention(Mixer):
    """Projections around windowed attention whose first visible key stands still within a segment."""

    def __init__(self, settings: EcpSettings, width: int, index: int, rotary: Rotary | None) -> None:
        super().__init__()
        self.settings, self.index, self.rotary = settings, index, rotary
        self.scale = settings.head_dim**-0.5
        queries, keys = (
            heads * settings.head_dim for heads in (settings.num_attention_heads, settings.num_key_value_heads)
        )
        self.q_proj = nn.Linear(width, queries, bias=False)
        self.kv_proj = nn.Linear(width, keys, bias=False) if settings.tied else None
        self.k_proj = None if settings.tied else nn.Linear(width, keys, bias=False)
        self.v_proj = None if settings.tied else nn.Linear(width, keys, bias=False)
        self.o_proj = nn.Linear(queries, width, bias=False)
        self.first_o_proj = nn.Linear(queries, width, bias=False) if settings.first_projection else None
        self.names = TIED if settings.tied else APART

    def state_spec(self) -> tuple[StateTensor, ...]:
        """Keys, which are values too where they are tied, of a token's own segment and of those that it looks back to.

        A new one is written before it is attended to, so there are as many places as the last token of a segment sees.
        """
        item = self.settings.num_key_value_heads, self.settings.head_dim
        return tuple(StateTensor(name, item, "window", self.settings.window) for name in self.names)

    def forward(self, hidden: Tensor, chunk: Chunk, past: Past | None = None) -> Output:
        """Mix a chunk `[B, T, M]`; the past, if any, is extended."""
        query, items = self._project(hidden, chunk)
        num_past = 0
        if past is not None:
            kept, num_past = past.extend(**dict(zip(self.names, items, strict=True)))
            items = tuple(kept[name] for name in self.names)
        own = first_places(chunk, self.settings)
        given = chunk.first_visible(num_past)
        first = (own + num_past).clamp(min=0).expand(len(hidden), -1)
        first = first.contiguous() if given is None else torch.maximum(first, given)
        heads = self._attend(query, items[0], items[-1], first, chunk.hidden_items(num_past))
        return Output(self._write(heads, chunk), None if past is None else past.after())

    def step(self, hidden: Tensor, chunk: Chunk, past: InPlace) -> Tensor:
        """Mix one token per row, `[B, 1, M]`, in place over rings, of which fewer places are seen than they hold."""
        window, position = self.settings.window, past.position
        query, items = self._project(hidden, chunk)
        for name, item in zip(self.names, items, strict=True):
            past.kept[name][past.slot, position % window] = item[:, 0].to(past.kept[name].dtype)
        # the ring in the order of the stream, the row's own item last
        place = ((position + 1)[:, None] + torch.arange(window, device=hidden.device)).remainder(window)
        kept = [past.kept[name][past.slot[:, None], place] for name in self.names]
        first = window - 1 - seen_back(position, self.settings)
        heads = self._attend(query.to(kept[0].dtype), kept[0], kept[-1], first.to(torch.int32)[:, None], None)
        return self._choose(heads, (position < self.settings.segment)[:, None, None])

    def _project(self, hidden: Tensor, chunk: Chunk) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Rotated query `[B, T, H, D]`, and what is kept of the tokens, each `[B, T, K, D]`."""
        size = self.settings.head_dim
        query, *items = (
            proj(hidden).unflatten(-1, (-1, size))
            for proj in (self.q_proj, self.kv_proj, self.k_proj, self.v_proj)
            if proj is not None
        )
        if self.rotary is not None:
            angles = chunk.angles(self.rotary, hidden.dtype)
            query, items[0] = apply_rotary(query, *angles), apply_rotary(items[0], *angles)
        return query, tuple(items)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, first: Tensor, blind: Tensor | None) -> Tensor:
        """What the heads give to queries over keys of which the last are their own, `[B, T, H * D]`."""
        settings = self.settings
        if blind is not None:
            query, key, value = hide_keys(query, key, value, blind, self.scale)
        heads = window_attention(
            query, key, value, window=settings.window, score_function=settings.score_function,
            score_bias=settings.bias(), scale=self.scale, first_visible=first, backend=settings.attention_backend,
        )  # fmt: skip
        assert isinstance(heads, Tensor)
        return heads[..., : settings.head_dim].flatten(2)

    def _write(self, heads: Tensor, chunk: Chunk) -> Tensor:
        """To the residual stream, `[B, T, M]`; tokens of the first segment of their document by a map of their own."""
        own, segment = self.first_o_proj, self.settings.segment
        if own is None:
            return self.o_proj(heads)
        if chunk.first is None and isinstance(chunk.before, int) and chunk.before == 0:
            # known without a look at the device: no product is formed twice
            return torch.cat((own(heads[:, :segment]), self.o_proj(heads[:, segment:])), dim=1)
        return self._choose(heads, (chunk.document_places < segment)[..., None])

    def _choose(self, heads: Tensor, is_first: Tensor) -> Tensor:
        own = self.first_o_proj
        return self.o_proj(heads) if own is None else torch.where(is_first, own(heads), self.o_proj(heads))

    def flops(self, num_tokens: int, num_past: int = 0) -> int:
        """Projections, and the two products as the operator counts them: over a window of all that may be seen.

        A token sees three quarters of that on average, where it looks back to one segment.
        """
        settings = self.settings
        modules = (self.q_proj, self.kv_proj, self.k_proj, self.v_proj, self.o_proj)
        matrices = sum(module.weight.numel() for module in modules if module is not None)
        heads, size = settings.num_attention_heads, settings.head_dim
        return 2 * num_tokens * matrices + attention_flops(heads, size, num_tokens, settings.window, num_past)

    def reach(self) -> int | None:
        """What the last token of a segment sees."""
        return self.settings.window

    def aligned_to(self) -> int | None:
        """Segments."""
        return self.settings.segment

    def refuses(self, chunk: Chunk) -> str | None:
        """A prefix that is read in both directions, and windows drawn for a step."""
        if chunk.last is not None:
            return "a segment sees those before it, so it cannot read a prefix in both directions; use attention"
        if chunk.windows is not None and chunk.windows[self.index] is not None:
            return "it sees whole segments, so no window can be drawn for a step; use attention"
        return None


def seen_back(place: Tensor, settings: EcpSettings) -> Tensor:
    """How many tokens before it one at this place of its document sees, of the same shape; below 0 for padding."""
    first = (torch.div(place, settings.segment, rounding_mode="floor") - settings.look_back) * settings.segment
    return place - first.clamp(min=0)


def first_places(chunk: Chunk, settings: EcpSettings) -> Tensor:
    """The first place of the chunk that each token sees, int32 `[B or 1, T]`, negative in the past; made once."""
    key = "segments", settings.segment, settings.look_back
    return chunk._once(key, lambda: (chunk.places - seen_back(chunk.document_places, settings)).to(torch.int32))


class EcpLayer(HeadsLayer):
    """ECP in Llama's layer."""

    name = "ecp"
    Settings = EcpSettings

    self_attn: EcpAttention

    def __init__(self, settings: EcpSettings, width: int, index: int, shared: Shared) -> None:
        rotary = own_rotary(settings, shared) if settings.rotary_layers == "all" or not shared.nth else None
        super().__init__(EcpAttention(settings, width, index, rotary), settings, width, shared)

    def idle_in(self, num_tokens: int) -> str | None:
        """What stands beyond one segment."""
        segment = self.self_attn.settings.segment
        if num_tokens > segment:
            return None
        return f"a segment of {segment:,} tokens holds the whole row, so none sees another: take a shorter segment"

    @staticmethod
    def layer_type(settings: EcpSettings) -> str:
        """Hugging Face's name: of a window where keys and values are kept, else of none that its caches know."""
        return "linear_attention" if settings.tied else "sliding_attention"

    @classmethod
    def keeps_beside_keys(cls, settings: EcpSettings) -> str | None:
        """Nothing: tied keys and values are items of a window too, of which the last can be taken back."""
        return None

    def aligned_to(self) -> int | None:
        """Segments."""
        return self.self_attn.aligned_to()

    def init_weights(self, shared: Shared) -> None:
        """Both output projections write to the residual stream."""
        super().init_weights(shared)
        own, scale = self.self_attn.first_o_proj, shared.output_projection_init_scale
        if own is not None and scale != 1:
            start_normal(own.weight, shared.initializer_range * scale)
