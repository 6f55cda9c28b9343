"""Slopes of the distance bias, one per query head (SWAT, arXiv 2502.18845, Eq. 4; ALiBi, arXiv 2108.12409).

The bias is `slope * distance`: a negative slope favours recent keys, a positive one favours old keys.
"""

import math
import re
from functools import partial

import torch
from torch import Tensor

from swat_lm.words import counted

SCHEDULES = ("swat", "alibi", "window")
KINDS = ("balanced", "negative", "positive", "none")


DEFAULT_SPAN = (64.0, 4.0)
"""Of the schedule "window": of the rules that were tried the one with the lowest loss (docs/experiments.md)."""

Span = float | tuple[float, float] | list[float]


def slopes_for(
    num_heads: int,
    kind: str = "balanced",
    schedule: str = "swat",
    window: int | None = None,
    span: Span = DEFAULT_SPAN,
    positive_span: Span | None = None,
) -> Tensor | None:
    """Return the slopes of one layer, negative heads first, float32 `[num_heads]`; None for kind "none".

    Args:
        num_heads: query heads of the layer.
        kind: "balanced" (half negative, half positive; an odd head goes to the negative side), "negative", "positive",
            "none" (no distance bias), or a split "n:m" of n negative and m positive heads, such as "8:4".
        schedule: magnitudes on each side, counted with that side's own number of heads n.
            "swat": 2**-k for k = 1..n (Eq. 4). "alibi": 2**(-8k/n), and ALiBi's own rule where n is no power of two.
            "window": `c / window * 2**-i` for i = 0..n-1, or from `a / window` to `b / window` in equal ratios, so that
            what a slope takes from the oldest key of the window does not depend on the window.
        window: keys a row sees, for the schedule "window".
        span: c, or a and b, of the schedule "window": what the steepest slope, or the first and the last, come to over
            the whole window.
        positive_span: the same of the positive heads; None: as `span`.

    Raises:
        ValueError: a head count below 1, an unknown kind or schedule, a split that does not add up to the heads, a
            schedule that needs a window without one, a span that is not positive.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads: expected at least 1, got {num_heads}")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}; got {schedule!r}")
    if kind == "none":
        return None
    negative, positive = split_heads(num_heads, kind)
    if schedule == "window":
        if window is None:
            raise ValueError(
                "slope_schedule: 'window' divides by the layer's window, and it has none; use 'alibi' or slopes='none' "
                "there"
            )
        of_negative = partial(_over_window, window, checked_span(span))
        of_positive = partial(_over_window, window, checked_span(span if positive_span is None else positive_span))
    else:
        of_negative = of_positive = _powers_of_two if schedule == "swat" else _alibi_magnitudes
    return torch.tensor([-m for m in of_negative(negative)] + of_positive(positive), dtype=torch.float32)


def split_heads(num_heads: int, kind: str) -> tuple[int, int]:
    """Return how many heads have a negative and how many a positive slope."""
    named = {
        "balanced": (num_heads - num_heads // 2, num_heads // 2), "negative": (num_heads, 0), "positive": (0, num_heads)
    }  # fmt: skip
    if kind in named:
        return named[kind]
    match = re.fullmatch(r"(\d+):(\d+)", kind)
    if match is None:
        raise ValueError(f"slopes: expected one of {', '.join(KINDS)} or a split such as '8:4'; got {kind!r}")
    negative, positive = int(match[1]), int(match[2])
    if negative + positive != num_heads:
        raise ValueError(
            f"slopes: the split {kind!r} names {counted(negative + positive, 'head')}, the layer has {num_heads}; "
            f"make the two numbers add up to {num_heads}"
        )
    return negative, positive


def checked_span(span: Span, name: str = "slope_span") -> float | tuple[float, float]:
    """One positive number or two. Raises ValueError, which begins with the setting's name."""
    numbers = tuple(span) if isinstance(span, list | tuple) else (span,)
    if len(numbers) > 2 or not numbers or not all(0 < number < math.inf for number in numbers):
        raise ValueError(f"{name}: expected a positive number, or two as [first, last]; got {span}")
    return numbers if len(numbers) == 2 else numbers[0]


def _over_window(window: int, span: float | tuple[float, float], count: int) -> list[float]:
    if isinstance(span, tuple):
        first, last = span
        # one head has the first
        ratio = (last / first) ** (1 / max(count - 1, 1))
        return [first / window * ratio**i for i in range(count)]
    return [span / window * 2.0**-i for i in range(count)]


def _powers_of_two(count: int) -> list[float]:
    return [2.0**-k for k in range(1, count + 1)]


def _alibi_magnitudes(count: int) -> list[float]:
    # ALiBi's published code: the slopes of the next lower power of two, then every other one of the next higher
    if count == 0:
        return []
    lower = 2 ** math.floor(math.log2(count))
    slopes = [2.0 ** (-8.0 * k / lower) for k in range(1, lower + 1)]
    between = [2.0 ** (-4.0 * k / lower) for k in range(1, 2 * lower + 1, 2)]
    return slopes + between[: count - lower]
