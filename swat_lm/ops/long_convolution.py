"""Convolutions as long as the row, by FFT: causal, or in both directions; linear, never circular.

Short rows go tap by tap, where what has no tap has no part in a sum: an FFT's rounding, of the size of a row's largest
number times the machine's epsilon, reaches every place of a row, those before a change among them.
Legend: B rows, T tokens, M channels, L taps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from swat_lm.ops.precision import check_dtype, sum_dtype
from swat_lm.ops.structured_state.products import product

# rows up to here go tap by tap
DIRECT = 64


def long_convolution(inputs: Tensor, kernel: Tensor, *, later: Tensor | None = None) -> Tensor:
    """Convolve every channel of every row with its own taps.

        y[t] = sum over j <= t of kernel[t - j] * x[j]   +   sum over j > t of later[j - t - 1] * x[j]

    Args:
        inputs: `[B, T, M]`; float32, float64, bfloat16 or float16.
        kernel: `[M, L]`, tap 0 is the token's own; L may be less or more than T. Taken in the sums' precision, float32
            at least.
        later: `[M, L']`, taps over what comes after the token; None: nothing does (causal).

    Returns:
        `[B, T, M]` in the dtype of the inputs; differentiable in all three.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device; the message names it.
    """
    _check(inputs, kernel, later)
    num_tokens = inputs.shape[1]
    kernel = kernel[:, :num_tokens]
    later = None if later is None else later[:, : max(0, num_tokens - 1)]
    if inputs.numel() == 0 or (kernel.shape[1] == 0 and (later is None or later.shape[1] == 0)):
        return torch.zeros_like(inputs)
    with torch.autocast(inputs.device.type, enabled=False):
        precise = sum_dtype(inputs)
        x, kernel = inputs.to(precise), kernel.to(precise)
        later = None if later is None else later.to(precise)
        result = _by_taps(x, kernel, later) if num_tokens <= DIRECT else _by_fft(x, kernel, later)
    return result.to(inputs.dtype)


def fast_length(least: int) -> int:
    """Return the smallest even product of powers of 2, 3 and 5 that is at least `least`: an FFT of it is fast."""
    best = 2
    while best < least:
        best *= 2
    for three in (1, 3, 9, 27):
        for five in (1, 5, 25, 125):
            length = 2 * three * five
            while length < least:
                length *= 2
            best = min(best, length)
    return best


def _by_fft(x: Tensor, kernel: Tensor, later: Tensor | None) -> Tensor:
    num_tokens, taps = x.shape[1], kernel.shape[1]
    count = 0 if later is None else later.shape[1]
    # what a product of transforms wraps around must fall on zeros
    length = fast_length(num_tokens + max(taps, count + 1) - 1)
    if later is not None:
        # tap -1 is the last of the circle
        kernel = torch.cat((F.pad(kernel, (0, length - taps - count)), later.flip(1)), dim=1)
    spectrum = torch.fft.rfft(x.transpose(1, 2), n=length) * torch.fft.rfft(kernel, n=length)
    return torch.fft.irfft(spectrum, n=length)[..., :num_tokens].transpose(1, 2)


def toeplitz(kernel: Tensor, later: Tensor | None, num_tokens: int) -> Tensor:
    """The convolution of T tokens as matrices `[M, T, T]`; exactly 0 where there is no tap."""
    taps = F.pad(kernel, (0, num_tokens - kernel.shape[1]))
    before = taps.new_zeros(taps.shape[0], num_tokens - 1)
    if later is not None:
        before = F.pad(later.flip(1), (num_tokens - 1 - later.shape[1], 0))
    # row t ends with tap t of the first token's column
    return torch.cat((before, taps), dim=1).unfold(1, num_tokens, 1).flip(2)


def _by_taps(x: Tensor, kernel: Tensor, later: Tensor | None) -> Tensor:
    matrix = toeplitz(kernel, later, x.shape[1])
    return product(matrix, x.permute(2, 1, 0)).permute(2, 1, 0)


def _check(inputs: Tensor, kernel: Tensor, later: Tensor | None) -> None:
    if inputs.dim() != 3:
        raise ValueError(f"inputs: expected [batch, tokens, channels], got {list(inputs.shape)}")
    check_dtype("inputs", inputs)
    for name, taps in (("kernel", kernel), ("later", later)):
        if taps is None:
            continue
        check_dtype(name, taps)
        if taps.dim() != 2 or taps.shape[0] != inputs.shape[2]:
            raise ValueError(f"{name}: expected [{inputs.shape[2]} channels, taps], got {list(taps.shape)}")
        if taps.device != inputs.device:
            raise ValueError(f"{name}: expected the device {inputs.device} of the inputs, got {taps.device}")
