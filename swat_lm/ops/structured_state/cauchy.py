"""The taps of a structured state space by its generating function at roots of unity: Cauchy sums, rank-one correction.

S4 (arXiv 2111.00396), section 3 and appendix C, over conjugate pairs in real arithmetic: at a root of unity the sums'
variable is imaginary, `i y`, so a pair of poles `w, conj w` makes a denominator `(|w|^2 - y^2) + i (-2 Re w) y`.
Legend: M channels, n pairs, K sums, F frequencies, L taps.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from swat_lm.ops.structured_state.products import product, times_power
from swat_lm.ops.structured_state.system import System, pairs_of

# numbers of a block of denominators on a CPU: what its caches hold
BLOCK_BUDGET = 2**17
# where there are no caches to think of
DEVICE_BUDGET = 2**26


def taps_by_cauchy(system: System, row: Tensor, powers: list[Tensor], length: int) -> Tensor:
    """The first L taps `row . matrix^l entry` of every channel, `[M, L]`.

    Args:
        row: `[M, N]`, C as `reading` has it.
        powers: `squares` of the discrete matrix, enough of them for its power L.
        length: L; best one of `fast_length`.
    """
    # the generating function of exactly L taps: what comes after them is taken off
    rest = times_power(row[:, None], powers, length)[:, 0]
    real, imag = pairs_of(row - rest)
    half = math.pi / length * torch.arange(length // 2 + 1, dtype=row.dtype, device=row.device)
    step = system.step[:, None]
    entry = system.entry[..., 0], system.entry[..., 1]
    # at omega = -1 variable and factor are infinite, and their product is 1/2
    last = (step * (real * entry[0] - imag * entry[1])).sum(1) if length % 2 == 0 else None
    tangent = torch.tan(half if last is None else half[:-1])
    sums = [_product((real, imag), entry)]
    if system.low_rank is not None:
        low = system.low_rank[..., 0], system.low_rank[..., 1]
        conjugate = low[0], -low[1]
        sums += [_product((real, imag), low), _product(conjugate, entry), _product(conjugate, low)]
    found = _sums(sums, system, 2 * tangent)
    total = found[0] if len(found) == 1 else found[0] - found[1] * found[2] / (1 + found[3])
    # 2 / (1 + omega)
    total = total * torch.complex(torch.ones_like(tangent), tangent)
    if last is not None:
        total = torch.cat((total, torch.complex(last, torch.zeros_like(last))[:, None]), dim=1)
    return torch.fft.irfft(total, n=length)


def _product(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return one[0] * other[0] - one[1] * other[1], one[0] * other[1] + one[1] * other[0]


def _sums(values: list[tuple[Tensor, Tensor]], system: System, variable: Tensor) -> list[Tensor]:
    """`dt sum over n of v / (i y - dt w)` and the conjugate pair's, complex `[M, F]` for each v."""
    step = system.step[:, None]
    decay, angle = step * system.decay, step * system.angle
    real = torch.stack([step * value[0] for value in values], dim=1)
    imag = torch.stack([step * value[1] for value in values], dim=1)
    # -2 Re(v conj w) and 2 Re v
    constant = 2 * (real * decay[:, None] - imag * angle[:, None])
    linear = 2 * real
    over_real, over_imag = torch.ops.swat_lm.cauchy_sums(
        torch.cat((constant, linear), dim=1), decay * decay + angle * angle, 2 * decay, variable
    )
    count = len(values)
    first = over_real[:, :count] + variable * over_imag[:, count:]
    second = variable * over_real[:, count:] - over_imag[:, :count]
    return list(torch.complex(first, second).unbind(1))


