"""Reverse chunks: exact gradients of whole rows while only what layers hand from chunk to chunk is held.

Forward, a row goes through all layers chunk by chunk, and of each chunk its carry is kept: W - 1 keys and values of a
window, a state of a recurrence. Backward, from the last chunk to the first, each is computed again behind its carry,
and the gradient of that carry goes to the chunk before. Nothing is cut off: it is the gradient of one pass.
Legend: B rows, T tokens, M width, V vocabulary, W window.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from swat_lm.layers.base import Layer
from swat_lm.model.execution.base import Execution
from swat_lm.model.execution.carries import Carries, CarriesInMemory, CarriesOnDisk
from swat_lm.model.execution.recomputing import Randomness, autocast_as_now
from swat_lm.model.execution.said import Said
from swat_lm.model.inputs import documents_from_lengths, draws_noise, plan_chunk, refuse_unknown, row_seeds
from swat_lm.model.loss import IGNORE
from swat_lm.model.outputs import SwatCausalLMOutput
from swat_lm.model.pasts import Carry, CarryPast
from swat_lm.validation import number, settings

if TYPE_CHECKING:
    from swat_lm.model.modeling import SwatForCausalLM

__all__ = ["ChunkSettings", "ReverseChunks"]


@settings
class ChunkSettings:
    """What may be set of reverse chunks."""

    chunk_size: int = number(2048, at_least=1)
    """Tokens of a row that are computed at once; at least the widest window."""
    carries: Literal["memory", "disk"] = "memory"
    """Where carries wait for the backward pass: in main memory, or in a file without a name in `folder`."""
    folder: str | None = None
    """For carries on disk; null: the folder of the run, outside of a run the system's for temporary files."""

    def __post_init__(self) -> None:
        if self.folder is not None and self.carries != "disk":
            raise ValueError(f"folder: carries in {self.carries} need none; set carries: disk, or leave it out")


class ReverseChunks(Execution):
    """Chunk by chunk forward, keeping carries alone; chunk by chunk backward, recomputing each."""

    name = "chunks"
    Settings = ChunkSettings
    takes_whole_passes = True

    def __init__(self, settings: ChunkSettings | None = None) -> None:
        super().__init__(settings)
        self.before_backward: Callable[[bool], None] | None = None
        """Called before a chunk goes backward, with whether it is the last to do so. Set where weights are sharded:
        gradients then go straight to the parameters, from passes of the model as whoever shards them sees them."""

    def refuses(self, layers: Sequence[Layer]) -> str | None:
        """A layer that keeps everything, or shortens; a chunk below the widest window."""
        for index, layer in enumerate(layers):
            for kept in layer.state_spec():
                if kept.kind == "growing":
                    return (
                        f"layer {index} ({layer.name}) keeps the {kept.name} of all tokens before it, so what chunks "
                        "hand on would grow with the row: give it a sliding_window, or take blockwise or checkpoint"
                    )
                if kept.items is not None and kept.items > self.settings.chunk_size:
                    return (
                        f"chunk_size: {self.settings.chunk_size} is below the window of layer {index} ({layer.name}), "
                        f"{kept.items}, so carries would hold more than chunks: take at least {kept.items}"
                    )
            if layer.judges_rows:
                return (
                    f"layer {index} ({layer.name}) has a loss of each row as a whole, to which chunks do not add up: "
                    f"set {layer.judges_rows}: 0, or take checkpoint"
                )
            if layer.refuses_past():
                return f"layer {index} ({layer.name}): {layer.refuses_past()}"
            if layer.shortens:
                return f"layer {index} ({layer.name}) shortens rows, which chunks cannot follow: take checkpoint"
        return None

    def takes(self, model: "SwatForCausalLM", targets: Tensor | None, return_logits: bool | None) -> bool:
        """Whether a pass is one from inputs to loss.

        Raises ValueError for a pass in training from which something else is asked.
        """
        if model.training and torch.is_grad_enabled() and (targets is None or return_logits):
            raise ValueError(
                "execution: chunks give the loss and its gradients alone, since no row is ever there as a whole: pass "
                "labels and leave return_logits out, or model.set_execution('plain')"
            )
        return targets is not None and (return_logits is False or (return_logits is None and model.training))

    def loss(
        self, model: "SwatForCausalLM", targets: Tensor, num_items: Tensor | float | None, given: dict[str, Any]
    ) -> SwatCausalLMOutput:
        """The loss of whole rows, of targets `[B, T]`, and what layers say beside.

        Args:
            num_items: what the summed loss is divided by; the targets that count when None.
            given: what `SwatModel.forward` takes, but for a cache, a carry and `use_cache`.
        """
        run = ChunkedPass(model, self, targets, num_items, given)
        if not torch.is_grad_enabled():
            losses = run.forward()
        elif self.before_backward is None:
            if hasattr(model, "set_requires_gradient_sync"):
                raise ValueError(
                    "execution: chunks train a model under fully_shard by `swat-lm train` alone, which tells it when "
                    "gradients are to be exchanged: set_execution('checkpoint')"
                )
            losses = _Reversed.apply(run, run.embedded, *run.parameters.values())
        else:
            # what makes the result one that is asked for its gradient
            losses = _Reversed.apply(run, targets.new_zeros((), dtype=torch.float32).requires_grad_())
        return SwatCausalLMOutput(loss=losses[0], auxiliary=run.said.told(losses[1:]))  # type: ignore[arg-type]


