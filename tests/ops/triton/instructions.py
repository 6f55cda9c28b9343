"""What a GPU computes and Triton's interpreter does not: bfloat16, tf32, and the three approximate instructions.

An approximation is as wrong as PTX allows it to be, in a direction that looks random and is not: what passes here
passes on any GPU that keeps PTX's promises.
"""

from collections.abc import Callable

import numpy as np

# largest relative errors by PTX's manual: tanh.approx.f32, ex2.approx.ftz.f32, rcp.approx.ftz.f32
TANH_ERROR = 2.0**-11
EXP2_ERROR = 2.0**-22
RECIPROCAL_ERROR = 2.0**-23
# of tanh.approx.f32 as others measured it
MEASURED_TANH_ERROR = 1.2e-5
# of a result's own rounding to float32
_ROUNDING = 2.0**-24
_SMALLEST_NORMAL = np.float32(2.0**-126)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Return the numbers, float32, that uint16 bits stand for."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest bfloat16, ties to even, as uint16 bits; infinities and NaN stay what they are."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded).reshape(x.shape)


def to_tf32(x: np.ndarray) -> np.ndarray:
    """Cut float32 to the 10 bits that a tf32 product reads."""
    return (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32).reshape(x.shape)


def instructions(tanh_error: float) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Return the instructions that kernels may use, by their text in PTX."""

    def tanh(x: np.ndarray) -> np.ndarray:
        exact = np.tanh(x.astype(np.float64))
        # a saturated hyperbolic tangent is 1, whatever the bound would allow
        return np.clip(_off_by(exact, tanh_error), np.float32(-1.0), np.float32(1.0))

    def exp2(x: np.ndarray) -> np.ndarray:
        return _flush(_off_by(np.exp2(_flush(x).astype(np.float64)), EXP2_ERROR))

    def reciprocal(x: np.ndarray) -> np.ndarray:
        return _flush(_off_by(1.0 / _flush(x).astype(np.float64), RECIPROCAL_ERROR))

    return {"tanh.approx.f32": tanh, "ex2.approx.ftz.f32": exp2, "rcp.approx.ftz.f32": reciprocal}


def _off_by(exact: np.ndarray, relative_error: float) -> np.ndarray:
    """Return float32 numbers off by just under a relative error; 0, 1 and infinities among them stay."""
    rounded = exact.astype(np.float32)
    scrambled = rounded.view(np.uint32) * np.uint32(0x9E3779B1)
    sign = np.where(scrambled >> np.uint32(31), 1.0, -1.0)
    off = (exact * (1.0 + sign * (relative_error - _ROUNDING))).astype(np.float32)
    # what a GPU is right about: powers of 0, and limits
    return np.where(np.isin(np.abs(exact), (0.0, 1.0, np.inf)), rounded, off)


def _flush(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < _SMALLEST_NORMAL, np.copysign(np.float32(0.0), x), x)
