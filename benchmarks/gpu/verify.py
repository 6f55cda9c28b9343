"""Whether a candidate computes what its name says, on the very tensors that are timed; wrong ones get no figures.

The last rows of a sequence see the last keys only, and the last keys are seen by the last rows only. So for a few
sequences and heads the definition in float64 gives those rows' outputs and all three gradients exactly, at any length.
Rows at the beginning and in the middle are compared in their outputs, and the latter in their queries' gradients too.
The error may be twice PyTorch's own at the same precision, plus two units in the last place of the largest value.
"""

import torch
from torch import Tensor

from benchmarks.gpu.candidates import Candidate, Inputs
from swat_lm.ops import window_attention

ROWS = 128
NAMES = ("output", "gradient of the query", "gradient of the key", "gradient of the value")


class WrongResultError(Exception):
    """A candidate whose result differs from the definition; the message says by how much."""


def verify(candidate: Candidate, inputs: Inputs, backward: bool) -> None:
    """Compare a candidate with the definition on the first set of inputs.

    Raises:
        WrongResultError: a result that is not finite or not as exact as PyTorch's own.
    """
    *tensors, d_output = inputs.sets[0]
    leaves = [candidate.arrange(t).detach().requires_grad_(backward) for t in tensors]
    with torch.set_grad_enabled(backward), candidate.applied():
        output = candidate.attend(*leaves)
        results = [output.detach()]
        if backward:
            results += torch.autograd.grad(output, leaves, candidate.arrange(d_output))
    results = [candidate.arrange(t) for t in results]
    for name, result in zip(NAMES, results, strict=False):
        if not result.isfinite().all():
            raise WrongResultError(f"the {name} is not finite")
    batches, length = sorted({0, inputs.shape.batch - 1}), inputs.shape.length
    for kv_head in sorted({0, inputs.shape.kv_heads - 1}):
        _check_span(candidate, inputs, results, batches, kv_head, max(0, length - ROWS), length)
        # the first rows, where the window is still growing; their keys are seen by later rows too
        _check_span(candidate, inputs, results[:1], batches, kv_head, 0, min(ROWS, length))
        # and some in the middle, at no multiple of any tile, with the gradient of their queries
        middle = length // 2 + 5
        _check_span(candidate, inputs, results[:2], batches, kv_head, middle, min(middle + ROWS, length))


def _check_span(
    candidate: Candidate, inputs: Inputs, results: list[Tensor], batches: list[int], kv_head: int, begin: int, end: int
) -> None:
    group, window = inputs.shape.group, inputs.shape.window
    oldest = max(0, begin - window + 1)
    heads = slice(kv_head * group, (kv_head + 1) * group)
    query, key, value, d_output = inputs.sets[0]
    part = [query[batches, begin:end, heads], *(t[batches, oldest:end, kv_head, None] for t in (key, value))]
    d_part = d_output[batches, begin:end, heads]
    slopes = inputs.slopes[heads] if candidate.has_slopes else None
    exact = _definition(part, d_part, torch.float64, slopes, window, candidate.score_function, len(results) > 1)
    plain = _definition(part, d_part, query.dtype, slopes, window, candidate.score_function, len(results) > 1)
    found = [results[0][batches, begin:end, heads]]
    if len(results) > 1:
        found.append(results[1][batches, begin:end, heads])
        found += [t[batches, begin:end, kv_head, None] for t in results[2:]]
    for name, ours, theirs, right in zip(NAMES, found, plain, exact, strict=False):
        # of the keys only those that no earlier row sees
        check_against(name, ours, theirs[:, -ours.shape[1] :], right[:, -ours.shape[1] :])


def check_against(name: str, ours: Tensor, pytorch: Tensor, exact: Tensor) -> None:
    """Compare a result and PyTorch's plain one at the same precision with the definition in float64.

    Raises:
        WrongResultError: it is not finite, or its error is more than twice PyTorch's own and the rounding floor.
    """
    error, own = (_largest(t.double() - exact) for t in (ours, pytorch))
    allowed = 2 * own + 2 * torch.finfo(ours.dtype).eps * _largest(exact)
    # also false for NaN
    if not error <= allowed:
        raise WrongResultError(f"the {name} is wrong by {error:.2g}, allowed is {allowed:.2g}")


def _definition(
    tensors: list[Tensor],
    d_output: Tensor,
    dtype: torch.dtype,
    slopes: Tensor | None,
    window: int,
    score_function: str,
    backward: bool,
) -> list[Tensor]:
    leaves = [t.to(dtype).requires_grad_(backward) for t in tensors]
    output = window_attention(
        *leaves, window=window, score_function=score_function, slopes=slopes, backend="reference"
    )  # fmt: skip
    assert isinstance(output, Tensor)
    if not backward:
        return [output]
    return [output.detach(), *torch.autograd.grad(output, leaves, d_output.to(dtype))]


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item()
