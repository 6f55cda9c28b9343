"""One decoding step over full rings: ours beside what a softmax user has, each replayed from a CUDA graph."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import work
from benchmarks.gpu.candidates import NotHereError, sets_that_leave_the_cache
from benchmarks.gpu.comparison import Result, one_line, peer_failures, take_turns
from benchmarks.gpu.device import Device
from benchmarks.gpu.peers import OURS, OURS_SOFTMAX, import_peer
from benchmarks.gpu.shapes import Shape
from benchmarks.gpu.verify import WrongResultError, check_against
from swat_lm.ops import window_attention_step
from swat_lm.ops.ring import empty_ring
from swat_lm.ops.slopes import slopes_for


class StepInputs(NamedTuple):
    """What one step takes; the rings are full and ragged in position."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_ring: Tensor
    value_ring: Tensor
    slot: Tensor
    position: Tensor


@dataclass(frozen=True)
class StepCandidate:
    """One way of taking a step."""

    name: str
    step: Callable[[StepInputs], Tensor]
    score_function: str
    has_slopes: bool = False
    token_major: bool = False
    """Whether rings lie as `[B, W, K, D]` in memory instead of head by head."""


StepPeer = Callable[[Shape, Tensor], StepCandidate]


def draw_inputs(shape: Shape, device: torch.device, token_major: bool, seed: int = 0) -> StepInputs:
    """Rings of streams that are at least one window old, the same values in either layout."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device, dtype=shape.dtype)

    query = draw(shape.batch, 1, shape.heads, shape.head_dim)
    key, value = (draw(shape.batch, 1, shape.kv_heads, shape.head_dim) for _ in range(2))

    def draw_ring() -> Tensor:
        ring = draw(shape.batch, shape.window, shape.kv_heads, shape.head_dim)
        return ring if token_major else empty_ring(*ring.shape, like=query).copy_(ring)

    slot = torch.arange(shape.batch, device=device)
    return StepInputs(query, key, value, draw_ring(), draw_ring(), slot, shape.length + 37 * slot)


def ours(backend: str = "triton", score_function: str = "sigmoid") -> StepPeer:
    """The operator's second entry."""

    def build(shape: Shape, slopes: Tensor) -> StepCandidate:
        own_slopes = slopes if score_function == "sigmoid" else None

        def step(inputs: StepInputs) -> Tensor:
            output = window_attention_step(*inputs, score_function=score_function, slopes=own_slopes, backend=backend)
            assert isinstance(output, Tensor)
            return output

        name = {"sigmoid": OURS, "softmax": OURS_SOFTMAX}[score_function]
        name = name if backend == "triton" else f"{name}, {backend}"
        return StepCandidate(name, step, score_function, own_slopes is not None)

    return build


def sdpa(shape: Shape, slopes: Tensor) -> StepCandidate:
    """PyTorch's scaled_dot_product_attention over full rings, after writing the new token's place."""

    def step(inputs: StepInputs) -> Tensor:
        _write(inputs)
        query, keys, values = (t.transpose(1, 2) for t in (inputs.query, inputs.key_ring, inputs.value_ring))
        return F.scaled_dot_product_attention(query, keys, values, enable_gqa=shape.group > 1).transpose(1, 2)

    return StepCandidate("SDPA", step, "softmax")


def flash(name: str, module: str) -> StepPeer:
    """FlashAttention's kernel for caches, over full rings, after writing the new token's place."""

    def build(shape: Shape, slopes: Tensor) -> StepCandidate:
        function = import_peer(module, "flash_attn_with_kvcache")
        lengths = torch.full((shape.batch,), shape.window, dtype=torch.int32, device=slopes.device)

        def step(inputs: StepInputs) -> Tensor:
            _write(inputs)
            return function(inputs.query, inputs.key_ring, inputs.value_ring, cache_seqlens=lengths)

        return StepCandidate(name, step, "softmax", token_major=True)

    return build


