"""Calls of `window_attention` compared with the definition, outputs and every gradient, on whatever device runs them.

An error may be twice that of PyTorch's plain computation with the same roundings (rounding.py), looked at by head and
part of the sequence: what is wrong in few places, or for one head, does not hide behind others that are large.
"""

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from swat_lm.ops import window_attention
from swat_lm.ops.reference import distances
from swat_lm.ops.rotary import rotary_angles
from tests.ops.test_backends import NAMES, make_inputs, ragged
from tests.ops.triton.rounding import EPSILON, EXACT_ERROR, LARGEST_TILE, Roundings, score_error

# tokens whose errors are looked at together, and the fewest numbers
PART, FEWEST = 32, 1024
# by which a weight may be off that is not computed
SATURATED = 4.2e-8


@dataclasses.dataclass(frozen=True)
class Call:
    """One call, in words that can be printed and drawn at random."""

    # B, T, S, H, K, D
    shape: tuple[int, int, int, int, int, int]
    window: int | None
    dtype: torch.dtype = torch.bfloat16
    score_function: str = "sigmoid"
    # of the heads; None is no bias, () draws them
    slopes: tuple[float, ...] | None = ()
    # a tensor of one's own drawing when None
    score_bias: float | None = None
    scale: float | None = None
    # "first", "last", "both": at random; "documents"; "padding": the first rows see nothing
    visible: str | None = None
    precision: str = "auto"
    skip_saturated: bool = False
    # "shared": angles of one row for all sequences; "own": of each sequence
    rotary: str | None = None
    return_lse: bool = False
    # how inputs lie in memory: "fresh", "heads first", "channels apart", "joined"
    layout: str = "fresh"
    # of the backward; by the rule when None
    form: str | None = None
    seed: int = 0

    def __str__(self) -> str:
        # what differs from a plain call
        changed = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changed = {f.name: changed[f.name] for f in dataclasses.fields(self) if changed[f.name] != f.default}
        return ", ".join(f"{name} {value}" for name, value in changed.items())

    def replace(self, **changes: Any) -> "Call":
        """Return another call, with some things changed."""
        return dataclasses.replace(self, **changes)

    @property
    def reach(self) -> int:
        """Keys that a row may see."""
        return self.shape[2] if self.window is None else min(self.window, self.shape[2])

    @property
    def factor(self) -> float:
        """Of a product."""
        return self.shape[5] ** -0.5 if self.scale is None else self.scale

    @property
    def fast(self) -> bool:
        """Whether weights may come from tanh."""
        if self.score_function == "softmax" or self.dtype == torch.float32:
            return False
        hides_error = self.score_bias is not None and self.score_bias >= -2.0
        return self.precision == "fast" or (self.precision == "auto" and hides_error)

    def inputs(self) -> list[Tensor]:
        """Query, key, value, slopes and score bias that every precision holds, float64."""
        inputs = [t.to(torch.bfloat16).to(torch.float16).double() for t in make_inputs(self.shape, self.seed)]
        inputs[3] = torch.tensor(self.slopes, dtype=torch.float64) if self.slopes else inputs[3] / 8
        return inputs

    def visibility(self, device: str) -> list[Tensor | None]:
        """The first and the last visible key of every row."""
        batch, num_queries, num_keys, *_ = self.shape
        first, last = ragged(self.shape, self.seed)
        row = torch.arange(num_keys - num_queries, num_keys, dtype=torch.int32).expand(batch, -1)
        given = {
            None: (None, None), "first": (first, None), "last": (None, last), "both": (first, last),
            "documents": (row // 45 * 45, None), "padding": (torch.full_like(row, num_keys // 3), None),
        }[self.visible]  # fmt: skip
        return [None if t is None else t.to(device) for t in given]


def check(call: Call, device: str = "cpu") -> None:
    """Compare the call by the kernels with the definition."""
    with Roundings(torch.float64) as exact_mode:
        exact = run(call, torch.float64, "reference", device)
    of_scores = score_error(call.inputs()[3], call.reach, call.score_function, call.factor, call.shape[5]).to(device)
    shift_error = (exact["output"] * incoming(call, exact["output"], "output")).square().sum(dim=-1).sqrt()
    shift_error = torch.finfo(call.dtype).eps / 2 * shift_error.transpose(1, 2)[..., None].float()
    with Roundings(call.dtype, call.fast, of_scores, shift_error) as plain_mode:
        plain = run(call, call.dtype, "reference", device)
    with backward_form(call.form):
        ours = run(call, call.dtype, "triton", device)
    floors = _floors(call, exact_mode, plain_mode, of_scores)
    for name, expected in exact.items():
        if name in ("slopes", "score_bias"):
            _assert_sums(ours[name], plain[name], expected, exact_mode, plain_mode, call, name)
        else:
            part = max(PART, FEWEST // call.shape[5])
            assert_close_by_part(ours[name], plain[name], expected, name, part, floors[name])


def check_fast_weights(device: str = "cpu") -> None:
    """The bounds of both precisions, over every score that matters, and never NaN for large ones."""
    scores = torch.cat((torch.linspace(-30, 30, 62), torch.tensor([1e4, -1e4]))).to(device)
    query = torch.ones(1, 1, 64, 16, device=device, dtype=torch.bfloat16)
    key, value = query[:, :, :1] * 0, query[:, :, :1]
    for precision, bound in (("fast", 2.5e-4), ("exact", 3e-7)):
        output = window_attention(
            query, key, value, window=1, score_bias=scores, precision=precision, backend="triton"
        )  # fmt: skip
        assert isinstance(output, Tensor)
        exact = torch.sigmoid(scores.double())[None, None, :, None]
        # the output is rounded to bfloat16
        assert ((output.double() - exact).abs() <= bound + 2.0**-8 * exact).all()


def run(call: Call, dtype: torch.dtype, backend: str, device: str) -> dict[str, Tensor]:
    """Outputs and gradients, for an incoming gradient that does not depend on the outputs."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = [t.to(device, dtype if i < 3 else wide).requires_grad_() for i, t in enumerate(call.inputs())]
    query, key, value = arranged(tensors[:3], call.layout)
    angles = None
    if call.rotary is not None:
        # far into a stream, and one sequence elsewhere than another
        starts = 1000 * torch.arange(call.shape[0])[:, None] if call.rotary == "own" else torch.tensor(0)
        angles = rotary_angles((torch.arange(call.shape[1]) + 7 + starts).to(device), call.shape[5])
    options = {} if backend == "reference" else {"precision": call.precision, "skip_saturated": call.skip_saturated}
    first, last = call.visibility(device)
    result = window_attention(
        query, key, value, window=call.window, score_function=call.score_function, scale=call.scale,
        slopes=None if call.slopes is None else tensors[3],
        score_bias=tensors[4] if call.score_bias is None else call.score_bias,
        first_visible=first, last_visible=last, rotary=angles, return_lse=call.return_lse, backend=backend, **options,
    )  # fmt: skip
    outputs = dict(zip(("output", "lse"), result if isinstance(result, tuple) else (result,), strict=False))
    cotangents = [incoming(call, t, name) for name, t in outputs.items()]
    wanted = dict(zip(NAMES, tensors, strict=True))
    if call.slopes is None:
        del wanted["slopes"]
    if call.score_bias is not None:
        del wanted["score_bias"]
    gradients = torch.autograd.grad(tuple(outputs.values()), tuple(wanted.values()), cotangents)
    return {k: t.detach() for k, t in (outputs | dict(zip(wanted, gradients, strict=True))).items()}


def incoming(call: Call, output: Tensor, name: str) -> Tensor:
    """Return the gradient that comes in for an output, which every precision holds."""
    draw = torch.Generator().manual_seed(call.seed + len(name))
    gradient = torch.randn(output.shape, generator=draw).to(torch.bfloat16).to(output.device, output.dtype)
    return arranged([gradient], call.layout)[0] if name == "output" else gradient


def arranged(tensors: list[Tensor], layout: str) -> list[Tensor]:
    """Return the same numbers, lying otherwise in memory."""
    if layout == "heads first":
        return [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    if layout == "channels apart":
        return [torch.stack((t, torch.full_like(t, 3.0)), dim=-1)[..., 0] for t in tensors]
    if layout == "joined" and len({t.shape[1] for t in tensors}) == 1:
        # one projection for all three
        return list(torch.cat(tensors, dim=2).split([t.shape[2] for t in tensors], dim=2))
    return tensors


@contextmanager
def backward_form(form: str | None) -> Iterator[None]:
    """Force a form of the backward, or leave it to the rule."""
    before = os.environ.pop("SWAT_LM_BACKWARD", None)
    try:
        if form is not None:
            os.environ["SWAT_LM_BACKWARD"] = form
        yield
    finally:
        os.environ.pop("SWAT_LM_BACKWARD", None)
        if before is not None:
            os.environ["SWAT_LM_BACKWARD"] = before


def _floors(call: Call, exact_mode: Roundings, plain_mode: Roundings, of_scores: Tensor) -> dict[str, Any]:
    """Return what is allowed in any case: errors of single pairs, of which few may meet, and those of skipped tiles."""
    query, key, *_ = (t.abs().max() for t in call.inputs())
    scale = abs(call.factor)
    # where large numbers cancel float32's own errors show, too
    errors = plain_mode.d_scores.double() - exact_mode.d_scores
    rounded = torch.finfo(call.dtype).eps / 2 * exact_mode.d_scores
    squares = errors.square() + rounded.square() + (8 * EPSILON * exact_mode.sizes).square()
    by_row = squares.sum(dim=3).sqrt().transpose(1, 2)
    by_key = squares.sum(dim=2).unflatten(1, (call.shape[4], -1)).sum(dim=2).sqrt().transpose(1, 2)
    pairs = call.reach, call.shape[1] * call.shape[3] // call.shape[4]
    of_row, of_key = (SATURATED * call.skip_saturated * number * call.shape[5] ** 0.5 for number in pairs)
    return {
        "output": of_row,
        "query": of_row + scale * key * by_row,
        "key": of_key + scale * query * by_key,
        "value": of_key,
        "lse": (2 * of_scores.view(1, 1, -1) + 4 * EXACT_ERROR).double(),
    }


def assert_close_by_part(
    ours: Tensor, plain: Tensor, exact: Tensor, name: str, part: int, floor: Tensor | float = 0.0
) -> None:
    """Compare tensors `[B, tokens, heads, ...]` by head and part of the sequence.

    Args:
        ours, plain, exact: by a kernel, by PyTorch with a kernel's roundings, and in float64.
        name: of the result.
        part: tokens whose errors are looked at together.
        floor: what is allowed in any case, `[B, tokens, heads]`, or of a shape that expands to it.
    """
    assert ours.shape == exact.shape, f"{name}: shape {list(ours.shape)}, expected {list(exact.shape)}"
    finite = exact.isfinite()
    assert torch.equal(ours.isfinite(), finite), f"{name}: finite where the definition is not, or the other way round"
    assert torch.equal(ours[~finite].double(), exact[~finite]), f"{name}: another infinity"
    exact = exact.where(finite, 0.0)
    error, plain_error = (_largest(x.where(finite, 0.0).double() - exact, part) for x in (ours, plain))
    # and one unit in the last place of the largest number beside it
    allowed = 2 * plain_error + torch.finfo(ours.dtype).eps * _largest(exact, part)
    # weights below 2^-126 are 0 on a GPU
    allowed += _largest(torch.as_tensor(floor + 2.0**-120, device=exact.device).expand(exact.shape[:3]), part)
    times = (error / allowed).nan_to_num(0.0)
    if (times > 1.0).any():
        worst, head = divmod(int(times.argmax()), times.shape[1])
        raise AssertionError(
            f"{name}: head {head}, tokens from {worst * part} on: error {error[worst, head]:.3e}, allowed "
            f"{allowed[worst, head]:.3e}; {int((times > 1.0).sum())} of {times.numel()} parts are off"
        )


def _largest(x: Tensor, part: int) -> Tensor:
    """Return the largest magnitude by part and head, `[parts, heads]`."""
    x = x.abs()[..., None] if x.dim() == 3 else x.abs()
    x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % part))
    return x.unflatten(1, (-1, part)).amax(dim=(0, 2, 4))


def _assert_sums(
    ours: Tensor, plain: Tensor, exact: Tensor, exact_mode: Roundings, plain_mode: Roundings, call: Call, name: str
) -> None:
    """Compare one number per head, a sum over all pairs, each of which has an error of its own."""
    weight = tile_weight = torch.ones((), device=exact.device)
    if name == "slopes":
        first, last = call.visibility(str(exact.device))
        distance, _ = distances(*call.shape[:3], first, last, call.window, exact.device)
        # distances are counted from a tile's first key
        weight, tile_weight = distance[:, None], distance.clamp_min(0)[:, None] + LARGEST_TILE
    errors = (plain_mode.d_scores - exact_mode.d_scores) * weight
    # errors of pairs are as good as independent, or have one origin per row
    luck = torch.maximum(_root(errors), _root(errors.sum(dim=3, keepdim=True)))
    allowed = 2 * (plain.double() - exact).abs() + 4 * luck + 16 * EPSILON * _root(exact_mode.sizes * tile_weight)
    pairs = call.shape[0] * call.shape[1] * call.reach
    skipped = SATURATED * call.skip_saturated * (call.reach if name == "slopes" else 1)
    allowed += 4 * skipped * (pairs * call.shape[5]) ** 0.5
    error = (ours.double() - exact).abs()
    assert (error <= allowed).all(), f"{name}: errors {error.tolist()}, allowed {allowed.tolist()}"


def _root(x: Tensor) -> Tensor:
    """Return the root of the sum of squares by head."""
    return x.square().sum(dim=(0, 2, 3)).sqrt()
