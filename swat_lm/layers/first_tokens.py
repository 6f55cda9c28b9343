"""The first tokens of a stream, kept beside a window: attention sinks as state, of constant size.

StreamingLLM (arXiv 2309.17453) found that a softmax model of full attention breaks behind a window unless its first
tokens stay visible. A token sees the last W tokens, and of the first n of its document those that have left the window.
They are attended to apart from the window, and the two results are joined: by their log-sum-exp for softmax, as a sum
for sigmoid, whose weights do not compete.

Their places, for rotary and slopes, are those "cache" gives them, right before the window, so that no query is farther
from one than W + n - 1; or "absolute", where they stood in the stream.

Legend: B rows, T tokens of a chunk, n kept tokens, S kept tokens of all documents of a chunk, W window, H query heads,
K key/value heads, D head size.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from swat_lm.layers.base import InPlace, Past, StateTensor
from swat_lm.layers.chunk import Chunk
from swat_lm.ops import window_attention
from swat_lm.ops.flops import attention_flops
from swat_lm.ops.head_bias import score_dtype
from swat_lm.ops.rotary import apply_rotary, rotate_paired

if TYPE_CHECKING:
    from swat_lm.layers.window_attention import WindowAttention

SINK_POSITIONS = ("cache", "absolute")
# of a row that sees no kept token; the log-sum-exp of the window is far above it, and finite where that is not
NOTHING_SEEN = -1e30

Heads = Tensor | tuple[Tensor, Tensor]
"""What the operator gives: heads' outputs `[B, T, H, D]`, with their lse `[B, T, H]` for softmax."""


def state_of_first_tokens(count: int, num_kv_heads: int, head_dim: int) -> tuple[StateTensor, ...]:
    """Keys and values of the tokens, where each stood among the items of its document, and what that is a part of."""
    shape = (count, num_kv_heads, head_dim)
    return (
        StateTensor("sink_key", shape, "summary"),
        StateTensor("sink_value", shape, "summary"),
        # -1: none yet
        StateTensor("sink_place", (count,), "summary", dtype=torch.int64, fill=-1),
        # items so far, and whether a document began among them
        StateTensor("sink_span", (2,), "summary", dtype=torch.int64),
    )


class Layout(NamedTuple):
    """Where the tokens of a chunk stand in their documents, int64 `[B, T]` each; the past is not counted."""

    item: Tensor
    """Place among the row's items; hidden tokens are items, padding is none."""
    segment: Tensor
    """0 where the token's document began before the chunk, one more for each that begins in it."""
    begin: Tensor
    """The column where its document begins, or 0."""
    rank: Tensor
    """Place among the real tokens of its document."""
    real: Tensor
    """bool: neither padding nor hidden."""
    is_item: Tensor
    """bool: not padding."""


def layout_of(chunk: Chunk, batch: int) -> Layout:
    """The layout of a chunk; made once for all layers."""
    # made where its columns are
    return chunk._once("layout", lambda: _layout(chunk, batch))


def _layout(chunk: Chunk, batch: int) -> Layout:
    places = chunk.places.long().expand(batch, -1)
    is_item = torch.ones_like(places, dtype=torch.bool) if chunk.first is None else chunk.first <= chunk.places
    real = is_item if chunk.real is None else chunk.real.expand(batch, -1)
    counted, zeros = real.long().cumsum(1), torch.zeros_like(places)
    segment, begin = zeros, zeros
    if chunk.begins is not None and chunk.segments is not None:
        segment, begin = chunk.segments, torch.where(chunk.begins, places, 0).cummax(dim=1).values
    before = (counted - real.long()).gather(1, begin)
    return Layout(is_item.long().cumsum(1) - 1, segment, begin, counted - before - 1, real, is_item)


class Seen(NamedTuple):
    """The kept tokens that a chunk's tokens may see beside their windows."""

    source: Tensor
    """int64 `[B, S]`: index into the past's n tokens followed by the chunk's T."""
    rank: Tensor
    """int64 `[B, S]`: place among the kept tokens of its document."""
    first: Tensor
    """int32 `[B, T]`, index into S: the first that the token sees."""
    count: Tensor
    """int64 `[B, T]`: how many it sees: those that have left its window; none where it is padding."""


