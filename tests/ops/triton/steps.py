"""Steps of decoding compared with the definition, by the kernel itself and on whatever device runs it."""

import dataclasses

import torch
from torch import Tensor

from swat_lm.ops.calls import StepCall
from swat_lm.ops.ring import empty_ring, step_reference
from swat_lm.ops.rotary import apply_rotary, rotary_angles
from tests.ops.triton.calls import assert_close_by_part
from tests.ops.triton.rounding import EPSILON, EXACT_ERROR, Roundings, score_error


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of three sequences: a new one, a young one, one after many windows."""

    # slots, W, H, K, D
    rings: tuple[int, int, int, int, int]
    dtype: torch.dtype = torch.float32
    score_function: str = "sigmoid"
    # programs that share a window; by the rule when None
    splits: int | None = None
    rotary: bool = False
    # rings as `empty_ring` makes them, or places before heads
    head_major: bool = True
    slopes: tuple[float, ...] | None = ()
    score_bias: float | None = None
    scale: float | None = None
    # of the three streams; by the window when None
    positions: tuple[int, int, int] | None = None
    seed: int = 1


def tensors_of(step: Step, device: str = "cpu") -> tuple[list[Tensor], Tensor, Tensor]:
    """What the entry takes, and slopes and biases. What must not be read is NaN."""
    slots, window, heads, kv_heads, head_dim = step.rings
    draw = torch.Generator().manual_seed(step.seed)
    # numbers that every precision holds
    make = lambda *shape: torch.randn(*shape, generator=draw).to(torch.bfloat16).to(torch.float16)  # noqa: E731
    position = torch.tensor(step.positions or (0, window // 2, 7 * window + 3))
    slot = torch.tensor([slots - 1, 0, slots // 2])
    query, key, value = make(3, 1, heads, head_dim), make(3, 1, kv_heads, head_dim), make(3, 1, kv_heads, head_dim)
    like = query.to(step.dtype)
    rings = [
        empty_ring(slots, window, kv_heads, head_dim, like)
        if step.head_major
        else like.new_zeros(slots, window, kv_heads, head_dim)
        for _ in range(2)
    ]
    for ring in rings:
        ring.fill_(float("nan"))
        for own, now in zip(slot.tolist(), position.tolist(), strict=True):
            filled = min(now, window)
            ring[own, :filled] = make(filled, kv_heads, head_dim).to(step.dtype)
    slopes = torch.tensor(step.slopes) if step.slopes else torch.randn(heads, generator=draw) * 0.2
    bias = torch.randn(heads, generator=draw)
    tensors = [query.to(step.dtype), key.to(step.dtype), value.to(step.dtype), *rings, slot, position]
    return [t.to(device) for t in tensors], slopes.to(device), bias.to(device)


def check(step: Step, device: str = "cpu") -> None:
    """Compare the step by the kernel with the definition, and see that it writes one place and reads no other's."""
    from swat_lm.ops.triton import decode

    tensors, slopes, bias = tensors_of(step, device)
    scale = step.rings[-1] ** -0.5 if step.scale is None else step.scale
    cos = sin = None
    rotated = list(tensors)
    if step.rotary:
        cos, sin = rotary_angles(tensors[6][:, None], step.rings[-1])
        rotated[:2] = (apply_rotary(x, cos, sin) for x in tensors[:2])

    def definition(kind: torch.dtype) -> tuple[Tensor, Tensor | None]:
        # a place that nobody wrote is hidden by the definition, but its NaN would spread through zero weights
        call = [t.to(kind) if t.is_floating_point() else t.clone() for t in rotated]
        call[3:5] = (ring.nan_to_num(0.0) for ring in call[3:5])
        wide = torch.float64 if kind == torch.float64 else torch.float32
        given = None if step.slopes is None else slopes.to(wide)
        number = bias.to(wide) if step.score_bias is None else step.score_bias
        return step_reference(*call, given, number, step.score_function, scale)

    exact, exact_lse = definition(torch.float64)
    of_scores = score_error(slopes, step.rings[1], step.score_function, scale, step.rings[-1])
    with Roundings(step.dtype, score_error=of_scores):
        plain, plain_lse = definition(step.dtype)
    before = [ring.clone() for ring in tensors[3:5]]
    call = StepCall(
        *tensors, step.score_function, scale, None if step.slopes is None else slopes,
        bias if step.score_bias is None else None, step.score_bias or 0.0, cos, sin,
    )  # fmt: skip
    output, lse = decode.step(call, step.splits)
    # every sequence by itself
    by_sequence = lambda t: t.transpose(0, 1)  # noqa: E731
    floor = (
        8 * EPSILON * float(tensors[2].abs().max()) * (step.rings[1] if step.score_function == "sigmoid" else 1) ** 0.5
    )
    assert_close_by_part(*map(by_sequence, (output, plain, exact)), "output", 1, floor)
    if exact_lse is not None and plain_lse is not None:
        floor = (2 * of_scores.view(1, 1, -1) + 4 * EXACT_ERROR).double()
        assert_close_by_part(*map(by_sequence, (lse, plain_lse, exact_lse)), "lse", 1, floor)
    for ring, old, new in zip(tensors[3:5], before, rotated[1:3], strict=True):
        place = tensors[6] % step.rings[1]
        # a rotation may be contracted into one rounding, one unit in the last place from two
        bounds = {"atol": 1e-6, "rtol": 2 * torch.finfo(step.dtype).eps} if step.rotary else {"atol": 0, "rtol": 0}
        torch.testing.assert_close(ring[tensors[5], place], new[:, 0], **bounds)
        ring[tensors[5], place] = old[tensors[5], place]
        assert torch.equal(ring.nan_to_num(7.0), old.nan_to_num(7.0)), "only the new place may change"
