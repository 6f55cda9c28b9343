"""One comparison: build the candidates, refuse the wrong ones, time the rest in turns, and put the figures in a row."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from benchmarks import measure
from benchmarks.gpu import work
from benchmarks.gpu.candidates import Candidate, Inputs, NotHereError, Rotation, sets_that_leave_the_cache
from benchmarks.gpu.device import Device, Roof
from benchmarks.gpu.peers import Peer
from benchmarks.gpu.shapes import Shape
from benchmarks.gpu.verify import WrongResultError, verify

# how libraries that are not ours say that they cannot serve a call: out of memory and compilers' errors among them
FAILURES: tuple[type[Exception], ...] = (RuntimeError, ValueError, TypeError, AssertionError, ImportError)
# one round of one candidate lasts about this long, in at most so many calls: those that the host can queue in the
# clock's head start
ROUND_SECONDS, MOST_REPEATS = 0.02, 64


def peer_failures() -> tuple[type[Exception], ...]:
    """What a peer may raise; Triton's compiler has errors of its own."""
    try:
        from triton.errors import TritonError
    except ImportError:
        return FAILURES
    return (*FAILURES, TritonError)


class Timed(Protocol):
    """Repeated calls of one candidate."""

    repeats: int

    def timed_by(self, clock: Callable[[Callable[[], Any]], float]) -> float:
        """Seconds of one call."""
        ...


@dataclass
class Result:
    """What one comparison found: seconds by candidate, the settings that won, and why others are absent."""

    timings: dict[str, measure.Timing] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def details(self) -> dict[str, Any]:
        """Everything, for the result file."""
        return {
            "seconds": {name: list(timing.seconds) for name, timing in self.timings.items()},
            "settings": self.settings,
            "absent": self.absent,
        }


def admit(
    shape: Shape, inputs: Inputs, device: Device, peers: Mapping[str, Peer], thorough: bool, backward: bool
) -> tuple[list[Candidate], dict[str, str]]:
    """Build every peer's candidates and keep those whose results are right; also why others are absent."""
    admitted, absent = [], {}
    for name, build in peers.items():
        try:
            candidates = build(shape, inputs.slopes, device, thorough)
        except NotHereError as error:
            absent[name] = str(error)
            continue
        except peer_failures() as error:
            absent[name] = one_line(error)
            continue
        for candidate in candidates:
            try:
                verify(candidate, inputs, backward)
            except WrongResultError as error:
                absent[candidate.label] = f"refused, {error}"
            except peer_failures() as error:
                absent[candidate.label] = one_line(error)
            else:
                admitted.append(candidate)
        device.free()
    return admitted, absent


def compare(
    shape: Shape, tasks: Iterable[str], device: Device, peers: Mapping[str, Peer], rounds: int, thorough: bool
) -> dict[str, Result]:
    """Time all admitted candidates of a shape, by task; of several settings of one peer the fastest."""
    device.forget_compiled()
    set_bytes = work.least_bytes(shape, "forward")
    inputs = Inputs(shape, device.torch_device, sets_that_leave_the_cache(set_bytes, device.cache_bytes))
    tasks = tuple(tasks)
    admitted, absent = admit(shape, inputs, device, peers, thorough, backward="backward" in tasks)
    results = {}
    for task in tasks:
        rotations = [(c.name, c.settings, Rotation(c, task, inputs)) for c in admitted]
        results[task] = take_turns(rotations, device, rounds)
        results[task].absent |= absent
    return results


def take_turns(rotations: Iterable[tuple[str, str, Timed]], device: Device, rounds: int) -> Result:
    """Choose every peer's fastest setting by a first timing, which also sets the calls of a round; time the chosen."""
    result = Result()
    chosen: dict[str, tuple[float, Timed]] = {}
    for name, settings, rotation in rotations:
        try:
            rotation.timed_by(device.clock)
            seconds = rotation.timed_by(device.clock)
        except peer_failures() as error:
            result.absent[f"{name}, {settings}" if settings else name] = one_line(error)
            device.free()
            continue
        rotation.repeats = max(1, min(MOST_REPEATS, round(ROUND_SECONDS / max(seconds, 1e-9))))
        if name not in chosen or seconds < chosen[name][0]:
            chosen[name] = seconds, rotation
            result.settings[name] = settings
    if not chosen:
        return result
    result.timings = measure.take_turns(
        {name: rotation for name, (_, rotation) in chosen.items()},  # type: ignore[misc]
        rounds,
        clock=lambda rotation: rotation.timed_by(device.clock),
    )
    device.free()
    return result


def make_row(shape: Shape, task: str, result: Result, roof: Roof, ours: str) -> dict[str, Any]:
    """One line of the table: our figures, then other candidates' milliseconds and how many times faster we are."""
    row: dict[str, Any] = {"shape": str(shape), "task": task}
    mine = result.timings.get(ours)
    if mine is None:
        reasons = [f"{name}: {reason}" for name, reason in result.absent.items() if name.startswith(ours)]
        return {**row, "no figures": "; ".join(reasons) or "not among the candidates"}
    flops = work.useful_flops(shape, task)
    least = work.roof_seconds(shape, task, roof.flops_per_second, roof.bytes_per_second)
    row |= {
        "setting": result.settings.get(ours, ""),
        "ms": mine.median * 1e3,
        "TFLOP/s": flops / mine.median / 1e12,
        "share of products": flops / mine.median / roof.flops_per_second,
        "share of memory": work.least_bytes(shape, task) / mine.median / roof.bytes_per_second,
        "share of roof": least / mine.median,
    }
    for name, timing in result.timings.items():
        if name != ours:
            row |= {f"{name} ms": timing.median * 1e3, f"times {name}": mine.times_faster_than(timing)}
    return row


def one_line(error: Exception) -> str:
    """What went wrong in a peer, without the screens that compilers add to it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kind = "out of memory" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
    return f"{kind}: {lines[0][:160]}" if lines else kind
