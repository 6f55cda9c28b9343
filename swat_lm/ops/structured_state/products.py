"""Products of the matrices that move states, powers of them, and what follows from powers.

The products are one op of `torch.library`, which FLOP counters do not count: a recurrence is no matrix product of its
tokens. Legend: M channels, N numbers of a state, Q tokens of a span, R rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("swat_lm::state_product", mutates_args=())
def _state_product(left: Tensor, right: Tensor) -> Tensor:
    return torch.bmm(left, right)


@_state_product.register_fake
def _(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty((left.shape[0], left.shape[1], right.shape[2]))


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
    left, right = ctx.saved_tensors
    own, other = ctx.needs_input_grad
    return (
        product(gradient, right.transpose(1, 2)) if own else None,
        product(left.transpose(1, 2), gradient) if other else None,
    )


_state_product.register_autograd(_backward, setup_context=_setup)


def product(left: Tensor, right: Tensor) -> Tensor:
    """`[M, a, b] @ [M, b, c]`, in the precision of both, under autocast too."""
    with torch.autocast(left.device.type, enabled=False):
        return torch.ops.swat_lm.state_product(left, right)


def squares(matrix: Tensor, count: int) -> list[Tensor]:
    """`[M, N, N]` to the powers 1, 2, 4, ..., 2^(count - 1)."""
    found = [matrix]
    while len(found) < count:
        found.append(product(found[-1], found[-1]))
    return found[:count]


def bits(exponent: int) -> list[int]:
    """The places of the ones of a whole number: which of `squares` make up its power."""
    return [place for place in range(exponent.bit_length()) if exponent >> place & 1]


def times_power(rows: Tensor, powers: Sequence[Tensor], exponent: int) -> Tensor:
    """Rows `[M, a, N]` times the matrix to the `exponent`, by its `squares`."""
    for place in bits(exponent):
        rows = product(rows, powers[place])
    return rows


def power_of_each(powers: Sequence[Tensor], states: Tensor, exponent: Tensor) -> Tensor:
    """States `[R, M, N]`, each moved on by its own number of tokens, int64 `[R]`, below `2 ** len(powers)`."""
    moved = states.permute(1, 2, 0)
    for place, matrix in enumerate(powers):
        moves = (exponent >> place & 1).bool()
        moved = torch.where(moves, product(matrix, moved), moved)
    return moved.permute(2, 0, 1)


def columns(powers: Sequence[Tensor], first: Tensor, count: int) -> Tensor:
    """`[M, N]` as the columns `first, A first, A^2 first, ...`, `[M, N, count]`; `count` is `2 ** k` of the squares."""
    found = first[..., None]
    for matrix in powers:
        if found.shape[2] >= count:
            break
        found = torch.cat((found, product(matrix, found)), dim=2)
    return found


def rows(powers: Sequence[Tensor], first: Tensor, count: int) -> Tensor:
    """`[M, N]` as the rows `first, first A, first A^2, ...`, `[M, count, N]`; see `columns`."""
    found = first[:, None]
    for matrix in powers:
        if found.shape[1] >= count:
            break
        found = torch.cat((found, product(found, matrix)), dim=1)
    return found