def join_first(before: dict[str, Tensor], later: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first tokens of two parts of a stream, one after the other; associative."""
    places, count = later["sink_place"], later["sink_place"].shape[1]
    begun = later["sink_span"][:, 1:] > 0
    stays = (before["sink_place"] >= 0) & ~begun
    # counted from where the earlier part begins, or from where the document does
    shift = torch.where(begun, 0, before["sink_span"][:, :1])
    valid = torch.cat((stays, places >= 0), dim=1)
    source, held = first_valid(valid, count)
    place = torch.cat((before["sink_place"], places + shift), dim=1).gather(1, source)
    found = {"sink_place": torch.where(held, place, -1)}
    for name in ("sink_key", "sink_value"):
        found[name] = pick(torch.cat((before[name], later[name]), dim=1), source)
    items = shift + later["sink_span"][:, :1]
    found["sink_span"] = torch.cat((items, torch.maximum(before["sink_span"], later["sink_span"])[:, 1:]), dim=1)
    return found


def first_valid(valid: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Index `[B, count]` of the first valid entries of `[B, X]` in order, 0 where there are fewer; which are there."""
    order = valid.long().cumsum(1) - 1
    target = torch.where(valid & (order < count), order, count)
    index = torch.arange(valid.shape[1], device=valid.device).expand_as(target)
    source = target.new_zeros(target.shape[0], count + 1).scatter(1, target, index)[:, :count]
    return source, torch.arange(count, device=valid.device) <= order[:, -1:]


def whole_vectors(scores: Tensor) -> Tensor:
    """Scores `[..., n]` filled up to a multiple of a CPU's vectors: what is left over is rounded otherwise, and which
    row has it depends on its place in the batch."""
    return F.pad(scores, (0, -scores.shape[-1] % 16), value=NOTHING_SEEN)


def all_in_window(span: Tensor, num_tokens: int, window: int) -> bool:
    """Whether a chunk's tokens see all first tokens in the window; a device to be waited for and mere shapes say no."""
    return type(span) is Tensor and span.device.type == "cpu" and bool((span[:, 0] + num_tokens <= window).all())


def pick(items: Tensor, source: Tensor) -> Tensor:
    """`items [B, X, K, D]` at `source [B, S]`, `[B, S, K, D]`."""
    return items.gather(1, source[:, :, None, None].expand(-1, -1, *items.shape[2:]))


class FirstTokens:
    """What a layer of windowed attention keeps of the first tokens, and how it attends to them."""

    def __init__(self, attention: "WindowAttention") -> None:
        self.attention, self.count = attention, attention.settings.sinks
        self.by_cache = attention.settings.sink_positions == "cache"
        self._angles: Any = None

    def state_spec(self) -> tuple[StateTensor, ...]:
        """Of this process's heads."""
        return state_of_first_tokens(self.count, self.attention.num_kv_heads, self.attention.settings.head_dim)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, chunk: Chunk, past: Past | None) -> Heads | None:
        """What the kept tokens give to queries `[B, T, H, D]`, not rotated; None where nothing has left a window.

        The past, if any, keeps the first of the chunk's keys and values for its document.
        """
        num_tokens, window = query.shape[1], self.attention.window_in(chunk)
        assert window is not None
        # a graph serves lengths on either side of the window
        is_eager = not torch.compiler.is_compiling()
        if num_tokens == 0 or (past is None and is_eager and num_tokens <= window):
            return None
        if self.attention.rotary is not None and not self.by_cache:
            angles = chunk.angles(self.attention.rotary, query.dtype)
            query, key = apply_rotary(query, *angles), apply_rotary(key, *angles)
        if past is None and is_eager and chunk.first is None and chunk.hidden is None:
            return self._attend_in_one_document(query, key, value, window)
        layout, before = layout_of(chunk, query.shape[0]), None
        if past is not None:
            before = past.merge(self._own(key, value, layout), join_first)
            if is_eager and all_in_window(before["sink_span"], num_tokens, window):
                return None
            key, value = (torch.cat((before[name], x.to(before[name].dtype)), dim=1)
                          for name, x in (("sink_key", key), ("sink_value", value)))  # fmt: skip
        seen = self._seen(chunk, layout, window, before)
        return self._operator(query, pick(key, seen.source), pick(value, seen.source), seen, window)

    def _attend_in_one_document(self, query: Tensor, key: Tensor, value: Tensor, window: int) -> Heads:
        """Rows of one document each: the first tokens come first, and those behind the window see them."""
        batch, num_queries = query.shape[0], query.shape[1] - window
        count = torch.arange(1, num_queries + 1, device=query.device).clamp(max=self.count).expand(batch, -1)
        rank = torch.arange(key[:, : self.count].shape[1], device=query.device).expand(batch, -1)
        seen = Seen(rank, rank, torch.zeros_like(count, dtype=torch.int32), count)
        found = self._operator(query[:, window:], key[:, : self.count], value[:, : self.count], seen, window)
        if isinstance(found, Tensor):
            return F.pad(found, (0, 0, 0, 0, window, 0))
        return F.pad(found[0], (0, 0, 0, 0, window, 0)), F.pad(found[1], (0, 0, window, 0), value=NOTHING_SEEN)

    def _operator(self, query: Tensor, key: Tensor, value: Tensor, seen: Seen, window: int) -> Heads:
        attention, softmax = self.attention, self.attention.settings.score_function == "softmax"
        if attention.rotary is not None and self.by_cache:
            places = (window - 1 + seen.count).clamp(min=0)
            query = apply_rotary(query, *attention.rotary.angles(places, query.dtype))
            key = apply_rotary(key, *attention.rotary.angles(seen.rank, key.dtype))
        found = window_attention(
            query,
            key.to(query.dtype),
            value.to(query.dtype),
            window=None,
            score_function=attention.settings.score_function,
            slopes=attention.slopes_on(query.device),
            score_bias=self.bias_beside(window, query),
            scale=attention.scale,
            softcap=attention.settings.attn_logit_softcapping,
            first_visible=seen.first,
            last_visible=(seen.first + seen.count - 1).to(torch.int32).contiguous(),
            return_lse=softmax,
            backend=attention.settings.attention_backend,
        )
        if isinstance(found, Tensor):
            return found
        return found[0], torch.where((seen.count > 0)[..., None], found[1], NOTHING_SEEN)

    def step(self, query: Tensor, key: Tensor, value: Tensor, chunk: Chunk, past: InPlace) -> Heads | None:
        """As `attend`, for one token per row in place over slots, of which nothing is hidden; inference only.

        No row depends on another, and on a GPU nothing waits for the device. On a CPU what would change nothing is left
        out: a row whose first tokens are all in its window comes out the same to the bit, whether others lead to work.
        """
        attention, kept, slot = self.attention, past.kept, past.slot
        window = attention.settings.sliding_window
        assert window is not None
        by_place = attention.rotary is not None and not self.by_cache
        if by_place:
            angles = chunk.step_angles(attention.rotary, query.dtype)  # type: ignore[arg-type]
            query, key = rotate_paired(query, *angles), rotate_paired(key, *angles)
        # the token's place in its stream
        items = kept["sink_span"].select(1, 0)
        place = items.index_select(0, slot)
        items.index_copy_(0, slot, place + 1)
        if place.device.type == "cpu":
            places = place.tolist()
            if max(places) < window:
                if min(places) < self.count:
                    self._kept_with(key, value, place, past)
                return None
        # how many have left its window
        gone = (place - window + 1).clamp(0, self.count)
        keys, values = self._kept_with(key, value, place, past)
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        if attention.rotary is not None and self.by_cache:
            own, theirs = self._angles_by_cache(window, query)
            query = rotate_paired(query, *(angle[gone, None, None] for angle in own))
            keys = rotate_paired(keys, *theirs)
        return self._attend_to(query, keys, values, gone, window)

    def _kept_with(self, key: Tensor, value: Tensor, place: Tensor, past: InPlace) -> tuple[Tensor, Tensor]:
        """The kept keys and values `[B, n, K, D]`, after a token at `place` `[B]` has joined them where it is one."""
        kept, slot = past.kept, past.slot
        # all rows write: those behind the first tokens what stands there already
        is_first, target = place < self.count, place.clamp(max=self.count - 1)
        found = []
        for name, new in (("sink_key", key), ("sink_value", value)):
            stored = kept[name]
            stored[slot, target] = torch.where(
                is_first[:, None, None], new[:, 0].to(stored.dtype), stored[slot, target]
            )
            found.append(stored[slot])
        kept["sink_place"][slot, target] = torch.where(is_first, target, kept["sink_place"][slot, target])
        return found[0], found[1]

    def _attend_to(self, query: Tensor, key: Tensor, value: Tensor, gone: Tensor, window: int) -> Heads:
        """Queries `[B, 1, H, D]` over the first `gone` `[B]` of the keys and values `[B, K, n, D]`."""
        attention, precise = self.attention, score_dtype(query)
        batch, num_kv_heads, _, head_dim = key.shape
        rows = query.to(precise).view(batch, num_kv_heads, -1, head_dim)
        scores = torch.matmul(rows, key.to(precise).transpose(2, 3)).mul_(attention.scale)
        cap = attention.settings.attn_logit_softcapping
        if cap is not None:
            scores = scores.div_(cap).tanh_().mul_(cap)
        order = torch.arange(self.count, device=query.device)
        bias = self.bias_beside(window, query)
        if isinstance(bias, Tensor):
            slopes, biases = attention.slopes_on(query.device), bias.to(precise)[:, None]
            if slopes is not None:
                # the last of those that are seen is W away
                biases = biases + slopes.to(precise)[:, None] * (gone[:, None] - 1 - order).to(precise)[:, None]
            scores += biases.expand(batch, -1, self.count).view(*scores.shape)
        elif bias:
            scores += bias
        # finite, also where nothing is seen
        scores.masked_fill_((order >= gone[:, None])[:, None, None], NOTHING_SEEN)
        lse = None
        if attention.settings.score_function == "softmax":
            lse = scores.logsumexp(dim=-1).view(batch, 1, -1)
        weights = whole_vectors(scores).sigmoid()[..., : self.count] if lse is None else scores.softmax(dim=-1)
        output = torch.matmul(weights, value.to(precise)).view(query.shape).to(query.dtype)
        return output if lse is None else (output, lse)

    def _angles_by_cache(self, window: int, query: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Angles of a query behind 0 to n of the first tokens, `[n + 1, D]`, and of their keys, `[n, D]`; made once."""
        key = (window, query.dtype, query.device)
        if self._angles is None or self._angles[0] != key:
            rotary = self.attention.rotary
            assert rotary is not None
            # made outside inference mode, so that they outlive it
            with torch.inference_mode(False):
                order = torch.arange(self.count + 1, device=query.device)
                own = tuple(angle[:, 0, 0] for angle in rotary.step_angles((window - 1 + order)[:, None], query.dtype))
                theirs = tuple(angle[:-1, 0, 0] for angle in rotary.step_angles(order[:, None], query.dtype))
            self._angles = key, own, theirs
        return self._angles[1:]

    def flops(self, num_tokens: int, num_past: int) -> int:
        """Both products of the tokens behind which a window has moved on."""
        settings = self.attention.settings
        window = settings.sliding_window
        assert window is not None
        queries = max(0, num_past + num_tokens - window) - max(0, num_past - window)
        # as if each saw all of them: the first few see fewer
        heads, head_dim = settings.num_attention_heads, settings.head_dim
        return attention_flops(heads, head_dim, queries, self.count, self.count) if queries else 0

    def bias_beside(self, window: int, query: Tensor) -> float | Tensor:
        """The score's bias `[H]`, or a number, of tokens that stand right before the window.

        The operator counts distances from the last token that is seen; that one is W away.
        """
        slopes, bias = self.attention.slopes_on(query.device), self.attention.bias()
        return bias if slopes is None else slopes.to(score_dtype(query)) * window + bias

    def _own(self, key: Tensor, value: Tensor, layout: Layout) -> dict[str, Tensor]:
        """The first tokens of the chunk's last document, as the past keeps them."""
        segment = layout.segment[:, -1:]
        valid = layout.real & (layout.segment == segment) & (layout.rank < self.count)
        source, held = first_valid(valid, self.count)
        start = torch.where(segment > 0, layout.item.gather(1, layout.begin[:, -1:]), 0)
        place = torch.where(held, layout.item.gather(1, source) - start, -1)
        span = torch.cat((layout.item[:, -1:] + 1 - start, (segment > 0).long()), dim=1)
        return {
            "sink_key": pick(key, source), "sink_value": pick(value, source), "sink_place": place, "sink_span": span,
        }  # fmt: skip

    def _seen(self, chunk: Chunk, layout: Layout, window: int, before: dict[str, Tensor] | None) -> Seen:
        if before is None:
            # the same for every layer with this window
            key = ("first tokens", self.count, window)
            return chunk._once(key, lambda: seen_tokens(chunk, layout, self.count, window))
        return seen_tokens(chunk, layout, self.count, window, before["sink_place"], before["sink_span"][:, :1])


def seen_tokens(
    chunk: Chunk,
    layout: Layout,
    count: int,
    window: int,
    place: Tensor | None = None,
    num_items: Tensor | None = None,
) -> Seen:
    """Which of the first tokens a chunk's tokens see beside a window.

    Args:
        count: n.
        place: int64 `[B, n]`, where the past's stood among the items of their document, -1: none; None: no past.
        num_items: int64 `[B, 1]`, the items of that document before the chunk.
    """
    goes_on, rank = layout.segment == 0, layout.rank
    kept = None if place is None else place >= 0
    if kept is not None:
        rank = rank + torch.where(goes_on, kept.sum(1, keepdim=True), 0)
    is_first = layout.real & (rank < count)
    through = is_first.long().cumsum(1)
    # of the chunk's, those before the token's document
    earlier = (through - is_first.long()).gather(1, layout.begin)
    edge = chunk.places.long() - window
    left = torch.where(edge >= 0, through[:, edge.clamp(min=0)], 0)
    gone = (left - earlier).clamp(min=0)
    first, valid = earlier, is_first
    if kept is not None:
        assert place is not None
        assert num_items is not None
        distance = (num_items + layout.item)[..., None] - place[:, None]
        # the past's belong to the document that goes on
        gone = gone + torch.where(goes_on, ((distance >= window) & kept[:, None]).sum(-1), 0)
        first = torch.where(goes_on, 0, earlier + kept.sum(1, keepdim=True))
        valid = torch.cat((kept, is_first), dim=1)
        rank = torch.cat((torch.arange(count, device=rank.device).expand(rank.shape[0], -1), rank), dim=1)
    most = count
    if chunk.begins is not None:
        # one more document, one more set of them; a graph that is compiled cannot look how many there are
        most = valid.shape[1] if torch.compiler.is_compiling() else max(1, int(valid.sum(1).max()))
    source, _ = first_valid(valid, most)
    # padding begins behind the last that its document sees, so that bounds still do not fall along the row
    first = torch.where(layout.is_item, first, first + gone)
    return Seen(source, rank.gather(1, source), first.to(torch.int32), torch.where(layout.is_item, gone, 0))


def join_heads(near: Heads, far: Heads | None) -> Heads:
    """The window's result and that of the kept tokens as one; with its lse for softmax."""
    if far is None:
        return near
    if isinstance(near, Tensor):
        assert isinstance(far, Tensor)
        return near + far
    (output, lse), (other, other_lse) = near, far
    share = torch.sigmoid(lse - other_lse).unsqueeze(-1).to(output.dtype)
    return share * output + (1 - share) * other, torch.logaddexp(lse, other_lse)
