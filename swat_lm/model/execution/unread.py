"""A layer computed again without its last product: nobody reads the result, and gradients need what went in alone.

It is a fifth of a layer of attention. Checkpointing of PyTorch stops before it too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from swat_lm.layers.base import Layer
from swat_lm.layers.pre_norm import FeedForward, PreNorm
from swat_lm.model.execution.layer_loop import is_hooked
from swat_lm.model.loss import PLAIN_WEIGHTS

__all__ = ["unread"]


@contextmanager
def unread(layer: Layer) -> Iterator[None]:
    """Within it what the layer gives has the right shape and gradients but wrong numbers, where that is worth it."""
    linear = last_product(layer)
    if linear is None:
        yield
        return
    linear.forward = partial(unformed, linear)  # type: ignore[assignment]
    try:
        yield
    finally:
        del linear.forward


def last_product(layer: Layer) -> nn.Linear | None:
    """The projection whose result is added to the residual stream and read by nothing else; None where there is more
    to it: a norm or a scale behind it, an adapter, other weights than numbers, or somebody who watches."""
    if not isinstance(layer, PreNorm) or type(layer.mlp) is not FeedForward:
        return None
    linear = layer.mlp.down_proj
    if layer.feedforward_output_layernorm is not None or layer.feedforward_scale is not None:
        return None
    if type(linear) is not nn.Linear or type(linear.weight) not in PLAIN_WEIGHTS:
        return None
    if any(is_hooked(module) or "forward" in vars(module) for module in (layer.mlp, linear)):
        return None
    return linear


def unformed(linear: nn.Linear, inner: Tensor) -> Tensor:
    """Zeros in the place of `linear(inner)`, with its gradients; under autocast in the dtype of that."""
    weight, bias = linear.weight, linear.bias
    if torch.is_autocast_enabled(inner.device.type):
        dtype = torch.get_autocast_dtype(inner.device.type)
        inner, weight = inner.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return _Unformed.apply(inner, weight, bias)


class _Unformed(torch.autograd.Function):
    """`inner @ weight.T + bias` that is not computed."""

    @staticmethod
    def forward(ctx: Any, inner: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inner, weight)
        return inner.new_zeros(1).expand(*inner.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inner, weight = ctx.saved_tensors
        gradient = gradients[0]
        rows = gradient.flatten(0, -2)
        needs_inner, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            gradient @ weight if needs_inner else None,
            rows.t() @ inner.flatten(0, -2) if needs_weight else None,
            rows.sum(dim=0) if needs_bias else None,
        )
