"""Random numbers as functions: the same on every machine and with every version of numpy, and nothing to store."""

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
ROUNDS = 6


def mix(values: np.ndarray, seed: int) -> np.ndarray:
    """Scramble uint64 values under a seed: splitmix64's finaliser (Steele, Lea, Flood, 2014), applied twice."""
    with np.errstate(over="ignore"):
        return finalise(finalise(values.astype(np.uint64)) + GOLDEN * np.uint64(2 * seed + 1 & (1 << 64) - 1))


def finalise(values: np.ndarray) -> np.ndarray:
    """One pass of splitmix64."""
    values = values + GOLDEN
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permute(indices: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Where a permutation of `range(size)` drawn from `seed` sends these indices, int64; constant memory.

    A Feistel network over the next power of 4, repeated for values that fall outside ("cycle walking", Black and
    Rogaway, 2002).
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    values = np.asarray(indices, dtype=np.uint64).copy()
    outside = np.ones(values.shape, dtype=bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & mask
        for round_number in range(ROUNDS):
            left, right = right, left ^ (mix(right, seed * ROUNDS + round_number) & mask)
        values[outside] = (left << half) | right
        outside = values >= np.uint64(size)
    return values.astype(np.int64)
