"""How every benchmark measures: candidates take turns in one run, medians of rounds, ratios round by round.

Nothing is reported unless the operator's tests are green. `benchmarks/record.py` says where results go.
"""

import gc
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
REPOSITORY = Path(__file__).parent.parent
# as PyTorch, Python and the C++ runtime say it
OUT_OF_MEMORY = ("can't allocate memory", "MemoryError", "std::bad_alloc", "Cannot allocate memory")
# whose versions a result names, where they are installed
VERSIONS = (
    "torch", "triton", "transformers", "local-attention", "flash-attn", "flash-attn-3", "flash-attn-4",
    "flash-linear-attention", "flash-sigmoid",
)  # fmt: skip
# begins every measured process. Linux counts the peak of the memory that a process has had since its start or since 5
# was written to clear_refs; getrusage's peak would begin with that of the process that started it
MARK = """
_base = 0

def _status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

def _peak():
    return _status("VmHWM:")

def mark():
    global _base
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    _base = _status("VmRSS:")

"""


@dataclass(frozen=True)
class Timing:
    """Seconds of one candidate, one number per round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The figure to quote."""
        return statistics.median(self.seconds)

    def times_faster_than(self, other: "Timing") -> float:
        """Median over rounds of the other's time divided by ours: drift of the machine cancels in each round."""
        return statistics.median(o / s for s, o in zip(self.seconds, other.seconds, strict=True))


class DoesNotFitError(MemoryError):
    """A measured process asked for more memory than it was given."""


def wall_clock(run: Callable[[], Any]) -> float:
    """Seconds of one run by the process's clock."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def processor_clock(run: Callable[[], Any]) -> float:
    """Seconds that processors worked on one run, all threads together: what waits for a busy machine does not count.

    On a machine that others use, caches that they empty still cost time, but not their turns on its cores.
    """
    begin = time.process_time()
    run()
    return time.process_time() - begin


def cuda_clock(run: Callable[[], Any], head_start: int = 0) -> float:
    """Seconds between two events on the GPU, one before and one after what the run queues there.

    For `head_start` cycles of its own clock the GPU waits before the first event, while the host queues: what is timed
    is then the GPU's work and not the host's, as long as all of it is queued by then.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if head_start:
        torch.cuda._sleep(head_start)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def take_turns(
    candidates: Mapping[str, Callable[[], Any]],
    rounds: int = 5,
    warm_up: bool = True,
    clock: Callable[[Any], float] = wall_clock,
) -> dict[str, Timing]:
    """Time all candidates once per round, each round in another order, after one warm-up of each.

    Without `warm_up` the caller has warmed them already, on a shorter input. `clock` runs one and returns its seconds.
    """
    names = list(candidates)
    for name in names if warm_up else ():
        clock(candidates[name])
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            gc.collect()
            seconds[name].append(clock(candidates[name]))
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def peak_memory(code: str, limit: int | None = None, threads: int | None = None) -> int:
    """Run Python code in a process of its own; returns the bytes its peak rose above where `mark()` was called (Linux).

    Args:
        code: calls `mark()` when all is in place that does not count.
        limit: bytes of address space the process may take.
        threads: PyTorch's threads; all cores when None.

    Raises:
        DoesNotFitError: the process needs more than `limit`, or the system ended it for its memory.
        RuntimeError: the code failed otherwise; the message ends with its traceback.
    """
    prelude = MARK
    if limit is not None:
        prelude += f"import resource\nresource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}))\n"
    if threads is not None:
        prelude += f"import torch\ntorch.set_num_threads({threads})\n"
    run = subprocess.run(
        [sys.executable, "-c", f"{prelude}{code}\nprint('PEAK', _peak() - _base)\n"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode == -signal.SIGKILL or any(sign in run.stderr for sign in OUT_OF_MEMORY):
        allowed = "there is" if limit is None else f"{limit / 2**30:.0f} GiB"
        raise DoesNotFitError(f"needs more memory than {allowed}")
    if run.returncode:
        raise RuntimeError(f"the measured process failed:\n{run.stderr[-2000:]}")
    return int(run.stdout.rsplit("PEAK", 1)[1])


def require_green_tests(*paths: str) -> None:
    """Refuse to measure code whose tests are red."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *paths],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if run.returncode:
        raise SystemExit(f"no figures from red tests ({', '.join(paths)}):\n{run.stdout[-2000:]}")


def goal(text: str, wanted: float, measured: float) -> dict[str, Any]:
    """One line of the list of goals, decided by the numbers."""
    return {"goal": text, "wanted": wanted, "measured": round(measured, 3), "reached": measured >= wanted}


def machine() -> dict[str, Any]:
    """Describe where and with what a figure was measured."""
    # a new record is no change of the code
    measured = ["git", "status", "--porcelain", "--", "swat_lm", "benchmarks", ":!benchmarks/results"]
    status = subprocess.run(measured, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    return {
        # two generations may have one name; what PyTorch's own kernels use of them tells them apart
        "processor": f"{_processor()} ({torch.backends.cpu.get_cpu_capability()})",
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in VERSIONS},
        "commit": commit.stdout.strip()[:12] + ("+changes" if status.stdout.strip() else ""),
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
