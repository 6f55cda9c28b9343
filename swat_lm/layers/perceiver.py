"""The kind `perceiver`: Perceiver AR (arXiv 2202.07765) and its variants V1, V2 and V3 (arXiv 2412.06106).

The last tokens of a row are latents: they see all before them, and they alone are handed on in the end. What the tokens
before them do is `history`. Whole rows only: latents are others with every token, so nothing can be kept for streams.
Legend: B rows, T tokens, l latents, h history, p compressed history, M width, H query heads, K key/value heads, D size.
"""

import torch
from torch import Tensor, nn

from swat_lm.layers.attention import HeadsLayer, own_rotary
from swat_lm.layers.base import InPlace, Output, Past, Shared, StateTensor
from swat_lm.layers.chunk import Chunk, Rotary
from swat_lm.layers.norm import LayerNorm
from swat_lm.layers.perceiver_settings import PerceiverSettings
from swat_lm.layers.pre_norm import Mixer
from swat_lm.ops import window_attention
from swat_lm.ops.flops import attention_flops
from swat_lm.ops.hiding import hide_keys
from swat_lm.ops.rotary import apply_rotary

NO_STREAMS = (
    "its latents are the last tokens of a whole row, others with every new token, so nothing can be kept of a past, "
    "for streams, caches or chunks; give whole rows, and use_cache=False to generate"
)


