"""A state space per channel in S4's structured form: its start, and its discretisation as dense real matrices.

`x' = A x + B u, y = Re(C x)` with `A = diag(w) - p p^H` over conjugate pairs, of which one of each is held (S4, arXiv
2111.00396). Without `p` it is diagonal: S4D (arXiv 2206.11893). A pair's real numbers are its real and imaginary part,
so that all runs in real arithmetic. Legend: M channels, N numbers of a state, n = N / 2 pairs.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class System(NamedTuple):
    """The continuous system of every channel, in float64: angles of far taps are long products."""

    decay: Tensor
    """`[M, n]`, -Re w, above 0."""
    angle: Tensor
    """`[M, n]`, Im w."""
    low_rank: Tensor | None
    """p, `[M, n, 2]`; None: S4D."""
    entry: Tensor
    """B, `[M, n, 2]`."""
    step: Tensor
    """dt, `[M]`, above 0."""


class Discrete(NamedTuple):
    """`x[t] = matrix x[t-1] + entry u[t]`, over real parts followed by imaginary parts."""

    matrix: Tensor
    """`[M, N, N]`"""
    entry: Tensor
    """`[M, N]`"""


def discretise(system: System) -> Discrete:
    """The bilinear rule: `(1 - dt/2 A)^-1 (1 + dt/2 A)` and `dt (1 - dt/2 A)^-1 B`, by the rank-one correction."""
    half = system.step[:, None] / 2
    # 1 / (1 - dt/2 w), a complex number per pair
    real, imag = 1 + half * system.decay, -half * system.angle
    size = real * real + imag * imag
    real, imag = real / size, -imag / size
    inverse = torch.cat(
        (
            torch.cat((torch.diag_embed(real), torch.diag_embed(-imag)), dim=2),
            torch.cat((torch.diag_embed(imag), torch.diag_embed(real)), dim=2),
        ),
        dim=1,
    )
    if system.low_rank is not None:
        given = flat(system.low_rank)
        # p p^H over both of each pair is p (2 p)^T over their real numbers
        left = _times(real, imag, given)
        right = 2 * _times(real, -imag, given)
        inner = (2 * given * left).sum(1, keepdim=True)
        inverse = inverse - (half / (1 + half * inner))[..., None] * left[:, :, None] * right[:, None, :]
    entry = flat(system.entry)
    moved = 2 * half * (inverse * entry[:, None, :]).sum(2)
    return Discrete(2 * inverse - torch.eye(inverse.shape[1], dtype=inverse.dtype, device=inverse.device), moved)


def flat(pairs: Tensor) -> Tensor:
    """`[..., M, n, 2]` as real parts followed by imaginary parts, `[..., M, N]`."""
    return torch.cat((pairs[..., 0], pairs[..., 1]), dim=-1)


def reading(exit: Tensor) -> Tensor:
    """C `[..., M, n, 2]` as the row that reads a state: `y = row . x`, `[..., M, N]`."""
    return 2 * torch.cat((exit[..., 0], -exit[..., 1]), dim=-1)


def pairs_of(row: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary parts of the C that `reading` made a row of."""
    real, imag = row.chunk(2, dim=-1)
    return real / 2, imag / -2


def _times(real: Tensor, imag: Tensor, vector: Tensor) -> Tensor:
    one, other = vector.chunk(2, dim=1)
    return torch.cat((real * one - imag * other, imag * one + real * other), dim=1)


class Start(NamedTuple):
    """HiPPO-LegS in the basis in which its normal part is diagonal, for one channel, float64 on the CPU."""

    decay: Tensor
    """`[n]`"""
    angle: Tensor
    """`[n]`"""
    low_rank: Tensor
    """`[n, 2]`"""
    entry: Tensor
    """`[n, 2]`"""


def hippo_legs(state_size: int) -> Start:
    """The memory of all of the past by Legendre polynomials (HiPPO, arXiv 2008.07669), for N numbers.

    Raises:
        ValueError: an odd number, or one below 2: they come in conjugate pairs.
    """
    if state_size < 2 or state_size % 2:
        raise ValueError(f"state_size: expected an even number of at least 2 (conjugate pairs), got {state_size}")
    with torch.device("cpu"):
        matrix, entry, low_rank = legs_matrices(state_size)
        # A + p p^T = -1/2 + a skew part, which has imaginary eigenvalues
        skew = matrix + torch.outer(low_rank, low_rank) + torch.eye(state_size, dtype=torch.float64) / 2
        angles, basis = torch.linalg.eigh(-1j * skew)
        held = angles > 0
        change = basis[:, held].conj().T
        low_rank, entry = (torch.view_as_real(change @ x.to(change.dtype)) for x in (low_rank, entry))
        return Start(torch.full((state_size // 2,), 0.5, dtype=torch.float64), angles[held], low_rank, entry)


def legs_matrices(state_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """A `[N, N]`, B `[N]` and p `[N]` of HiPPO-LegS as the equations say them, float64."""
    order = torch.arange(state_size, dtype=torch.float64)
    root = (2 * order + 1).sqrt()
    matrix = -torch.tril(torch.outer(root, root), diagonal=-1) - torch.diag(order + 1)
    return matrix, root, (order + 0.5).sqrt()
