"""Rotary position embedding from absolute positions (RoFormer, arXiv 2104.09864), as exact at position 10**7 as at 0.

Angles are formed in float64 and only their cosine and sine are rounded: float32 angles are off by 0.25 rad
at position 10**7 and by whole turns later. Nothing here is a buffer, so no cast of the model can reach the frequencies.
"""

import torch
from torch import Tensor


def inverse_frequencies(head_dim: int, base: float) -> Tensor:
    """Return `base ** (-2 i / head_dim)` for i = 0 .. head_dim/2 - 1, float64 on the CPU, radians per position.

    Raises:
        ValueError: an odd head size or a base that is not positive.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim: rotary needs an even head size, got {head_dim}")
    if not base > 0:
        raise ValueError(f"base: expected a positive rotary base, got {base}")
    return float(base) ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim)


def rotary_angles(
    positions: Tensor,
    head_dim: int,
    base: float = 10_000.0,
    dtype: torch.dtype = torch.float32,
    frequencies: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of `position * frequency`, each `[*positions.shape, head_dim / 2]` in `dtype`.

    Args:
        positions: absolute places in the stream, an integer tensor of any shape, usually `[B, T]`.
        head_dim: D, even.
        base: rotary base (`rope_theta`); unused when `frequencies` is given.
        dtype: of the result; the angles themselves are always float64.
        frequencies: float64 `[head_dim / 2]`, for scaled variants of rotary.
    """
    if positions.is_floating_point():
        raise ValueError(f"positions: expected integers (absolute places in the stream), got {positions.dtype}")
    per_position = inverse_frequencies(head_dim, base) if frequencies is None else frequencies
    device = positions.device
    # Apple's GPUs have no float64: there the angles are formed on the CPU
    exact = torch.device("cpu") if device.type == "mps" else device
    angles = positions.to(exact, torch.float64).unsqueeze(-1) * per_position.to(exact, torch.float64)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs `(x[i], x[i + D/2])` of every head by the angle of their position (Llama's pairing).

    Args:
        x: `[B, T, H, D]`.
        cos, sin: `[B, T, D/2]` or `[T, D/2]`, from `rotary_angles`.

    Returns:
        `[B, T, H, D]` in x's dtype; the product is formed in the wider of the dtypes of x and cos.
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rotate_paired(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """The rotation of `apply_rotary` by angles over whole heads, `[B, 1, 1, D]`, the sine signed by halves.

    A roll by half a head exchanges the members of every pair.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), signed_sin).to(x.dtype)


def half_angles(cos: Tensor, signed_sin: Tensor) -> tuple[Tensor, Tensor]:
    """The angles of `rotate_paired` as the operator takes them: `[B, 1, 1, D]` to `[B, 1, D / 2]`, views."""
    half = cos.shape[-1] // 2
    return cos[:, :, 0, :half], signed_sin[:, :, 0, half:]
