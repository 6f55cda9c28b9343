"""PyTorch's plain computation with the roundings that tensor cores force: weights and scores' gradients in 16 bits.

The definition stays the one of `swat_lm.ops.reference`; only its sigmoid and softmax are replaced while it runs. Its
error against float64 then says how large a kernel's error may be, whatever the inputs are.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# relative errors: of exp2 and a reciprocal together, and of tanh, by PTX's bounds
EXACT_ERROR = 2.0**-22 + 2.0**-23
FAST_ERROR = 2.0**-11
# of one operation in float32
EPSILON = 2.0**-24
# of a score's few
SCORE_ERROR = 3 * EPSILON
# keys of the largest tile, to whose first one distances are relative
LARGEST_TILE = 128


def score_error(slopes: Tensor, reach: int, score_function: str, scale: float, head_dim: int) -> Tensor:
    """Return what float32 rounds off the scores of a head, where its weights are not saturated, `[H, 1, 1]`."""
    slopes = slopes.abs().float()
    biases = slopes * reach
    if score_function == "sigmoid":
        biases = biases.clamp_max(20.0)
    # of numbers of about 1, whose product is summed in any order
    product = abs(scale) * head_dim / 3
    return (3 * EPSILON * (biases + LARGEST_TILE * slopes + product))[:, None, None]


class Roundings(TorchFunctionMode):
    """While active: weights are off by as much as the hardware's may be, and factors of products are rounded.

    Args:
        dtype: of the factors; float64 is exact.
        fast: weights by tanh.
        score_error: `[H, 1, 1]`, an absolute error of scores besides a relative one.
        shift_error: `[B, H, T, 1]`, of what the gradients of a row's softmax have in common.

    Afterwards `d_scores` are the scores' gradients before rounding, and `sizes` what they are a difference of, both
    `[B, H, T, S]`.
    """

    def __init__(
        self, dtype: torch.dtype, fast: bool = False, score_error: Any = 0.0, shift_error: Any = 0.0
    ) -> None:  # fmt: skip
        super().__init__()
        self.dtype, self.fast, self.score_error, self.shift_error = dtype, fast, score_error, shift_error
        self.weight_error = 0.0 if dtype == torch.float64 else FAST_ERROR if fast else EXACT_ERROR
        self.d_scores = self.sizes = torch.empty(0)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.sigmoid:
            return _Sigmoid.apply(args[0], self)
        if func is torch.softmax:
            return _Softmax.apply(args[0], self)
        return func(*args, **(kwargs or {}))

    def noise(self, like: Tensor) -> Tensor:
        """Return -1 and 1 at random, the same at every call of a shape."""
        generator = torch.Generator(like.device).manual_seed(like.numel())
        return torch.randint(0, 2, like.shape, generator=generator, device=like.device).to(like.dtype) * 2 - 1

    def score_errors(self, scores: Tensor) -> Tensor:
        """Return by how much scores may be off."""
        return self.score_error + (0.0 if self.dtype == torch.float64 else SCORE_ERROR) * scores.abs()

    def rounded(self, x: Tensor) -> Tensor:
        """Return x as a factor of a product."""
        return x.to(self.dtype).to(x.dtype)


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, mode: Roundings) -> Tensor:
        noise = mode.noise(scores)
        scores = scores + noise * mode.score_errors(scores)
        if mode.fast:
            tanh = (scores.double() / 2).tanh()
            off = tanh.where(tanh.abs() == 1, tanh * (1 + noise * mode.weight_error))
            weights = (off / 2 + 0.5).to(scores.dtype)
        else:
            weights = scores.sigmoid() * (1 + noise * mode.weight_error)
        ctx.mode = mode
        ctx.save_for_backward(weights)
        return mode.rounded(weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (weights,) = ctx.saved_tensors
        mode, part = ctx.mode, grads[0] * weights
        mode.d_scores, mode.sizes = part * (1 - weights), part.abs()
        return mode.rounded(mode.d_scores), None


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, mode: Roundings) -> Tensor:
        # the saved logarithm of the sum is off by as much as a score
        errors = mode.weight_error + mode.score_errors(scores.masked_fill(scores.isinf(), 0.0))
        weights = scores.softmax(dim=-1) * (1 + mode.noise(scores) * errors)
        ctx.mode = mode
        ctx.save_for_backward(weights)
        return mode.rounded(weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (weights,) = ctx.saved_tensors
        mode, part = ctx.mode, grads[0] * weights
        shift = part.sum(dim=-1, keepdim=True)
        shift = shift + mode.noise(shift) * mode.shift_error
        mode.d_scores, mode.sizes = weights * (grads[0] - shift), part.abs() + (weights * shift).abs()
        return mode.rounded(mode.d_scores), None
