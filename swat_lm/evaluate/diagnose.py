"""What the attention of a trained model does: sinks, saturated weights, output norms and variance (Figure 3 of SWAT).

Weights are seen layer by layer while a stream is read in one pass, and only their statistics are kept. Of our models
they are formed anew from queries and keys by the definition; other models are asked for their eager attention.
Legend: T tokens, H heads, L layers, M model width, W window.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from swat_lm.evaluate.figures import JsonRecord, write_figures
from swat_lm.evaluate.limits import position_limit
from swat_lm.evaluate.streaming_model import evaluating
from swat_lm.evaluate.windows import layer_windows
from swat_lm.layers import WindowAttention
from swat_lm.layers.chunk import Chunk
from swat_lm.layers.selective_attention import SelectiveAttention
from swat_lm.ops.reference import distances
from swat_lm.ops.rotary import apply_rotary

__all__ = ["Diagnosis", "LayerWeights", "attention_weights", "diagnose"]

NEAR = 0.01
"""A weight is saturated below this or above 1 minus this."""
MIXER_NAMES = ("self_attn", "attn", "attention", "self_attention", "linear_attn", "mixer", "temporal_block")


@dataclass(frozen=True)
class LayerWeights:
    """Statistics of one layer's attention weights, by head, over all queries but the first and all streams."""

    score_function: str
    """`softmax` or `sigmoid`."""
    first_token_mass: tuple[float, ...]
    """Mean weight of the stream's first token, over the queries that see it: large where it serves as a sink."""
    first_token_uniform: float
    """What it would be if every query weighed all that it sees alike, with a sum of 1."""
    row_sum: tuple[float, ...]
    """Mean sum of a query's weights; 1 for softmax."""
    near_zero: tuple[float, ...]
    """Share of visible weights below 0.01."""
    near_one: tuple[float, ...]
    """Share of visible weights above 0.99."""
    mean_distance: tuple[float, ...]
    """Distance in tokens, before or after, averaged with the weights."""
    slopes: tuple[float, ...] | None
    """Slope of each head, where there are slopes."""


@dataclass(frozen=True)
class LayerGate:
    """What the gate of a layer that chooses its queries does, over all tokens and streams."""

    selected: float
    """Share of the tokens that look back; its weights are shown as if all did."""
    capacity: float
    """What its budget asks for."""
    share: float
    """Mean share that attention gets of a token that looks back (alpha); 0 where none does."""


@dataclass(frozen=True)
class Diagnosis(JsonRecord):
    """One model on some streams, all read from their first token."""

    num_streams: int
    length: int
    weights: tuple[LayerWeights | None, ...]
    """Per layer; None for a layer without attention weights (recurrent, or computed without them)."""
    output_norm: tuple[tuple[float, ...], ...]
    """`[L][T]`: mean norm of the mixer's output at each position."""
    hidden_variance: tuple[tuple[float, ...], ...]
    """`[L + 1][T]`: mean variance over the channels of the hidden state before layer 0, 1, ... and after the last."""
    gates: tuple[LayerGate | None, ...]
    """Per layer; None for a layer whose queries are not chosen."""

    @property
    def has_weights(self) -> bool:
        """Whether any layer showed its weights."""
        return any(layer is not None for layer in self.weights)

    def to_json(self) -> str:
        """Everything as one JSON object, in one line."""
        return write_figures(asdict(self), indent=None)