class PerceiverAttention(Mixer):
    """Projections around causal attention of latents to all, and of history to itself."""

    def __init__(
        self, settings: PerceiverSettings, width: int, index: int, rotary: Rotary | None, norm_eps: float
    ) -> None:
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
        names = ("kv_norm",) if settings.tied else ("k_norm", "v_norm")
        for name in names if settings.kv_norm else ():
            self.add_module(name, LayerNorm(settings.head_dim, norm_eps))
        self.norms = names if settings.kv_norm else ()

    def state_spec(self) -> tuple[StateTensor, ...]:
        """Nothing."""
        return ()

    def forward(self, hidden: Tensor, chunk: Chunk, past: Past | None = None) -> Output:
        """Mix whole rows `[B, T, M]`; `[B, l, M]` where the history is dropped."""
        if past is not None:
            raise ValueError(f"layer {self.index} (perceiver): {NO_STREAMS}")
        settings = self.settings
        num_history = hidden.shape[1] - settings.latents
        start = num_history if settings.history in ("drop", "segments") else 0
        query, key, value = self._project(hidden, chunk, num_history if settings.history == "drop" else 0)
        first = chunk.first_visible(0)
        if settings.history == "drop":
            mixed = self._attend(query, key, value, chunk, cut(first, start))
        elif settings.history == "segments" and num_history:
            # the first visible key would fall where the latents begin, so there are two calls
            own = slice(0, num_history)
            begins, ends = history_ends(chunk, num_history, settings.segment)
            past_part = self._attend(query[:, own], key[:, own], value[:, own], chunk, begins, ends)
            latents = self._attend(query[:, start:], key, value, chunk, cut(first, start))
            mixed = torch.cat((past_part, latents), dim=1)
        else:
            last = history_ends(chunk, num_history)[1] if num_history else None
            if last is not None:
                last = torch.cat((last, chunk.places[num_history:].expand(len(last), -1)), dim=1).contiguous()
                last = last.expand(len(hidden), -1).contiguous()
            mixed = self._attend(query, key, value, chunk, first, last)
        return Output(self.o_proj(mixed))

    def _project(self, hidden: Tensor, chunk: Chunk, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query `[B, T - start, H, D]`, key and value `[B, T, K, D]`, normed and rotated."""
        size = self.settings.head_dim
        query = self.q_proj(hidden[:, start:]).unflatten(-1, (-1, size))
        projections = [proj for proj in (self.kv_proj, self.k_proj, self.v_proj) if proj is not None]
        items = [proj(hidden).unflatten(-1, (-1, size)) for proj in projections]
        if self.norms:
            items = [self.get_submodule(name)(item) for name, item in zip(self.norms, items, strict=True)]
        if self.rotary is not None:
            cos, sin = chunk.angles(self.rotary, hidden.dtype)
            query, items[0] = apply_rotary(query, cos[:, start:], sin[:, start:]), apply_rotary(items[0], cos, sin)
        return query, items[0], items[-1]

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        chunk: Chunk,
        first: Tensor | None = None,
        last: Tensor | None = None,
    ) -> Tensor:
        """What the heads give to queries over the first keys of the row, `[B, T, H * D]`."""
        settings, blind = self.settings, chunk.hidden_items(0)
        if blind is not None:
            query, key, value = hide_keys(query, key, value, blind[:, : key.shape[1]], self.scale)
        first, last = (None if x is None else x.expand(len(query), -1).contiguous() for x in (first, last))
        heads = window_attention(
            query, key, value, window=None, score_function=settings.score_function, score_bias=settings.bias(),
            scale=self.scale, first_visible=first, last_visible=last, backend=settings.attention_backend,
        )  # fmt: skip
        assert isinstance(heads, Tensor)
        return heads[..., : settings.head_dim].flatten(2)

    def flops(self, num_tokens: int, num_past: int = 0) -> int:
        """Projections, and the two products over the pairs that are seen."""
        settings = self.settings
        history = max(0, num_tokens - settings.latents)
        queries = num_tokens - history if settings.history == "drop" else num_tokens
        ours = 2 * self.q_proj.weight.numel() * queries
        theirs = [proj for proj in (self.kv_proj, self.k_proj, self.v_proj) if proj is not None]
        ours += sum(proj.weight.numel() for proj in theirs) * num_tokens
        ours += (self.o_proj.weight.numel() - self.q_proj.weight.numel()) * queries
        heads, size = settings.num_attention_heads, settings.head_dim
        pairs = 0
        if settings.history == "segments":
            assert settings.segment is not None
            whole, rest = divmod(history, settings.segment)
            pairs = whole * settings.segment**2 + rest**2
        elif settings.history != "drop":
            pairs = history**2
        seen = attention_flops(heads, size, num_tokens - history, None, history)
        return 2 * ours + 4 * heads * size * pairs + seen

    def reach(self) -> int | None:
        """Everything before."""
        return None

    def refuses(self, chunk: Chunk) -> str | None:
        """Rows that are shorter than the latents, prefixes, drawn windows, and what no learned map can tell apart."""
        settings = self.settings
        if chunk.num_tokens < settings.latents:
            return (
                f"latents: {settings.latents} are longer than the sequence of {chunk.num_tokens} tokens; "
                "take fewer latents, or longer rows"
            )
        if chunk.last is not None:
            return "its history is a prefix already, so no other can be read in both directions; use attention"
        if chunk.windows is not None and chunk.windows[self.index] is not None:
            return "it has no window, so none can be drawn for a step; use attention"
        if settings.history != "compress":
            return None
        if chunk.num_tokens != settings.length:
            return (
                f"length: it has learned to compress rows of {settings.length} tokens, got {chunk.num_tokens}; "
                "give rows of that length"
            )
        if chunk.first is not None or chunk.hidden is not None:
            return (
                "what compresses its history mixes all of it, so it can keep neither documents nor padding apart; "
                "give whole rows of one text (data.documents: concatenate)"
            )
        return None


def cut(first: Tensor | None, start: int) -> Tensor | None:
    """The rows from `start` on."""
    return None if first is None else first[:, start:].contiguous()


def history_ends(chunk: Chunk, num_history: int, segment: int | None = None) -> tuple[Tensor, Tensor]:
    """The first and the last token that each of the history sees, int32 `[B or 1, h]`: its document, or its segment.

    Padding sees nothing: there the first lies after the last.
    """
    places, first = chunk.places[:num_history], chunk.first_visible(0)
    begin, end = torch.zeros_like(places)[None], torch.full_like(places, num_history - 1)[None]
    if first is not None:
        begin, segments = first[:, :num_history], chunk.segments
        assert segments is not None
        real = begin <= places
        held = torch.where(real, places, -1).to(torch.int32)
        ends = held.new_full((len(begin), chunk.num_tokens + 1), -1)
        ends = ends.scatter_reduce(1, segments[:, :num_history], held, "amax")
        end = torch.where(real, ends.gather(1, segments[:, :num_history]), places)
    if segment is not None:
        # counted from the document's start, which is the row's where there is no other; padding stays before it
        own = begin + torch.div(places - begin, segment, rounding_mode="floor").clamp(min=0) * segment
        begin, end = own, torch.minimum(end, own + segment - 1)
    return begin, end


class PerceiverLayer(HeadsLayer):
    """A Perceiver's attention in Llama's layer, which hands on latents, or a history beside them."""

    name = "perceiver"
    Settings = PerceiverSettings
    shortens = True
    rotates_as = "full_attention"

    self_attn: PerceiverAttention

    def __init__(self, settings: PerceiverSettings, width: int, index: int, shared: Shared) -> None:
        rotary = own_rotary(settings, shared) if settings.rotary_layers == "all" or not shared.nth else None
        super().__init__(PerceiverAttention(settings, width, index, rotary, shared.norm_eps), settings, width, shared)
        self.settings = settings
        self.compress = None
        if settings.history == "compress":
            self.compress = nn.Linear(settings.num_history, settings.num_compressed)

    def forward(self, hidden: Tensor, chunk: Chunk, past: Past | None = None) -> Output:
        """Process whole rows `[B, T, M]`; `[B, l, M]` where the history is dropped, `[B, p + l, M]` compressed."""
        mixed = self.self_attn(self._mixer_input(hidden), chunk, past).hidden
        # the residual stream of those tokens that are handed on
        joined = self._join_mixed(hidden[:, hidden.shape[1] - mixed.shape[1] :], mixed)
        if self.compress is not None:
            history, latents = joined.split([self.settings.num_history, self.settings.latents], dim=1)
            joined = torch.cat((self.compress(history.transpose(1, 2)).transpose(1, 2), latents), dim=1)
        return Output(self._feed(joined))

    def step(self, hidden: Tensor, chunk: Chunk, past: InPlace) -> Tensor:
        """Refused by name."""
        return self.forward(hidden, chunk, past).hidden

    def idle_in(self, num_tokens: int) -> str | None:
        """Segments of the history that are longer than it is."""
        segment, history = self.settings.segment, num_tokens - self.settings.latents
        if segment is None or segment < history:
            return None
        return (
            f"a segment of {segment:,} tokens holds the whole history of {max(history, 0):,}: take a shorter segment, "
            "or history: whole"
        )

    def num_handed_on(self, num_tokens: int) -> int:
        """The latents, and what is left of the history."""
        settings = self.settings
        if settings.history == "drop":
            return min(num_tokens, settings.latents)
        return num_tokens if self.compress is None else settings.num_compressed + settings.latents

    def flops(self, num_tokens: int, num_past: int = 0) -> int:
        """Those of attention over all tokens, of compression, and of the feed-forward over those that are handed on."""
        matrices = sum(module.weight.numel() for module in self.mlp.children() if isinstance(module, nn.Linear))
        compression = 0
        if self.compress is not None:
            compression = 2 * self.compress.weight.numel() * self.self_attn.o_proj.out_features
        handed_on = self.num_handed_on(num_tokens)
        return self.self_attn.flops(num_tokens, num_past) + compression + 2 * handed_on * matrices

    @classmethod
    def keeps_beside_keys(cls, settings: PerceiverSettings) -> str | None:
        """Nothing, nor keys."""
        return None

    def refuses_past(self) -> str | None:
        """All of them."""
        return NO_STREAMS
