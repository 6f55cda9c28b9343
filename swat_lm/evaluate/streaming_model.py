"""Any causal language model as streams: chunks in, hidden states and losses out, the same whatever the chunks.

Ours go on from their constant state, others from the cache that they return; which models can do that is tried, not
assumed. Legend: B streams, T tokens of a chunk, M model width, V vocabulary.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from typing_extensions import override

from swat_lm.model.architectures import streaming_inputs
from swat_lm.model.loss import default_chunk
from swat_lm.model.modeling import SwatForCausalLM
from swat_lm.model.slots import Slots
from swat_lm.words import counted

__all__ = ["CachedStreamingModel", "StreamingModel", "SwatStreamingModel", "evaluating", "padded", "streaming_model"]

logger = logging.getLogger(__name__)

# tokens of the checks below: few, but three chunks of different sizes, and more than a short convolution sees
PROBE_CHUNKS = (7, 5, 12)
# far above rounding, far below what a forgotten past does to most tokens
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
TOLERANCE_IN_HALF = 0.05
LOGITS_AT_ONCE = 2**24
"""Elements of logits held where they cannot be formed some tokens at a time; in float32 64 MiB."""


class StreamingModel(ABC):
    """A model that reads B streams side by side. The caller sets `eval` mode and owns the device."""

    def __init__(self, model: PreTrainedModel, body: nn.Module, head: nn.Module | None) -> None:
        """`body` and `head` as `split_model` gives them: the head makes logits, None where the body does."""
        self.model, self.body, self.head = model, body, head
        self.vocab_size = int(cast(Any, model.get_input_embeddings()).weight.shape[0])

    @abstractmethod
    def start(self, batch_size: int) -> Any:
        """What B streams keep before their first token; raises ValueError for a model that cannot read in chunks."""

    @abstractmethod
    def extend(self, tokens: Tensor, state: Any) -> Tensor:
        """Read `[B, T]` tokens, changing the state in place; returns hidden states `[B, T, M]`, or logits."""

    @abstractmethod
    def state_bytes(self, state: Any) -> int:
        """Bytes that one stream keeps of its past."""

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states, `[..., M]` to `[..., V]`, in at least float32."""
        logits = hidden if self.head is None else apply_head(self.head, hidden)
        return logits if logits.dtype == torch.float64 else logits.float()

    @torch.inference_mode()
    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Loss of `targets` `[B, t]`, the tokens after the first t places of `hidden`: float32 `[B, t]` in nats."""
        pairs = self._parts(hidden, targets)
        parts = [F.cross_entropy(self.logits(part), target, reduction="none") for part, target in pairs]
        return torch.cat(parts).float().view(targets.shape)

    @torch.inference_mode()
    def hits(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Whether each target is the likeliest token, bool `[B, t]`."""
        parts = [self.logits(part).argmax(-1) == target for part, target in self._parts(hidden, targets)]
        return torch.cat(parts).view(targets.shape)

    def _parts(self, hidden: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
        size = default_chunk(self.vocab_size)
        states, wanted = hidden[:, : targets.shape[1]].flatten(0, 1), targets.flatten().to(hidden.device)
        return list(zip(states.split(size), wanted.split(size), strict=True))


class SwatStreamingModel(StreamingModel):
    """Reads with one of our models and its `Slots`."""

    def __init__(self, model: SwatForCausalLM) -> None:
        super().__init__(model, model.model, model.lm_head)

    @override
    def start(self, batch_size: int) -> Slots:
        return cast(SwatForCausalLM, self.model).init_state(batch_size)

    @override
    @torch.inference_mode()
    def extend(self, tokens: Tensor, state: Slots) -> Tensor:
        return cast(SwatForCausalLM, self.model).extend(tokens.to(self.model.device), state)

    @override
    def state_bytes(self, state: Slots) -> int:
        return state.num_bytes // state.batch_size


@dataclass
class CacheState:
    """The cache of a model of `transformers`, under the name by which it takes it back; none before the first token."""

    batch_size: int
    cache: dict[str, Any] = field(default_factory=dict)
    tokens_read: int = 0


class CachedStreamingModel(StreamingModel):
    """Reads with any other causal model and the cache that it makes itself.

    The first `start` reads a few tokens in one pass and in chunks and refuses a model for which they differ, such as
    transformers' Mamba (its first version), whose scan forgets the state between chunks.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        with evaluating(model):
            super().__init__(model, *split_model(model))
        self._is_proven = False

    @override
    def start(self, batch_size: int) -> CacheState:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        if not self._is_proven:
            with evaluating(self.model):
                self._prove()
        return CacheState(batch_size)

    @override
    @torch.inference_mode()
    def extend(self, tokens: Tensor, state: CacheState) -> Tensor:
        if len(tokens) != state.batch_size:
            raise ValueError(f"tokens: expected {counted(state.batch_size, 'stream')}, got {len(tokens)}")
        size = tokens.shape[1]
        if self.head is None:
            size = max(1, LOGITS_AT_ONCE // (self.vocab_size * len(tokens)))
        # smaller parts bound what a forward pass holds, not what is returned
        return torch.cat([self._read(part, state) for part in tokens.to(self.model.device).split(size, dim=1)], dim=1)

    def state_bytes(self, state: CacheState) -> int:
        """Bytes that one stream keeps of its past: every tensor of the cache."""
        found = {id(tensor): tensor.nbytes for tensor in tensors_of(state.cache, set())}
        return sum(found.values()) // state.batch_size

    def _read(self, tokens: Tensor, state: CacheState) -> Tensor:
        extra = streaming_inputs(self.model.config, state.tokens_read, tokens.shape[1], tokens.device)
        outputs = self.body(input_ids=tokens, use_cache=True, **state.cache, **extra)
        # state-space models of transformers call theirs otherwise
        name = "cache_params" if "cache_params" in outputs else "past_key_values"
        if outputs.get(name) is None:
            raise ValueError(f"{type(self.model).__name__} returns no cache: it cannot read a stream in chunks")
        state.cache = {name: outputs[name]}
        state.tokens_read += tokens.shape[1]
        return outputs.logits if self.head is None else outputs[0]

    @torch.inference_mode()
    def _prove(self) -> None:
        tokens = probe(self.model, self.vocab_size, sum(PROBE_CHUNKS))
        outputs = self.body(input_ids=tokens, use_cache=False)
        whole = self.logits(outputs.logits if self.head is None else outputs[0])
        name = type(self.model).__name__
        try:
            state = CacheState(len(tokens))
            parts = [self._read(part, state) for part in tokens.split(PROBE_CHUNKS, dim=1)]
        except (TypeError, RuntimeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{name} cannot read a stream in chunks, its cache does not serve that: {reason}"
            ) from error
        pieces = self.logits(torch.cat(parts, dim=1))
        later = slice(PROBE_CHUNKS[0], None)
        apart = ((pieces - whole)[:, later].norm(dim=-1) / whole[:, later].norm(dim=-1)).median().item()
        if not apart <= TOLERANCE.get(self.model.dtype, TOLERANCE_IN_HALF):
            raise ValueError(
                f"{name} gives other results in chunks than in one pass (logits differ by {100 * apart:.2g} %), so its "
                "loss would depend on the chunks: it cannot be read as a stream"
            )
        self._is_proven = True


def streaming_model(model: PreTrainedModel) -> StreamingModel:
    """This model as streams: ours by its state, any other by its cache."""
    return SwatStreamingModel(model) if isinstance(model, SwatForCausalLM) else CachedStreamingModel(model)


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """The model in evaluation mode; as it was before at the end."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.inference_mode()
def split_model(model: PreTrainedModel) -> tuple[nn.Module, nn.Module | None]:
    """Body and head, or the model and None where the logits are more than the head of the body's states."""
    body, head = getattr(model, model.base_model_prefix, None), model.get_output_embeddings()
    if isinstance(body, nn.Module) and isinstance(head, nn.Linear) and body is not model:
        vocab_size = int(cast(Any, model.get_input_embeddings()).weight.shape[0])
        tokens = probe(model, vocab_size, sum(PROBE_CHUNKS))
        states, whole = body(input_ids=tokens, use_cache=False)[0], model(input_ids=tokens, use_cache=False).logits
        # the same product, so equal up to the order of sums unless a cap or a scale comes in between
        if states.shape[-1] == head.in_features and torch.allclose(
            apply_head(head, states).float(), whole.float(), rtol=1e-3
        ):
            return body, head
    logger.info("%s: logits are formed for whole chunks, which costs memory", type(model).__name__)
    return model, None


def apply_head(head: nn.Module, states: Tensor) -> Tensor:
    """Logits of states, which some models keep in float32 beside weights in bfloat16."""
    weight = getattr(head, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        states = states.to(weight.dtype)
    return head(states)


def probe(model: PreTrainedModel, vocab_size: int, num_tokens: int) -> Tensor:
    """Two rows of tokens to try a model with, int64 `[2, T]`, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (2, num_tokens), generator=generator).to(model.device)


def tensors_of(thing: Any, seen: set[int]) -> list[Tensor]:
    """Every tensor with a dimension that a cache of any class holds."""
    if isinstance(thing, Tensor):
        return [thing] if thing.dim() else []
    if id(thing) in seen or isinstance(thing, (str, bytes, int, float, type(None), type, nn.Module, torch.dtype)):
        return []
    seen.add(id(thing))
    held = thing if isinstance(thing, (dict, list, tuple)) else getattr(thing, "__dict__", {})
    parts = held.values() if isinstance(held, dict) else held
    return [tensor for part in parts for tensor in tensors_of(part, seen)]


def padded(rows: Iterable[Sequence[int] | np.ndarray | Tensor]) -> Tensor:
    """Rows of tokens as int64 `[B, T]` on the CPU, padded with 0 on the right, where no earlier token looks."""
    return pad_sequence([torch.as_tensor(np.asarray(row, dtype=np.int64)) for row in rows], batch_first=True)
