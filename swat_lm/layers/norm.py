"""Root mean square norm (arXiv 1910.07467), with Llama's parameter name, and Mamba-2's, which is gated."""

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
