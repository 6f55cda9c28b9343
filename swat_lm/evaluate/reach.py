"""Effective reach: how much the last prediction changes with each token before it, by the gradient of its loss.

With a window a layer sees W - 1 tokens back and L layers at most (W - 1) * L; how far a trained model uses that is
another matter (docs/evaluation.md). Legend: B streams, T tokens, M model width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from swat_lm.evaluate.figures import JsonRecord
from swat_lm.evaluate.limits import position_limit
from swat_lm.evaluate.standard_errors import mean_and_error
from swat_lm.evaluate.streaming_model import evaluating
from swat_lm.evaluate.windows import kept_first_tokens, model_window, theoretical_reach

__all__ = ["ReachCurve", "effective_reach", "gradient_norms"]

SHARES = (0.5, 0.9, 0.99)
CHECKPOINT_ABOVE = 4096
"""Tokens above which layers are recomputed in the backward pass, so that only their inputs are held."""


@dataclass(frozen=True)
class ReachCurve(JsonRecord):
    """Influence of a token on the prediction so many tokens later, averaged over streams.

    The influence at distance d is the norm of the gradient of the last token's loss with respect to the embedding of
    the token d places before the one that predicts it, as a share of the sum over all distances.
    """

    first: tuple[int, ...]
    """First distance of each bin; bins double."""
    last: tuple[int, ...]
    """Last distance of each bin."""
    share: tuple[float, ...]
    """Share of the influence per token of the bin."""
    share_error: tuple[float | None, ...]
    """Standard error over streams; None for one stream."""
    within: dict[str, float]
    """Distance within which half, 90 % and 99 % of the influence lie, mean over streams."""
    within_error: dict[str, float | None]
    num_streams: int
    length: int
    """Tokens before the predicted one."""
    window: int | None
    """Widest window of the model; None: a layer sees everything."""
    reach: int | None
    """Tokens, its own included, that a place can depend on."""


def effective_reach(
    model: PreTrainedModel,
    streams: Sequence[np.ndarray],
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> ReachCurve:
    """Measure on streams of equal length, whose last token is the predicted one.

    Every stream needs a backward pass over its tokens, or over as many as the model can reach.

    Raises:
        ValueError: no streams, of unequal lengths, or shorter than three tokens or longer than the model's
            positions; a model that takes no embeddings.
    """
    sizes = {len(stream) for stream in streams}
    if len(sizes) != 1 or min(sizes) < 3:
        raise ValueError(f"streams: expected at least one, of equal length and at least 3 tokens; got {sorted(sizes)}")
    reach, length, limit = theoretical_reach(model), min(sizes) - 1, position_limit(model)
    if limit is not None and length > limit:
        raise ValueError(f"{type(model).__name__} has no position beyond token {limit}: ask for a length up to {limit}")
    norms = []
    for number, stream in enumerate(streams, start=1):
        # what stands beyond the reach has no influence and need not be read, but where first tokens are kept
        most = length if reach is None or kept_first_tokens(model.config) else min(length, reach)
        read = stream[-(most + 1) :]
        found = gradient_norms(model, torch.from_numpy(np.asarray(read, dtype=np.int64))[None])[0]
        norms.append(F.pad(found, (0, length - len(found))))
        if on_progress:
            on_progress(number, len(streams))
    shares = torch.stack(norms).double()
    totals = shares.sum(dim=1, keepdim=True)
    if not bool((totals > 0).all()):
        raise ValueError("a stream has no gradient at all: the loss is 0 or not a number")
    return summary(shares / totals, length, model_window(model), reach)


def gradient_norms(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Norms of the gradient of the last token's loss, float32 `[B, T - 1]` by distance from the token before it."""
    tokens = tokens.to(model.device)
    words = cast(Any, model.get_input_embeddings())
    long = tokens.shape[1] > CHECKPOINT_ABOVE and model.supports_gradient_checkpointing
    with evaluating(model), torch.enable_grad():
        embedded = words(tokens[:, :-1]).detach().requires_grad_(True)
        if long:
            # layers are recomputed in training mode only, in which dropout would draw random numbers
            dropping = any(isinstance(module, torch.nn.Dropout) and module.p for module in model.modules())
            if dropping or getattr(model.config, "attention_dropout", 0):
                raise ValueError(
                    f"more than {CHECKPOINT_ABOVE} tokens of a model with dropout: measure shorter streams"
                )
            model.activation_checkpointing_enable()
            model.train()
        try:
            logits = model(inputs_embeds=embedded, use_cache=False, logits_to_keep=1).logits[:, -1]
            loss = F.cross_entropy(logits.float(), tokens[:, -1], reduction="sum")
            (gradient,) = torch.autograd.grad(loss, embedded)
        except TypeError as error:
            raise ValueError(f"{type(model).__name__} takes no embeddings as input: {error}") from error
        finally:
            if long:
                model.activation_checkpointing_disable()
    return gradient.float().norm(dim=-1).flip(1).cpu()


def summary(shares: Tensor, length: int, window: int | None, reach: int | None) -> ReachCurve:
    """Bins that double, and quantiles, of shares `[streams, T]` by distance."""
    first = [0, *(1 << power for power in range(math.ceil(math.log2(length))))]
    last = [min(begin * 2 - 1, length - 1) if begin else 0 for begin in first]
    binned = [shares[:, low : high + 1].mean(dim=1).tolist() for low, high in zip(first, last, strict=True)]
    means = [mean_and_error(shares_of_bin) for shares_of_bin in binned]
    sums = shares.cumsum(dim=1)
    within = {f"{share:g}": mean_and_error((sums < share).sum(dim=1).double().tolist()) for share in SHARES}
    return ReachCurve(
        tuple(first),
        tuple(last),
        tuple(mean for mean, _ in means),
        tuple(error for _, error in means),
        {name: mean for name, (mean, _) in within.items()},
        {name: error for name, (_, error) in within.items()},
        len(shares),
        length,
        window,
        reach,
    )
