"""What is measured of one way to train: the longest row that fits, the peak there and along a curve, the gradient.

A peak is that of the bytes of live tensors of a forward and a backward pass, counted by a hook on every operation;
weights and optimizer (12 bytes a parameter, gradients are in the pass) are added to it.
"""

import math
import tempfile
import time
from typing import Any

import torch
from torch import Tensor

from swat_lm import SwatForCausalLM
from swat_lm.model.execution.live_bytes import LiveBytes
from swat_lm.model.execution.predicted import Predicted
from swat_lm.papers.blockwise.methods import METHODS, configuration, execution_settings
from swat_lm.papers.blockwise.scales import Measure, Size
from swat_lm.papers.scales import Scale

__all__ = ["gradients_of_all", "longest_and_peaks"]

FARTHEST = 2**24
"""Tokens beyond which no length is asked for: 16 million."""
FIRST, NEAR = 64, 0.01


def longest_and_peaks(name: str, size: Size, scale: Scale, measure: Measure) -> dict[str, Any]:
    """Of one method and model: tokens of the longest row, predicted peaks, and those counted where they are run."""
    method = METHODS[name]
    predicted = Predicted(
        configuration(method, size, scale), method.execution, execution_settings(method, scale), narrow=measure.narrow,
        shards=size.shards,
    )  # fmt: skip
    longest = longest_row(predicted, size.available)
    most = measure.most_windowed if method.windowed else measure.most_measured
    lengths = sorted({*measure.curve, longest} if longest <= most else set(measure.curve))
    points = []
    for tokens in lengths:
        need = predicted.need(tokens)
        if need.total <= size.available and tokens <= most:
            peak, seconds = counted(name, size, scale, tokens)
            points.append({
                "tokens": tokens, "predicted": need.total, "counted": need.weights + need.optimizer + peak,
                "seconds": seconds,
            })  # fmt: skip
    at_longest = predicted.need(max(longest, 1))
    held = at_longest.weights + at_longest.optimizer
    return {"longest": longest, "predicted": at_longest.total, "held": held, "points": points}


def longest_row(predicted: Predicted, available: int) -> int:
    """Tokens of the longest row whose predicted peak fits, to within one per cent; 0 where none of 64 does."""

    needs: dict[int, int] = {}

    def fits(tokens: int) -> bool:
        needs[tokens] = predicted.need(tokens).total
        return needs[tokens] <= available

    low, high = FIRST, 4 * FIRST
    if not fits(low):
        return 0
    while fits(high):
        if high >= FARTHEST:
            return FARTHEST
        low, high = high, 4 * high
    while high - low > max(1, low * NEAR):
        # between the two memory grows with about some power of the length; each prediction takes a second
        power = math.log(needs[high] / needs[low]) / math.log(high / low)
        step = max(1, int(low * NEAR / 2))
        guess = min(max(int(low * (available / needs[low]) ** (1 / power)), low + step), high - step)
        if not fits(guess):
            high = guess
            continue
        low = guess
        # perhaps as near as it must be
        guess = min(low + 2 * step, high - 1)
        if guess > low and not fits(guess):
            high = guess
    return low


def counted(name: str, size: Size, scale: Scale, tokens: int) -> tuple[int, float]:
    """Peak bytes of one pass over a row, and its seconds (of a pass that is counted: the hook takes time)."""
    torch.manual_seed(0)
    method = METHODS[name]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = SwatForCausalLM(configuration(method, size, scale)).train()
    model.to(device)
    ids = torch.randint(size.vocabulary, (1, tokens), device=device)
    with tempfile.TemporaryDirectory() as folder:
        own = execution_settings(method, scale)
        model.set_execution(method.execution, **own, **({"folder": folder} if method.execution == "chunks" else {}))
        begun = time.perf_counter()
        with LiveBytes() as live:
            model(ids, labels=ids).loss.backward()
    return live.peak, time.perf_counter() - begun


def gradients_of_all(size: Size, scale: Scale, tokens: int) -> dict[str, Any]:
    """How far loss and gradients of each method are from those of the first of its model, in float64.

    The gradient's is the largest difference of a number over the largest number of its weight, of the worst weight.
    """
    found: dict[str, Any] = {}
    expected: dict[bool, tuple[Tensor, dict[str, Tensor]]] = {}
    ids = torch.randint(size.vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))
    for name, method in METHODS.items():
        torch.manual_seed(0)
        model = SwatForCausalLM(configuration(method, size, scale)).double().train()
        own = execution_settings(method, scale)
        model.set_execution(method.execution, **{key: value for key, value in own.items() if key != "carries"})
        loss = model(ids, labels=ids).loss
        loss.backward()
        gradients = {key: each.grad for key, each in model.named_parameters() if each.grad is not None}
        right, wanted = expected.setdefault(method.windowed, (loss.detach(), gradients))
        differences = [
            float((gradients[key] - each).abs().max() / each.abs().max().clamp(min=1e-300))
            for key, each in wanted.items()
        ]
        found[name] = {"loss": float((loss.detach() - right).abs() / right), "gradient": max(differences)}
    return found
