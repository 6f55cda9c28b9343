"""Random numbers as functions of whole numbers, in integer arithmetic that every device does alike.

The same words give the same number whatever stands beside them, so chunks, packed rows, padding, recomputation and
processes draw alike, and no generator has a state. Legend: any shapes that broadcast.
"""

import torch
from torch import Tensor

LOW = 0xFFFFFFFF
# of Wellons' search for 32-bit hashes with little bias; below 2^31, so that no product leaves 64 bits
FIRST, SECOND = 0x21F0AAAD, 0x735A2D97
GOLDEN = 0x9E3779B9


def scrambled(values: Tensor) -> Tensor:
    """Map int64 values below 2^32 to others, one to one, so that a changed bit changes each bit half of the time."""
    values = (values ^ (values >> 16)) * FIRST & LOW
    values = (values ^ (values >> 15)) * SECOND & LOW
    return values ^ (values >> 15)


def uniform(*words: Tensor | int) -> Tensor:
    """Float64 numbers between 0 and 1, neither of them reached: one for each combination of words.

    Args:
        words: int64 tensors that broadcast, or numbers, all their 64 bits counting; at least one is a tensor.
    """
    state: Tensor | int = GOLDEN
    for word in words:
        for half in (word & LOW, (word >> 32) & LOW):
            mixed = ((state + GOLDEN) & LOW) ^ half
            state = scrambled(mixed if isinstance(mixed, Tensor) else torch.tensor(mixed))
    assert isinstance(state, Tensor)
    return (state.double() + 0.5) * 2.0**-32


def logistic(*words: Tensor | int) -> Tensor:
    """Float64 numbers of the logistic distribution, which the difference of two independent Gumbel numbers has."""
    drawn = uniform(*words)
    return torch.log(drawn) - torch.log1p(-drawn)
