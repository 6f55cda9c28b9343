"""Blockwise parallel layers (arXiv 2305.19370): a layer goes over its rows block by block, attention, residual
connections, norms and feed-forward of a block before the next begins.

Of a layer its input alone is held. Backward, from the last block to the first, a block's older keys and values come
again, then everything else of it, once; its gradient of the older ones waits until their own block is reached.
Nothing as long as the rows is ever as wide as the feed-forward, nor are there scores of all pairs.
Legend: B rows, T tokens, M width, K key/value heads, D head size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.modules.dropout import _DropoutNd

from swat_lm.layers.attention import AttentionLayer
from swat_lm.layers.base import NOTHING, Layer, Output, Past
from swat_lm.layers.chunk import Chunk
from swat_lm.layers.per_head import SETTINGS as PER_HEAD
from swat_lm.layers.window_attention import WindowAttention
from swat_lm.model.execution.base import Execution
from swat_lm.model.execution.older import Older
from swat_lm.model.execution.recomputing import Randomness, autocast_as_now
from swat_lm.model.execution.unread import unread
from swat_lm.validation import number, settings

__all__ = ["BlockSettings", "Blockwise"]


@settings
class BlockSettings:
    """What may be set of blockwise layers."""

    block_size: int = number(1024, at_least=1)
    """Tokens of a row that go through a layer at once."""
    key_block_size: int = number(1024, at_least=1)
    """Keys that attention without a window takes at once."""


class Blockwise(Execution):
    """Each layer block by block; of each its input is held."""

    name = "blockwise"
    Settings = BlockSettings

    def refuses(self, layers: Sequence[Layer]) -> str | None:
        """Anything but attention that looks back, first tokens beside a window, what layers share, and what full
        attention over blocks of keys has no gradient for."""
        for index, layer in enumerate(layers):
            where = f"layer {index} ({layer.name})"
            if not isinstance(layer, AttentionLayer) or layer.name != AttentionLayer.name:
                return f"{where} is no layer of the kind attention: take checkpoint"
            attention = attention_of(layer)
            settings = attention.settings
            if attention.first_tokens is not None:
                return f"{where} keeps first tokens beside its window: take checkpoint"
            if settings.bidirectional:
                return f"{where} looks both ways, and blocks follow one another: take checkpoint"
            if settings.relative_bias == "shared":
                return (
                    f"{where} shares its relative bias with others, so that its gradient is no layer's own: set "
                    "relative_bias: own, or take checkpoint"
                )
            learned = learned_of_scores(attention)
            if settings.sliding_window is None and learned:
                return (
                    f"{where} has {learned} and no window, and full attention over blocks of keys gives them no "
                    f"gradient: give it a sliding_window, set {learned}: false, or take checkpoint"
                )
        return None

    def enter(self, layers: Sequence[Layer]) -> None:
        """Put a scan over blocks in the place of each layer's pass over whole rows."""
        for layer in layers:
            # where Hugging Face's base class asks for it, inside the hooks of whoever shards weights
            layer._gradient_checkpointing_func = partial(run_blocks, layer, self.settings)  # type: ignore[assignment]
            layer.gradient_checkpointing = True
            # which asks in training alone
            layer.forward = partial(evaluate_blocks, layer, self.settings)

    def leave(self, layers: Sequence[Layer]) -> None:
        """Let layers run as they are."""
        for layer in layers:
            layer.gradient_checkpointing = False
            del layer._gradient_checkpointing_func, layer.forward


def attention_of(layer: Layer) -> WindowAttention:
    """The mixer of such a layer."""
    assert isinstance(layer, AttentionLayer)
    assert isinstance(layer.self_attn, WindowAttention)
    return layer.self_attn


def learned_of_scores(attention: WindowAttention) -> str | None:
    """The setting by which it learns slopes or a bias of its scores; None where it learns neither."""
    for name in ("slopes", "score_bias"):
        parameter = getattr(attention, name)
        if parameter is not None and parameter.requires_grad:
            return PER_HEAD[name]
    return None


