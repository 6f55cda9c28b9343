"""Root mean square norm (arXiv 1910.07467), with Llama's parameter name, Mamba-2's, which is gated, and LayerNorm."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swat_lm.ops.gated_norm import gated_rms_norm


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[..., size]`; the dtype of x is kept."""
        # under autocast x may be narrower than the weight; the norm itself is formed in float32 either way
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)

    def extra_repr(self) -> str:
        """Size and epsilon."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


class GatedRMSNorm(RMSNorm):
    """Of what a gate was multiplied with, over groups of channels (arXiv 2405.21060, section 7)."""

    def __init__(self, size: int, eps: float, group_size: int) -> None:
        super().__init__(size, eps)
        self.group_size = group_size

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        """Normalise `[..., size]`, gated by `silu(gate)`."""
        return gated_rms_norm(x, gate, self.weight, eps=self.eps, group_size=self.group_size)


class LayerNorm(nn.Module):
    """`(x - mean(x)) / sqrt(var(x) + eps) * weight + bias` over the last dimension (arXiv 1607.06450)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[..., size]`; the dtype of x is kept."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        # under autocast PyTorch forms this norm in float32, and returns it so
        return F.layer_norm(x, self.weight.shape, weight, bias, self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        """Size and epsilon."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


NORMS: dict[str, type[RMSNorm] | type[LayerNorm]] = {"rms": RMSNorm, "layer": LayerNorm}
"""Of layers around attention and behind the last layer, by their words in the configuration."""
