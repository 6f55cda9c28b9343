"""Measures tiles and the backward's form on the GPU at hand, once, when asked to; `configurations.py` reads its file.

Nothing is tuned at first use: a call without the file runs by the table. Under the interpreter there is nothing to
measure, and `tune` refuses. `swat-lm tune` is this as a command.
"""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from swat_lm.files import write_text
from swat_lm.ops.triton.availability import why_not
from swat_lm.ops.triton.configurations import (
    BACKWARD_FORMS,
    FORM,
    TILES_VARIABLE,
    Problem,
    Tile,
    Tuned,
    forget_tuned,
    read_tuned,
    rule_form,
    table_tile,
    tuned_key,
    using_tuned,
)

FIVE_PRODUCTS = "backward key, five products"
# a kernel, the tiles tried for it beside the table's own
CANDIDATES = {
    "forward": [
        Tile(64, 64, 4, 2), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3, 168), Tile(128, 64, 8, 2), Tile(128, 64, 8, 3),
        Tile(128, 128, 8, 2), Tile(64, 128, 4, 2), Tile(64, 32, 4, 3), Tile(128, 32, 8, 3),
    ],
    "backward query": [
        Tile(64, 64, 4, 2), Tile(64, 64, 4, 2, 168), Tile(128, 64, 8, 2), Tile(64, 32, 4, 2), Tile(128, 32, 8, 2),
    ],
    "backward key": [
        Tile(64, 64, 4, 2), Tile(64, 128, 8, 2), Tile(32, 64, 4, 2), Tile(32, 128, 8, 2), Tile(32, 128, 8, 3),
    ],
    FIVE_PRODUCTS: [Tile(64, 128, 8, 2), Tile(32, 128, 8, 2), Tile(64, 64, 4, 2), Tile(32, 64, 4, 2)],
}  # fmt: skip
# what a backward can be tuned in, in this order: both forms on their best tiles, then the faster of the two
BACKWARD = ("backward query", "backward key", FIVE_PRODUCTS, FORM)
KERNELS = ("forward", *BACKWARD)
# cycles, about 3 ms, for which the GPU waits while the host queues what is timed: a small call takes the host longer
HEAD_START = 5_000_000
# more than any GPU's cache holds
CACHE_BYTES = 256 * 2**20
MILLISECONDS = 200.0

# milliseconds of a call
Timer = Callable[[Callable[[], object]], float]
Candidate = Tile | str


class Calls(NamedTuple):
    """What is timed: a forward, and the backward of it alone."""

    forward: Callable[[], object]
    backward: Callable[[], object]


class Trials(NamedTuple):
    """What is tried for one kernel, or as the backward's form, and what was measured of it so far."""

    kernel: str
    # that of the table or the rule first
    candidates: list[Candidate]
    # milliseconds of a whole forward or backward; None where it does not fit the GPU
    times: dict[Candidate, float | None]

    @property
    def best(self) -> Candidate | None:
        """The fastest so far."""
        fitting = {candidate: time for candidate, time in self.times.items() if time is not None}
        return min(fitting, key=lambda candidate: fitting[candidate]) if fitting else None


def check_gpu(dtype: torch.dtype = torch.bfloat16, head_dim: int = 64) -> None:
    """Raise ValueError, naming what to do, unless the kernels run on a GPU of this machine."""
    if not torch.cuda.is_available():
        raise ValueError(
            "tune measures on an NVIDIA GPU, and PyTorch sees none here: run it on the machine that will train, with a "
            "CUDA build of PyTorch"
        )
    reason = why_not(torch.device("cuda", torch.cuda.current_device()), dtype, head_dim)
    if reason is not None:
        raise ValueError(f"tune: {reason}")


def problem_here(
    window: int, head_dim: int, group: int, dtype: torch.dtype, score_function: str, rotary: bool = False
) -> Problem:
    """Return a problem on the current GPU; a window is at most as long as the sequence."""
    capability, name = torch.cuda.get_device_capability(), torch.cuda.get_device_name()
    return Problem(window, head_dim, group, dtype, score_function == "softmax", capability, True, name, rotary)