def refuse_in_training(layer: Layer, chunk: Chunk) -> None:
    """Raise ValueError for what would have no gradient or a wrong one in this pass; the message names it."""
    # keys and values come again outside of the blocks, where the numbers that a block drew are not known
    for name, module in layer.named_modules():
        if isinstance(module, _DropoutNd) and module.training and module.p > 0:
            raise ValueError(
                f"execution: blockwise computes keys and values twice, and {name} of a layer drops out with p="
                f"{module.p}, each time otherwise: set it to 0 (lora_dropout of adapters), or model.set_execution("
                "'checkpoint') or 'chunks', which draw again what they drew"
            )
    attention = attention_of(layer)
    learned = learned_of_scores(attention)
    if learned and attention.window_in(chunk) is None:
        raise ValueError(
            f"execution: blockwise has no gradient for {learned} without a window, and layer {attention.index} has "
            "none in this step: draw a window for it, or model.set_execution('checkpoint')"
        )


def run_blocks(
    layer: Layer,
    settings: BlockSettings,
    forward: Callable[..., Output],
    hidden: Tensor,
    chunk: Chunk,
    past: Past | None = None,
) -> Output:
    """One layer over `[B, T, M]`, in the place of its `forward`. Raises ValueError for a past, and for dropout."""
    if past is not None:
        raise ValueError(
            "execution: blockwise runs whole rows in training, without a cache or a carry: pass none, or "
            "model.set_execution('plain')"
        )
    if torch.is_grad_enabled():
        refuse_in_training(layer, chunk)
    run = BlockedLayer(layer, settings, forward, hidden, chunk)
    if not torch.is_grad_enabled():
        return Output(run.forward(hidden))
    return Output(_Blocked.apply(run, hidden, *run.parameters))


def evaluate_blocks(
    layer: Layer, settings: BlockSettings, hidden: Tensor, chunk: Chunk, past: Past | None = None
) -> Output:
    """As `run_blocks` for held-out rows; passes in training, with a past or in both directions go on as ever."""
    forward = partial(type(layer).forward, layer)
    if (
        layer.training
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or past is not None
        or chunk.last is not None
        or hidden.shape[1] <= settings.block_size
        # blocks of keys do not take what is learned of scores
        or (learned_of_scores(attention_of(layer)) and attention_of(layer).window_in(chunk) is None)
    ):
        return forward(hidden, chunk, past)
    return Output(BlockedLayer(layer, settings, forward, hidden, chunk).forward(hidden))


class BlockPast:
    """What attention of one block finds of the blocks before it; its own keys and values are noted."""

    def __init__(self, before: Mapping[str, Tensor]) -> None:
        """`before`: keys and values `[B, P, K, D]`; empty in the first block."""
        self.before = before
        self.own: dict[str, Tensor] = {}
        self.seen: dict[str, Tensor] = {}
        """Those before and its own."""

    def extend(self, **new: Tensor) -> tuple[dict[str, Tensor], int]:
        """Those before and the block's own."""
        self.own = self.seen = new
        if not self.before:
            return new, 0
        before, self.before = self.before, {}
        self.seen = {name: torch.cat((before[name], tensor), dim=1) for name, tensor in new.items()}
        return self.seen, before["key"].shape[1]

    def after(self) -> "BlockPast":
        """Itself: the scan knows what comes next."""
        return self

    def fold(self, name: str, decay: Tensor, value: Tensor) -> Tensor:
        """Refused beforehand."""
        raise AssertionError(f"blocks keep no summary {name}")

    def merge(self, value: Mapping[str, Tensor], join: Callable[..., dict[str, Tensor]]) -> dict[str, Tensor]:
        """Refused beforehand."""
        raise AssertionError(f"blocks keep no summaries {sorted(value)}")

    def tensors(self) -> tuple[Tensor, ...]:
        """What stands before the block."""
        return tuple(self.before.values())


