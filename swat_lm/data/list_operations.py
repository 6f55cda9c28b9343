"""ListOps (arXiv 1804.06028; Long Range Arena, arXiv 2011.04006): nested operations on digits, with their results.

`[MAX 4 [MIN 2 9 ] 1 ]` is 4. What an operation gives is known at its closing bracket alone, from all that it encloses.
Legend: ids count from 0: ten digits, the openings of four operations, the closing bracket.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["CLOSING", "DIGITS", "NUM_IDS", "OPERATIONS", "Expression", "draw_expression", "value_of"]

DIGITS = 10
OPERATIONS: tuple[tuple[str, Callable[[Sequence[int]], int]], ...] = (
    ("MIN", min),
    ("MAX", max),
    # of an even number, the mean of the middle two without its fraction
    ("MED", lambda values: int(np.median(values))),
    ("SM", lambda values: sum(values) % DIGITS),
)
CLOSING = DIGITS + len(OPERATIONS)
NUM_IDS = CLOSING + 1
# of an argument being an operation itself, where it may be
NESTED = 0.4


class Expression(NamedTuple):
    """An operation and its result."""

    tokens: list[int]
    value: int


def draw_expression(random: np.random.Generator, depth: int, arguments: int, longest: int) -> Expression:
    """An operation of 2 to `arguments` arguments, nested at most so deep, of at most `longest` tokens.

    `longest` must hold one of `arguments` digits, `arguments + 2` tokens.
    """
    while True:
        found = _draw(random, depth, arguments, longest)
        if found is not None:
            return found
        depth = max(1, depth - 1) if random.random() < 0.1 else depth


def _draw(random: np.random.Generator, depth: int, arguments: int, room: int) -> Expression | None:
    """None as soon as it has more than `room` tokens: wide and deep ones would fill any memory."""
    which = int(random.integers(len(OPERATIONS)))
    tokens, values = [DIGITS + which], []
    for _ in range(int(random.integers(2, arguments + 1))):
        if depth > 1 and random.random() < NESTED:
            inner = _draw(random, depth - 1, arguments, room - len(tokens) - 1)
        else:
            digit = int(random.integers(DIGITS))
            inner = Expression([digit], digit)
        # one more closes it
        if inner is None or len(tokens) + len(inner.tokens) >= room:
            return None
        tokens += inner.tokens
        values.append(inner.value)
    return Expression([*tokens, CLOSING], OPERATIONS[which][1](values))


def value_of(tokens: Sequence[int]) -> int:
    """The result of an operation that is given by its tokens."""
    open_ones: list[tuple[int, list[int]]] = [(-1, [])]
    for token in tokens:
        if token < DIGITS:
            open_ones[-1][1].append(token)
        elif token < CLOSING:
            open_ones.append((token - DIGITS, []))
        else:
            which, values = open_ones.pop()
            open_ones[-1][1].append(OPERATIONS[which][1](values))
    ((_, (value,)),) = open_ones
    return value