def tune(
    calls: Calls,
    problem: Problem,
    kernels: tuple[str, ...],
    path: Path,
    measure: Timer | None = None,
    report: Callable[[Trials], None] = lambda trials: None,
) -> dict[str, Candidate]:
    """Try the candidates of some kernels on one call and write the fastest to a file, beside what it holds already.

    Set the environment's SWAT_LM_TILES to the file's path to use it. The kernels are tuned one after another, each with
    the best of those before it, and the file is written after each: an interruption keeps what was finished.

    Args:
        calls: `call_for` the problem.
        problem: of that call.
        kernels: names from KERNELS, tuned in its order: "backward form" compares the forms on the tiles found before.
        path: a JSON file, made or extended.
        measure: milliseconds of a call; by the GPU's own clock when None.
        report: called before the first measurement of a kernel and after every one.

    Raises:
        ValueError: there is no GPU to measure, a kernel's name is not known, `path` holds something else, or a kernel
            fits the GPU with no tile; five products, which nobody must take, may fit with none.
    """
    if not problem.hardware:
        raise ValueError("tune: there is nothing to measure under Triton's interpreter; run it on an NVIDIA GPU")
    unknown = set(kernels) - set(KERNELS)
    if unknown:
        raise ValueError(f"kernels: expected some of {'; '.join(KERNELS)}; got {'; '.join(sorted(unknown))}")
    # before minutes of measuring, not after
    known = read_tuned(path) if path.exists() else {}
    timer = _bench if measure is None else measure
    best: dict[str, Candidate] = {}
    for kernel in (kernel for kernel in KERNELS if kernel in kernels):
        trials = Trials(kernel, _candidates(kernel, problem), {})
        report(trials)
        run = calls.forward if kernel == "forward" else calls.backward
        for candidate in trials.candidates:
            trials.times[candidate] = _time(run, timer, _being_measured({**best, kernel: candidate}, kernel, problem))
            report(trials)
        if trials.best is not None:
            best[kernel] = trials.best
            # after every kernel: what is measured is kept
            write_text(path, json.dumps({**known, **_by_key(best, problem)}, indent=1, sort_keys=True) + "\n")
            # this process may have read the file as it was
            forget_tuned()
        elif kernel != FIVE_PRODUCTS:
            raise ValueError(f"tune: no tile of the kernel {kernel!r} fits this GPU")
    return best


def _candidates(kernel: str, problem: Problem) -> list[Candidate]:
    """The choice without a file first, so that it stays where nothing is faster."""
    if kernel == FORM:
        return sorted(BACKWARD_FORMS, key=lambda form: form != rule_form(problem))
    return list(dict.fromkeys([table_tile(kernel, problem), *CANDIDATES[kernel]]))


def _being_measured(choices: dict[str, Candidate], kernel: str, problem: Problem) -> Tuned:
    """The choices, and of the backward the form that the kernel belongs to."""
    form = {FIVE_PRODUCTS: BACKWARD_FORMS[1], "forward": None}.get(kernel, BACKWARD_FORMS[0])
    return _by_key(choices if form is None else {FORM: form, **choices}, problem)


def _by_key(choices: dict[str, Candidate], problem: Problem) -> Tuned:
    return {tuned_key(kernel, problem): choice for kernel, choice in choices.items()}


def _time(run: Callable[[], object], measure: Timer, tuned: Tuned) -> float | None:
    from triton.runtime.errors import OutOfResources, PTXASError

    with using_tuned(tuned):
        try:
            return measure(run)
        except (OutOfResources, PTXASError):
            return None


def _bench(run: Callable[[], object]) -> float:
    """Median milliseconds of the GPU alone, with a cold cache every time."""
    # compiles
    run()
    torch.cuda.synchronize()
    cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device="cuda")
    count = min(max(int(MILLISECONDS / max(_clock(run, cache), 1e-3)), 5), 30)
    return statistics.median(_clock(run, cache) for _ in range(count))


def _clock(run: Callable[[], object], cache: torch.Tensor) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cache.zero_()
    torch.cuda._sleep(HEAD_START)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def call_for(
    problem: Problem,
    num_tokens: int,
    num_heads: int,
    batch: int = 1,
    score_bias: float = 0.0,
    packed: bool = False,
) -> Calls:
    """Return the forward and the backward of random tensors that are such a problem, for `tune`.

    Args:
        problem: its window is at most `num_tokens`: a longer one is another problem to the kernels.
        num_tokens, num_heads, batch: of the call.
        score_bias: decides, as in the contract, how weights are computed.
        packed: as for packed documents, which kernels of their own serve; here each sequence is one.
    """
    # not above: `CANDIDATES` and the file need no triton
    from swat_lm.ops.calls import AttentionCall
    from swat_lm.ops.rotary import rotary_angles
    from swat_lm.ops.triton.backward import backward
    from swat_lm.ops.triton.forward import forward

    if problem.window > num_tokens:
        raise ValueError(f"problem: expected a window of at most num_tokens ({num_tokens}), got {problem.window}")
    device = "cuda" if problem.hardware else "cpu"
    heads = (num_heads, *[num_heads // problem.group] * 2)
    query, key, value = (
        torch.randn((batch, num_tokens, count, problem.head_dim), dtype=problem.dtype, device=device) for count in heads
    )
    first = torch.zeros((batch, num_tokens), dtype=torch.int32, device=device) if packed else None
    positions = torch.arange(num_tokens, device=device).unsqueeze(0)
    angles = rotary_angles(positions, problem.head_dim) if problem.rotary else (None, None)
    call = AttentionCall(
        query, key, value, problem.window, "softmax" if problem.softmax else "sigmoid", problem.head_dim**-0.5,
        slopes=-torch.rand(num_heads, device=device) / 8, bias=score_bias, first_visible=first, cos=angles[0],
        sin=angles[1], backend="triton",
    )  # fmt: skip
    results = forward(call)
    # as a model's call would save them
    saved = call._replace(query=results.rotated_query, key=results.rotated_key) if problem.rotary else call
    grad_output = torch.randn_like(results.output)
    return Calls(lambda: forward(call), lambda: backward(saved, grad_output, None, results.output, results.lse, False))


__all__ = [
    "BACKWARD",
    "CANDIDATES",
    "KERNELS",
    "TILES_VARIABLE",
    "Calls",
    "Trials",
    "call_for",
    "check_gpu",
    "problem_here",
    "tune",
]