def diagnose(
    model: PreTrainedModel,
    streams: Sequence[np.ndarray],
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> Diagnosis:
    """Read each stream in one pass and average what its layers do; memory is `[H, T, T]` of one layer at a time.

    Raises:
        ValueError: no streams, of unequal lengths, shorter than two tokens or longer than the model's positions, or a
            model whose layers cannot be told apart.
    """
    sizes = {len(stream) for stream in streams}
    if len(sizes) != 1 or min(sizes) < 2:
        raise ValueError(f"streams: expected at least one, of equal length and at least 2 tokens; got {sorted(sizes)}")
    length, limit = min(sizes), position_limit(model)
    if limit is not None and length > limit:
        raise ValueError(f"{type(model).__name__} has no position beyond token {limit}: ask for --length {limit}")
    layers = decoder_layers(model)
    mixers = [mixer_of(layer) for layer in layers]
    reaches = layer_windows(model.config) or [None] * len(mixers)
    # both ways a window reaches farther than it is wide
    windows = [
        mixer.settings.sliding_window if isinstance(mixer, WindowAttention) else reach
        for mixer, reach in zip(mixers, reaches, strict=True)
    ]
    observer = Observer(layers, mixers, windows, length)
    with evaluating(model), eager_attention(model), observer.watching(), torch.inference_mode():
        for number, stream in enumerate(streams, start=1):
            tokens = torch.from_numpy(np.asarray(stream, dtype=np.int64))[None].to(model.device)
            model(input_ids=tokens, use_cache=False, logits_to_keep=1)
            if on_progress:
                on_progress(number, len(streams))
    return observer.diagnosis(len(streams))


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers, in order; raises ValueError where no list of modules is as long as the configuration says."""
    count = cast(Any, model.config.get_text_config()).num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise ValueError(f"{type(model).__name__}: found no list of its {count} layers, so they cannot be observed")


def mixer_of(layer: nn.Module) -> nn.Module:
    """What mixes tokens in a layer; raises ValueError where it has none of the usual names."""
    for name in MIXER_NAMES:
        found = getattr(layer, name, None)
        if isinstance(found, nn.Module):
            return found
    raise ValueError(f"{type(layer).__name__}: expected its mixer under one of {', '.join(MIXER_NAMES)}")


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Attention that forms its weights, where the model has a choice; as it was before at the end."""
    config = cast(Any, model.config)
    before = config._attn_implementation
    if before in (None, "eager") or any(isinstance(module, WindowAttention) for module in model.modules()):
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def attention_weights(attention: WindowAttention, hidden: Tensor, chunk: Chunk) -> Tensor:
    """The weights `[B, H, T, T]` of one of our layers for `[B, T, M]` without a past; SWAT, Eq. 5, in float32.

    With a learned sink its share is missing from the rows' sums.
    """
    settings, count = attention.settings, hidden.shape[1]
    query, key, _ = attention.project(hidden)
    both_ways = settings.bidirectional
    distance, visible = pairs_of(len(hidden), count, settings.sliding_window, both_ways, hidden.device)
    own = torch.arange(count, device=hidden.device)
    scores = products(attention, query, key, chunk.positions, chunk.positions)
    if settings.sinks:
        window, kept = cast(int, settings.sliding_window), own[: settings.sinks]
        # of the first tokens those that have left the window, `[T]`, and which pairs that makes
        gone = (own - window + 1).clamp(0, settings.sinks)
        seen = kept < gone[:, None]
        places = [own, kept]
        if settings.sink_positions == "cache":
            places = [(window - 1 + gone).clamp(min=0), kept]
            distance[..., : len(kept)] = torch.where(seen, places[0][:, None] - kept, distance[..., : len(kept)])
        far = products(attention, query, key[:, : len(kept)], *(place[None] for place in places))
        scores[..., : len(kept)] = torch.where(seen, far, scores[..., : len(kept)])
        visible[..., : len(kept)] |= seen
    if settings.attn_logit_softcapping is not None:
        cap = settings.attn_logit_softcapping
        scores = cap * torch.tanh(scores / cap)
    slopes = attention.slopes_on(hidden.device)
    if slopes is not None:
        scores = scores + slopes.float()[:, None, None] * distance.float()[:, None]
    relative = attention.relative_bias_in(settings.sliding_window, chunk)
    if relative is not None:
        # both ways they begin with the farthest key after the query
        place = distance + cast(int, settings.sliding_window) - 1 if both_ways else distance
        scores = scores + relative.float()[:, place.clamp(0, relative.shape[1] - 1)].transpose(0, 1)
    bias = attention.bias()
    scores = scores + (bias.float()[:, None, None] if isinstance(bias, Tensor) else bias)
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    if settings.score_function == "sigmoid":
        return torch.sigmoid(scores)
    if attention.sink is None:
        return torch.softmax(scores, dim=-1)
    sink = attention.sink.float()[:, None, None].expand(*scores.shape[:3], 1)
    return torch.softmax(torch.cat((scores, sink), dim=-1), dim=-1)[..., :-1]


def pairs_of(
    batch: int, count: int, window: int | None, both_ways: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The distance of every pair of tokens, int64 `[B, T, T]`, below 0 for later keys; and who sees whom."""
    distance, visible = distances(batch, count, count, None, None, window, device)
    return distance, visible | visible.transpose(1, 2) if both_ways else visible


def products(attention: WindowAttention, query: Tensor, key: Tensor, *places: Tensor) -> Tensor:
    """Scaled products `[B, H, T, S]` in float32 of queries and keys, rotated to places `[1, T]` and `[1, S]`."""
    if attention.rotary is not None:
        query, key = (
            apply_rotary(x, *attention.rotary.angles(own, x.dtype)) for x, own in zip((query, key), places, strict=True)
        )
    key = key.repeat_interleave(query.shape[2] // key.shape[2], dim=2)
    return torch.einsum("bthd,bshd->bhts", query.float(), key.float()) * attention.scale


class Observer:
    """Hooks on layers and mixers that add up what the passes show."""

    def __init__(
        self,
        layers: Sequence[nn.Module],
        mixers: Sequence[nn.Module],
        windows: Sequence[int | None] | None,
        length: int,
    ) -> None:
        count = len(layers)
        self.layers, self.mixers, self.length = layers, mixers, length
        self.windows = windows or [None] * count
        self.norms = torch.zeros(count, length, dtype=torch.float64)
        self.variances = torch.zeros(count + 1, length, dtype=torch.float64)
        self.sums: dict[int, Tensor] = {}
        # by layer: tokens that look back, and the sum of their shares
        self.gates: dict[int, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooked; the model is as it was at the end."""
        with ExitStack() as stack:
            for index, (layer, mixer) in enumerate(zip(self.layers, self.mixers, strict=True)):
                # a handle is a context that ends by removing its hook
                before, after = partial(self.before_layer, index), partial(self.after_mixer, index)
                stack.enter_context(layer.register_forward_pre_hook(before, with_kwargs=True))
                stack.enter_context(mixer.register_forward_hook(after, with_kwargs=True))
            stack.enter_context(self.layers[-1].register_forward_hook(self.after_last_layer))
            yield

    def before_layer(self, index: int, _: nn.Module, arguments: tuple, named: dict[str, Any]) -> None:
        """The residual stream that enters a layer."""
        hidden = arguments[0] if arguments else named["hidden_states"]
        self.variances[index] += hidden[0].double().var(dim=-1, correction=0).cpu()

    def after_last_layer(self, _: nn.Module, arguments: tuple, output: Any) -> None:
        """The residual stream that leaves the last layer."""
        hidden = output[0] if isinstance(output, tuple) else output
        self.variances[-1] += hidden[0].double().var(dim=-1, correction=0).cpu()

    def after_mixer(self, index: int, mixer: nn.Module, arguments: tuple, _: dict[str, Any], output: Any) -> None:
        """Norms of the output, and the weights where there are any."""
        mixed, *rest = output if isinstance(output, tuple) else (output,)
        self.norms[index] += mixed[0].double().norm(dim=-1).cpu()
        weights = rest[0] if rest else None
        if isinstance(mixer, WindowAttention):
            weights = attention_weights(mixer, arguments[0], arguments[1])
        if isinstance(mixer, SelectiveAttention):
            shares = output[1].double()
            found = torch.stack(((shares > 0).sum(), shares.sum())).cpu()
            self.gates[index] = self.gates.get(index, 0) + found
        if isinstance(weights, Tensor) and weights.dim() == 4 and weights.shape[-2:] == (self.length, self.length):
            found = weight_sums(weights[0].float(), self.windows[index], kept_by(mixer), looks_both_ways(mixer))
            self.sums[index] = self.sums.get(index, 0) + found

    def diagnosis(self, num_streams: int) -> Diagnosis:
        """Means over the streams."""
        weights = tuple(
            layer_weights(self.sums[index] / num_streams, mixer, window, self.length) if index in self.sums else None
            for index, (mixer, window) in enumerate(zip(self.mixers, self.windows, strict=True))
        )
        norms, variances = self.norms / num_streams, self.variances / num_streams
        return Diagnosis(
            num_streams, self.length, weights, tuple(map(tuple, norms.tolist())), tuple(map(tuple, variances.tolist())),
            tuple(self.gate(index, mixer, num_streams) for index, mixer in enumerate(self.mixers)),
        )  # fmt: skip

    def gate(self, index: int, mixer: nn.Module, num_streams: int) -> LayerGate | None:
        """What the gate of one layer did."""
        if not isinstance(mixer, SelectiveAttention):
            return None
        chosen, shares = self.gates[index].tolist()
        return LayerGate(chosen / (num_streams * self.length), mixer.taipan.capacity, shares / max(chosen, 1.0))


def kept_by(mixer: nn.Module) -> int:
    """First tokens that it sees beside its window."""
    return mixer.settings.sinks if isinstance(mixer, WindowAttention) else 0


def looks_both_ways(mixer: nn.Module) -> bool:
    """Whether its tokens see what comes after them."""
    return isinstance(mixer, WindowAttention) and mixer.settings.bidirectional


def weight_sums(weights: Tensor, window: int | None, sinks: int = 0, both_ways: bool = False) -> Tensor:
    """Of weights `[H, T, T]`: first token, row sums, near 0, near 1, distance times weight; float64 `[5, H]` means.

    Distances are those in the text, of first tokens that are kept beside the window too; of later keys as of earlier.
    """
    count = weights.shape[-1]
    distance, visible = (matrix[0] for matrix in pairs_of(1, count, window, both_ways, weights.device))
    visible[:, :sinks] |= distance[:, :sinks] >= 0
    visible[0] = False
    seeing = visible[:, 0]
    rows = (weights * visible).double()
    pairs, sums = visible.sum(), rows.sum(dim=(1, 2))
    found = (
        rows[:, :, 0].sum(dim=1) / seeing.sum(),
        sums / (count - 1),
        ((weights < NEAR) & visible).sum(dim=(1, 2)).double() / pairs,
        ((weights > 1 - NEAR) & visible).sum(dim=(1, 2)).double() / pairs,
        (rows * distance.abs()).sum(dim=(1, 2)) / sums.clamp(min=1e-30),
    )
    return torch.stack(found).cpu()


def layer_weights(means: Tensor, mixer: nn.Module, window: int | None, length: int) -> LayerWeights:
    """The statistics of one layer."""
    ours = isinstance(mixer, WindowAttention)
    slopes = mixer.slopes_on(mixer.q_proj.weight.device) if ours else None
    # query t sees t + 1 keys until the window is full, and the first token only that long, unless it is kept
    kept = kept_by(mixer)
    most = (window or length) + kept
    seen = [min(keys, most) for keys in range(2, 1 + (length if kept else min(length, most)))]
    if looks_both_ways(mixer):
        # and as many keys after it as there are
        seen = [keys + min(length - keys, most - 1) for keys in seen]
    first, row_sum, near_zero, near_one, distance = (tuple(row) for row in means.tolist())
    return LayerWeights(
        mixer.settings.score_function if ours else "softmax",
        first,
        sum(1 / keys for keys in seen) / max(len(seen), 1),
        row_sum,
        near_zero,
        near_one,
        distance,
        None if slopes is None else tuple(slopes.tolist()),
    )