def _blocks(size: Tensor, variable: Tensor) -> Iterator[slice]:
    budget = BLOCK_BUDGET if size.device.type == "cpu" else DEVICE_BUDGET
    together = max(1, budget // max(1, size.shape[1] * variable.shape[0]))
    for first in range(0, size.shape[0], together):
        yield slice(first, first + together)


def _denominators(size: Tensor, slope: Tensor, variable: Tensor) -> tuple[Tensor, Tensor]:
    """Real and negative imaginary part of `1 / ((size - y^2) + i slope y)`, `[m, n, F]`."""
    real = size[..., None] - variable * variable
    imag = slope[..., None] * variable
    inverse = (real * real).addcmul_(imag, imag).reciprocal_()
    return real.mul_(inverse), imag.mul_(inverse)


@torch.library.custom_op("swat_lm::cauchy_sums", mutates_args=())
def _cauchy_sums(factors: Tensor, size: Tensor, slope: Tensor, variable: Tensor) -> tuple[Tensor, Tensor]:
    shape = (*factors.shape[:2], variable.shape[0])
    real, imag = factors.new_empty(shape), factors.new_empty(shape)
    for block in _blocks(size, variable):
        one, other = _denominators(size[block], slope[block], variable)
        torch.bmm(factors[block], one, out=real[block])
        torch.bmm(factors[block], other, out=imag[block])
    return real, imag


@_cauchy_sums.register_fake
def _(factors: Tensor, size: Tensor, slope: Tensor, variable: Tensor) -> tuple[Tensor, Tensor]:
    shape = (*factors.shape[:2], variable.shape[0])
    return factors.new_empty(shape), factors.new_empty(shape)


@torch.library.custom_op("swat_lm::cauchy_sums_backward", mutates_args=())
def _cauchy_sums_backward(
    d_real: Tensor, d_imag: Tensor, factors: Tensor, size: Tensor, slope: Tensor, variable: Tensor, poles: bool
) -> tuple[Tensor, Tensor, Tensor]:
    d_factors, d_size, d_slope = (torch.zeros_like(x) for x in (factors, size, slope))
    for block in _blocks(size, variable):
        one, other = _denominators(size[block], slope[block], variable)
        d_factors[block] = torch.bmm(d_real[block], one.transpose(1, 2))
        d_factors[block].baddbmm_(d_imag[block], other.transpose(1, 2))
        if not poles:
            continue
        transposed = factors[block].transpose(1, 2)
        d_one, d_other = torch.bmm(transposed, d_real[block]), torch.bmm(transposed, d_imag[block])
        # with R = one - i other = 1 / (a + i b): dR = -R^2 (da + i db)
        square, cross = one * one - other * other, 2 * one * other
        d_size[block] = -(d_one * square + d_other * cross).sum(2)
        d_slope[block] = torch.mv((d_other * square - d_one * cross).flatten(0, 1), variable).view(d_slope[block].shape)
    return d_factors, d_size, d_slope


@_cauchy_sums_backward.register_fake
def _(d_real, d_imag, factors, size, slope, variable, poles):
    return torch.empty_like(factors), torch.empty_like(size), torch.empty_like(slope)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, d_real: Tensor, d_imag: Tensor) -> tuple[Tensor | None, ...]:
    saved, needed = ctx.saved_tensors, ctx.needs_input_grad
    poles = needed[1] or needed[2]
    found = torch.ops.swat_lm.cauchy_sums_backward(d_real.contiguous(), d_imag.contiguous(), *saved, poles)
    return *(gradient if need else None for gradient, need in zip(found, needed, strict=False)), None


_cauchy_sums.register_autograd(_backward, setup_context=_setup)


def taps_by_powers(row: Tensor, entry: Tensor, powers: list[Tensor], length: int) -> Tensor:
    """The same taps out of `matrix^(i + j Q)`: rows for i and columns for j, one product of both.

    For systems that are fixed this costs less than the sums: all powers are there already.
    """
    from swat_lm.ops.structured_state.products import columns, rows

    half = max(1, (max(1, length - 1).bit_length() + 1) // 2)
    span = 2**half
    left = rows(powers[:half], row, span)
    right = columns(powers[half:], entry, 2 ** max(0, len(powers) - half))[..., : -(-length // span)]
    return product(left, right).transpose(1, 2).flatten(1)[:, :length]