class BlockedLayer:
    """One layer's pass over its rows, forward and then backward."""

    def __init__(
        self, layer: Layer, settings: BlockSettings, forward: Callable[..., Output], hidden: Tensor, chunk: Chunk
    ) -> None:
        if chunk.last is not None:
            raise ValueError("execution: blockwise reads rows in one direction: model.set_execution('checkpoint')")
        self.layer, self.run_layer = layer, forward
        self.chunk, self.size = chunk, settings.block_size
        num_tokens, size = hidden.shape[1], settings.block_size
        self.spans = [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]
        # one for all layers, which share what is formed of positions
        self.parts = chunk._once(("blocks", size, settings.key_block_size), lambda: self._cut(chunk, settings))
        self.window = attention_of(layer).window_in(chunk)
        self.parameters = [each for each in layer.parameters() if each.requires_grad]
        self.autocast = autocast_as_now(hidden.device.type)
        self.randomness = Randomness(hidden.device)

    def _cut(self, chunk: Chunk, settings: BlockSettings) -> list[Chunk]:
        parts = [chunk.part(span.start, span.stop) for span in self.spans]
        for part in parts:
            part.key_block = settings.key_block_size
        return parts

    def first_before(self, span: slice) -> int:
        """The first token before a block whose keys and values it may see."""
        return 0 if self.window is None else max(0, span.start - self.window + 1)

    @torch.no_grad()
    def forward(self, hidden: Tensor) -> Tensor:
        """The layer's output `[B, T, M]`."""
        result, before, first = None, {}, 0
        for index, span in enumerate(self.spans):
            self.randomness.note()
            # nobody else holds them while the feed-forward runs
            past, before = BlockPast(before), {}
            with self.autocast():
                block, _, said = self.run_layer(hidden[:, span], self.parts[index], past)
            assert said is NOTHING, "a layer of attention says nothing beside its output"
            if result is None:
                result = block.new_empty(*hidden.shape[:2], block.shape[-1])
            result[:, span] = block
            if index < len(self.spans) - 1:
                # what the next block may see
                begin, first = first, self.first_before(self.spans[index + 1])
                seen = past.seen if first < span.stop else {}
                before = {name: tensor[:, first - begin :] for name, tensor in seen.items()}
        assert result is not None, "a row has tokens"
        return result

    def kept_again(self, hidden: Tensor, start: int, stop: int) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """Keys and values of these tokens, in pieces of at most a block."""
        for begin in range(start, stop, self.size):
            end = min(begin + self.size, stop)
            index = begin // self.size
            if slice(begin, end) == self.spans[index]:
                part = self.parts[index]
            else:
                part = self.chunk._once(("part", begin, end), partial(self.chunk.part, begin, end))
            with torch.no_grad(), self.autocast():
                items = self.layer.kept_items(hidden[:, begin:end], part)  # type: ignore[operator]
            yield slice(begin, end), items

    def backward(self, hidden: Tensor, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """From the gradient of the output to those of `hidden` and of `parameters`, in order."""
        older = Older(partial(self.kept_again, hidden), hidden.shape[1])
        of_hidden = torch.empty_like(hidden)
        totals: list[Tensor | None] = [None] * len(self.parameters)
        for index in reversed(range(len(self.spans))):
            span = self.spans[index]
            own = hidden[:, span].detach().requires_grad_()
            of_own = older.pass_by(span.start, self.first_before(span))
            before = {name: each.detach().requires_grad_() for name, each in older.held.items()}
            past = BlockPast(before)
            with self.randomness.again(index), torch.enable_grad(), self.autocast(), unread(self.layer):
                block = self.run_layer(own, self.parts[index], past).hidden
            roots, given = [block], [gradient[:, span]]
            for name, waited in of_own.items():
                roots.append(past.own[name])
                given.append(waited.to(past.own[name].dtype))
            leaves = [own, *before.values(), *self.parameters]
            of_hidden[:, span], *found = torch.autograd.grad(roots, leaves, given, allow_unused=True)
            older.add(found[: len(before)])
            # as long as rows are, so not to be held until the next are there
            found = found[len(before) :]
            for place, part in enumerate(found):
                if part is not None:
                    total = totals[place]
                    # of its own: what two weights are given may be one tensor
                    totals[place] = part.clone() if total is None else total.add_(part)
        return of_hidden, *totals


class _Blocked(torch.autograd.Function):
    """A layer as one step of autograd that saves its input."""

    @staticmethod
    def forward(ctx: Any, run: BlockedLayer, hidden: Tensor, *parameters: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(hidden, *parameters)
        return run.forward(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, *_ = ctx.saved_tensors
        return None, *ctx.run.backward(hidden, gradients[0])