def _write(inputs: StepInputs) -> None:
    place = inputs.position.remainder(inputs.key_ring.shape[1])
    inputs.key_ring[inputs.slot, place] = inputs.key[:, 0]
    inputs.value_ring[inputs.slot, place] = inputs.value[:, 0]


STEP_PEERS: Mapping[str, StepPeer] = {
    OURS: ours(),
    OURS_SOFTMAX: ours(score_function="softmax"),
    "flash-attn 3": flash("flash-attn 3", "flash_attn_interface"),
    "flash-attn 2": flash("flash-attn 2", "flash_attn"),
    "SDPA": sdpa,
    f"{OURS}, blocked": ours("blocked"),
}


def verify_step(candidate: StepCandidate, shape: Shape, slopes: Tensor) -> None:
    """Compare a step's output and what it wrote with the definition, for some of the sequences.

    Raises:
        WrongResultError: a result that is not finite or not as exact as PyTorch's own.
    """
    inputs = draw_inputs(shape, slopes.device, candidate.token_major)
    options: dict[str, Any] = {"score_function": candidate.score_function, "backend": "reference"}
    options["slopes"] = slopes if candidate.has_slopes else None
    # in float64 the rings of all of them would not fit beside those that are timed
    some = sorted({0, shape.batch // 2, shape.batch - 1})
    definitions = []
    for dtype in (torch.float64, shape.dtype):
        copy = StepInputs(*(t[some].to(dtype) if t.is_floating_point() else t[some] for t in inputs))
        copy = copy._replace(slot=torch.arange(len(some), device=slopes.device))
        definitions.append((window_attention_step(*copy, **options), copy.key_ring, copy.value_ring))
    output = candidate.step(inputs)
    found = (output[some], inputs.key_ring[some], inputs.value_ring[some])
    for name, ours, right, plain in zip(("output", "key ring", "value ring"), found, *definitions, strict=True):
        check_against(name, ours, plain, right)


class StepRotation:
    """Steps over rotating rings, captured once, replayed as one."""

    def __init__(self, candidate: StepCandidate, sets: list[StepInputs], device: Device) -> None:
        self.candidate, self.sets, self.device = candidate, sets, device
        self._repeats, self._replay = 1, None

    @property
    def repeats(self) -> int:
        """Steps of one replay."""
        return self._repeats

    @repeats.setter
    def repeats(self, count: int) -> None:
        self._repeats, self._replay = count, None

    def run(self) -> None:
        """Take the steps one by one."""
        for turn in range(self._repeats):
            self.candidate.step(self.sets[turn % len(self.sets)])

    def timed_by(self, clock: Callable[[Callable[[], Any]], float]) -> float:
        """Seconds of one step."""
        if self._replay is None:
            self._replay = self.device.capture(self.run)
        return clock(self._replay) / self._repeats


@torch.inference_mode()
def compare_steps(shape: Shape, device: Device, peers: Mapping[str, StepPeer], rounds: int) -> Result:
    """Time a step of every candidate that takes the right one."""
    slopes = slopes_for(shape.heads)
    assert slopes is not None
    slopes = slopes.to(device.torch_device)
    num_sets = sets_that_leave_the_cache(work.least_bytes(shape, "decode"), device.cache_bytes)
    # by layout, of those that some candidate takes
    sets: dict[bool, list[StepInputs]] = {}
    rotations, absent = [], {}
    for name, build in peers.items():
        try:
            candidate = build(shape, slopes)
            verify_step(candidate, shape, slopes)
            layout = candidate.token_major
            if layout not in sets:
                sets[layout] = [draw_inputs(shape, device.torch_device, layout, seed) for seed in range(num_sets)]
        except NotHereError as error:
            absent[name] = str(error)
        except WrongResultError as error:
            absent[name] = f"refused, {error}"
        except peer_failures() as error:
            absent[name] = one_line(error)
        else:
            rotations.append((candidate.name, "", StepRotation(candidate, sets[candidate.token_major], device)))
        device.free()
    result = take_turns(rotations, device, rounds)
    result.absent |= absent
    return result
