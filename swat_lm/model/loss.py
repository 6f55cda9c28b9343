"""Cross-entropy over the vocabulary in chunks of tokens: the whole `[N, V]` logits never exist.

The gradient is formed chunk by chunk during the forward pass (softmax minus one-hot), so nothing is recomputed.
Legend: N tokens, M model width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint

IGNORE = -100
PLAIN_WEIGHTS = (Tensor, nn.Parameter, FakeTensor)
"""Types of weights that are numbers, or shapes that stand for them; others know themselves how to be multiplied."""
CHUNK_ELEMENTS = 2**22
"""Logits held at once, in elements (16 MiB in float32); sets the default chunk of tokens."""


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    num_items: Tensor | float | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Cross-entropy of `hidden @ weight.T` against labels, as `F.cross_entropy` gives it, without the whole logits.

    Args:
        hidden: `[N, M]`.
        weight: `[V, M]`, the output embedding.
        labels: int64 `[N]`; -100 is ignored.
        num_items: what the sum of losses is divided by; the number of labels that are not ignored when None.
        chunk: tokens per chunk; chosen from the vocabulary's size when None.
        softcap: c caps logits softly before anything else, as `c * tanh(logits / c)`; None: as they are.

    Returns:
        The loss in nats, a float32 scalar (float64 for float64 inputs).

    Raises:
        ValueError: shapes that do not fit together.
    """
    _check(hidden, weight, labels)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    total = _ChunkedCrossEntropy.apply(hidden, weight, labels, chunk or default_chunk(weight.shape[0]), softcap)
    return total / _divisor(labels, num_items)


def chunked_cross_entropy_through(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items: Tensor | float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """The same loss through any output module (an adapter, a quantised layer), whose logits are recomputed backward.

    Args:
        head: maps `[n, M]` to logits `[n, V]`.
        hidden, labels, num_items, chunk: as in `chunked_cross_entropy`.
        vocab_size: V, for the default chunk.
    """
    size = chunk or default_chunk(vocab_size)

    def summed(hidden_chunk: Tensor, labels_chunk: Tensor) -> Tensor:
        logits = head(hidden_chunk)
        return F.cross_entropy(_at_least_float32(logits), labels_chunk, ignore_index=IGNORE, reduction="sum")

    total = torch.zeros((), device=hidden.device)
    for part, target in zip(hidden.split(size), labels.split(size), strict=True):
        total = total + checkpoint(summed, part, target, use_reentrant=False)
    return total / _divisor(labels, num_items)


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None = None) -> Tensor:
    """The loss of every token, `[N]` in nats, 0 where the label is -100; for evaluation, has no gradient."""
    _check(hidden, weight, labels)
    size = chunk or default_chunk(weight.shape[0])
    parts = [
        F.cross_entropy(_at_least_float32(F.linear(h, weight)), label, ignore_index=IGNORE, reduction="none")
        for h, label in zip(hidden.split(size), labels.split(size), strict=True)
    ]
    return torch.cat(parts) if parts else hidden.new_zeros(0)


def default_chunk(vocab_size: int) -> int:
    """Tokens per chunk so that a chunk's logits hold about `CHUNK_ELEMENTS` elements, at least 64."""
    return max(64, CHUNK_ELEMENTS // vocab_size)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the losses; the gradients wait in the context and are scaled by the incoming gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, softcap: float | None) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        statistics = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=statistics, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # summed over chunks, so held in at least float32 whatever the weight's dtype
        grad_weight = torch.zeros_like(weight, dtype=statistics) if needs_weight else None
        for start in range(0, hidden.shape[0], chunk):
            part, target = hidden[start : start + chunk], labels[start : start + chunk]
            logits, derivative = _capped(F.linear(part, weight).to(statistics), softcap)
            log_sum = torch.logsumexp(logits, dim=-1, keepdim=True)
            counted = (target != IGNORE).unsqueeze(-1)
            place = target.masked_fill(target == IGNORE, 0).unsqueeze(-1)
            total += ((log_sum - logits.gather(-1, place)) * counted).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            grad_logits = logits.sub_(log_sum).exp_().scatter_add_(-1, place, -counted.to(statistics)).mul_(counted)
            if derivative is not None:
                grad_logits.mul_(derivative)
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[start : start + chunk])
            if grad_weight is not None:
                if grad_weight.dtype == grad_logits.dtype:
                    torch.addmm(grad_weight, grad_logits.t(), part, out=grad_weight)
                else:
                    grad_weight += grad_logits.t() @ part
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (grad_total,) = grad_outputs
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_total.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_total).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None


def _capped(logits: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Logits after a soft cap, and their derivative by those before it; None where nothing is capped."""
    if softcap is None:
        return logits, None
    bounded = torch.tanh(logits / softcap)
    return bounded * softcap, 1 - bounded.square()


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _divisor(labels: Tensor, num_items: Tensor | float | None) -> Tensor | float:
    if num_items is None:
        return (labels != IGNORE).sum()
    return num_items.to(labels.device) if isinstance(num_items, Tensor) else float(num_items)


def _check(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden: expected [tokens, width] and weight [vocabulary, width], got {list(hidden.shape)} "
            f"and {list(weight.shape)}"
        )
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"labels: expected one per token, [{hidden.shape[0]}], got {list(labels.shape)}")
    # elsewhere than on a CPU looking would wait for the device, whose own kernels fail on such labels
    if labels.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(labels, FakeTensor):
        wrong = labels[((labels < 0) & (labels != IGNORE)) | (labels >= weight.shape[0])]
        if wrong.numel():
            raise ValueError(
                f"labels: expected 0 to {weight.shape[0] - 1}, or {IGNORE} for a token that is not counted; got "
                f"{int(wrong[0])}"
            )