class ChunkedPass:
    """One pass over whole rows, forward and then backward."""

    def __init__(
        self,
        model: "SwatForCausalLM",
        execution: ReverseChunks,
        targets: Tensor,
        num_items: Tensor | float | None,
        given: dict[str, Any],
    ) -> None:
        given = dict(given)
        self.model, self.execution, self.targets = model, execution, targets
        self.ids, self.embedded = given.pop("input_ids"), given.pop("inputs_embeds")
        self.windows, seed = given.pop("windows", None), given.pop("noise_seed", None)
        if given.pop("past_key_values") is not None:
            raise ValueError("past_key_values: chunks keep their own carries; pass none")
        if given.get("output_hidden_states"):
            raise ValueError("output_hidden_states: chunks never hold them; model.set_execution('plain')")
        if (self.ids is None) == (self.embedded is None):
            raise ValueError("input_ids: give exactly one of input_ids and inputs_embeds")
        rows = self.ids if self.embedded is None else self.embedded
        (batch, num_tokens), self.device = rows.shape[:2], rows.device
        # drawn once, so that all chunks of a row and their recomputation draw alike
        self.seed = row_seeds(seed, batch, self.device) if draws_noise(model.model.stack, model.training) else None
        lengths, documents = given.pop("cu_seq_lens_q", None), given.pop("document_ids")
        if lengths is not None and documents is None:
            documents = documents_from_lengths(lengths, batch, num_tokens)
        mask, positions = given.pop("attention_mask"), given.pop("position_ids")
        refuse_unknown(given, type(model).__name__, model.config)
        self.chunk = plan_chunk(batch, num_tokens, 0, self.device, mask, positions, documents)
        size = execution.settings.chunk_size
        self.spans = [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]
        self.divisor = (targets != IGNORE).sum() if num_items is None else num_items
        self.parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self.autocast = autocast_as_now(self.device.type)
        self.randomness = Randomness(self.device)
        self.carries: Carries | None = None
        self.said = Said()

    def forward(self) -> tuple[Tensor, ...]:
        """The loss, and the auxiliary losses of layers in the order of `Said`."""
        with torch.no_grad(), self.autocast():
            return self._forward()

    def keep_carries(self) -> None:
        """Keep carries in the pass that follows. Raises OSError where there is no place for them."""
        chosen = self.execution.settings
        count = len(self.spans) - 1
        self.carries = CarriesOnDisk(chosen.folder, count) if chosen.carries == "disk" else CarriesInMemory()

    def _forward(self) -> tuple[Tensor, ...]:
        pasts, total = self.model.init_carry().pasts, None
        for index, span in enumerate(self.spans):
            if self.carries is not None:
                self.randomness.note()
            outputs = self.pass_over(self.model, span, pasts)
            total = outputs.loss if total is None else total + outputs.loss
            self.said.add(outputs.auxiliary, lambda span=span: self.share_of(span))
            pasts = outputs.carry.pasts
            if self.carries is not None and index < len(self.spans) - 1:
                self.carries.put([past.kept for past in pasts])
        assert total is not None
        return total, *self.said.sums()

    def share_of(self, span: slice) -> Tensor | float:
        """The part of all tokens that are no padding which stands in a chunk."""
        real = self.chunk.real
        if real is None:
            return (span.stop - span.start) / self.targets.shape[1]
        return real[:, span].sum() / real.sum().clamp(min=1)

    def backward(self, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """From the gradients of what `forward` gave to those of embedded inputs and of `parameters`, in order."""
        if self.carries is None:
            raise RuntimeError("a pass over chunks goes backward once: its carries are gone; compute the loss again")
        direct = self.execution.before_backward is not None
        # of their own, so that gradients add up where nobody who watches the parameters counts them chunk by chunk
        own = {} if direct else {name: each.detach().requires_grad_() for name, each in self.parameters.items()}
        call = self.model if direct else lambda **inputs: functional_call(self.model, own, kwargs=inputs)
        of_inputs = None
        if self.embedded is not None and self.embedded.requires_grad and not direct:
            of_inputs = torch.empty_like(self.embedded)
        later: dict[tuple[int, str], Tensor] = {}
        for index in reversed(range(len(self.spans))):
            later = self._chunk_backward(index, call, gradients, later, of_inputs)
        self.carries.close()
        self.carries = None
        return of_inputs, *(each.grad for each in own.values())

    def _chunk_backward(
        self,
        index: int,
        call: Callable[..., SwatCausalLMOutput],
        gradients: Sequence[Tensor | None],
        later: dict[tuple[int, str], Tensor],
        of_inputs: Tensor | None,
    ) -> dict[tuple[int, str], Tensor]:
        """Compute one chunk again and go back through it; returns the gradients of the carry before it."""
        assert self.carries is not None
        pasts, leaves, span = self.model.init_carry().pasts, {}, self.spans[index]
        if index:
            kept = self.carries.take(index - 1, self.device)
            leaves = {
                (layer, name): tensor.requires_grad_()
                for layer, tensors in enumerate(kept)
                for name, tensor in tensors.items()
                if tensor.is_floating_point()
            }
            pasts = tuple(CarryPast(past.spec, tensors) for past, tensors in zip(pasts, kept, strict=True))
        if self.execution.before_backward is not None:
            self.execution.before_backward(index == 0)
        embedded = None if self.embedded is None else self.embedded[:, span].detach()
        if of_inputs is not None and embedded is not None:
            embedded.requires_grad_()
        with ExitStack() as stack:
            stack.enter_context(self.randomness.again(index))
            stack.enter_context(torch.enable_grad())
            with self.autocast():
                outputs = self.pass_over(call, span, pasts, embedded)
            handed_on = {
                (layer, name): tensor
                for layer, past in enumerate(outputs.carry.pasts)
                for name, tensor in past.kept.items()
            }
            pairs = list(zip((outputs.loss, *Said.losses_of(outputs.auxiliary)), gradients, strict=True))
            pairs += [(handed_on[key], gradient) for key, gradient in later.items()]
            pairs = [(root, gradient) for root, gradient in pairs if gradient is not None and root.requires_grad]
            if pairs:
                roots, given = zip(*pairs, strict=True)
                torch.autograd.backward(roots, given)
        if of_inputs is not None and embedded is not None:
            of_inputs[:, span] = 0 if embedded.grad is None else embedded.grad
        return {key: leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}

    def pass_over(
        self,
        call: Callable[..., SwatCausalLMOutput],
        span: slice,
        pasts: Sequence[CarryPast],
        embedded: Tensor | None = None,
    ) -> Any:
        """One chunk through the model behind its pasts."""
        if embedded is None and self.embedded is not None:
            embedded = self.embedded[:, span]
        planned = self.chunk.part(span.start, span.stop)
        return call(
            input_ids=None if self.ids is None else self.ids[:, span],
            inputs_embeds=embedded,
            shift_labels=self.targets[:, span],
            num_items_in_batch=self.divisor,
            carry=Carry("exact", tuple(pasts), span.start, planned=planned),
            windows=self.windows,
            noise_seed=self.seed,
            return_logits=False,
        )


class _Reversed(torch.autograd.Function):
    """A pass over chunks as one step of autograd."""

    @staticmethod
    def forward(ctx: Any, run: ChunkedPass, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        ctx.run = run
        # so that weights that changed before the backward pass are refused, as everywhere
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        run.keep_carries()
        return run.forward()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        return None, *ctx.run.backward(gradients)
