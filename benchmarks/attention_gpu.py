"""The operator on an NVIDIA GPU beside every peer that is installed, and beside the card's own rates.

    python -m benchmarks.attention_gpu [--quick] [--record]

Milliseconds are medians of rounds in which all candidates take turns over rotating inputs. FLOPs are useful ones: pairs
inside the window only. Products and memory are a large bfloat16 product and a large copy on the same card in the same
run; the roof is the slower of the two for the task at hand. A candidate whose result is wrong gets no figures.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure, record
from benchmarks.gpu import comparison, decoding, training, work
from benchmarks.gpu.device import CudaDevice, Device, Roof, measure_roof, peak_flops
from benchmarks.gpu.peers import OURS, OURS_SOFTMAX, PEERS, Peer, flex
from benchmarks.gpu.shapes import FULL, QUICK, TASKS, Plan, Shape

QUICK_SECONDS = 8 * 60
NEEDS = "attention_gpu needs an NVIDIA GPU and a CUDA build of PyTorch: run it on a machine where nvidia-smi works"


@dataclass
class Report:
    """What a run has found so far."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    goals: list[dict[str, Any]] = field(default_factory=list)
    details: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    """Our own kernels and settings that have no figures, and why."""

    def add(self, row: dict[str, Any], details: dict[str, Any]) -> None:
        """Keep a row and print it."""
        self.rows.append(row)
        self.details.append({"row": len(self.rows) - 1, **details})
        shown = (f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items())
        say(" ".join(shown))
        for name, reason in details.get("absent", {}).items():
            say(f"  without {name}: {reason}")
            if name.startswith((OURS, OURS_SOFTMAX)):
                self.wrong.append(f"{name}, {row.get('task')}, {row.get('shape')}: {reason}")


def main(arguments: list[str] | None = None) -> int:
    """Measure, judge the goals, save and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few shapes, no search for tiles, no test run, 8 minutes")
    parser.add_argument("--record", action="store_true", help=record.HELP)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.stderr.write(f"{NEEDS}\n")
        return 2
    deadline = time.monotonic() + QUICK_SECONDS if options.quick else None
    if not options.quick:
        # a quick run trusts the verification of every candidate: the tests alone would take its time
        measure.require_green_tests("tests/ops", "-m", "gpu")
    return run(CudaDevice(), QUICK if options.quick else FULL, deadline, options.record)


def run(
    device: Device,
    plan: Plan,
    deadline: float | None = None,
    to_record: bool = False,
    peers: Mapping[str, Peer] = PEERS,
    step_peers: Mapping[str, decoding.StepPeer] = decoding.STEP_PEERS,
    measure_training: Callable[..., Any] = training.compare_training,
) -> int:
    """Measure a plan and save it; 1 where one of our kernels was wrong."""
    described = device.describe()
    roof, peak = measure_roof(device), peak_flops(described["name"])
    say(f"{described['name']}: product {roof.flops_per_second / 1e12:.0f} TFLOP/s, "
        f"copy {roof.bytes_per_second / 1e9:.0f} GB/s")  # fmt: skip
    report = Report()
    longest: dict[str, float] = {}
    # one of each kind first: a run that is out of time leaves out more of the same
    for kind, size, part in _alternate(
        [("attention", shape, lambda shape=shape: _attention(report, shape, device, roof, peers, plan))
         for shape in plan.attention],
        [("decode", shape, lambda shape=shape: _decoding(report, shape, device, roof, step_peers, plan))
         for shape in plan.decode],
        [("training step", size,
          lambda size=size: _training(report, size, device, roof, peak, plan, measure_training))
         for size in plan.training],
    ):  # fmt: skip
        begin = time.monotonic()
        # a part takes as long as the longest of its kind so far
        if deadline is not None and begin + longest.get(kind, 0.0) > deadline:
            report.left_out.append(f"{kind} {size}")
            continue
        try:
            part()
        except comparison.peer_failures() as error:
            # what does not even fit the memory takes no other part with it
            report.wrong.append(f"{kind} {size}: {comparison.one_line(error)}")
            device.free()
        longest[kind] = max(longest.get(kind, 0.0), time.monotonic() - begin)
        # after every part: a long run that is interrupted keeps what it has
        save(report, plan, described, roof, finished=False)
    path = save(report, plan, described, roof)
    for line in report.goals:
        say(f"{'reached' if line['reached'] else 'MISSED '}  {line['goal']}: {line['measured']}")
    for line in report.wrong:
        sys.stderr.write(f"no figures for {line}\n")
    say(record.finish(path, to_record).rstrip())
    return 1 if report.wrong else 0


def save(report: Report, plan: Plan, described: dict[str, Any], roof: Roof, finished: bool = True) -> Path:
    """Write what was found so far."""
    rows = [dict(row) for row in report.rows]
    fill_columns(rows)
    settings = {
        "plan": "quick" if plan == QUICK else "full" if plan == FULL else "other",
        "dtype": "bfloat16",
        "rounds": plan.rounds,
        "compilers search for tiles": plan.thorough,
        "product TFLOP/s": roof.flops_per_second / 1e12,
        "copy GB/s": roof.bytes_per_second / 1e9,
        "left out for want of time": "; ".join(report.left_out) or "nothing",
        "failed": "; ".join(report.wrong) or "nothing",
    }
    if not finished:
        settings["interrupted"] = True
    more = {
        "gpu": described, "lines": True, "details": report.details, "kind": "quick" if plan == QUICK else "",
    }  # fmt: skip
    return record.save("attention_gpu", rows, report.goals, settings, **more)


def _attention(report: Report, shape: Shape, device: Device, roof: Roof, peers: Mapping[str, Peer], plan: Plan) -> None:
    results = comparison.compare(shape, TASKS, device, peers, plan.rounds, plan.thorough)
    dense = _dense_rates(shape, device, plan) if shape.window >= 1024 and "FlexAttention" in peers else {}
    for task, result in results.items():
        row = comparison.make_row(shape, task, result, roof, OURS)
        report.add(row, result.details())
        if "ms" not in row:
            continue
        where = f"{task}, {shape}"
        if "times FlexAttention" in row:
            report.goals.append(measure.goal(f"{where}: times FlexAttention", 1.0, row["times FlexAttention"]))
        if shape.window <= 256:
            report.goals.append(measure.goal(f"{where}: share of memory", 0.7, row["share of memory"]))
        if task in dense:
            executed = row["TFLOP/s"] / work.useful_share(shape, *ROWS_AND_KEYS)
            share = executed * 1e12 / dense[task]
            report.goals.append(measure.goal(f"{where}: share of a dense kernel's executed rate", 0.95, share))


# of the square tiles that both rates are counted with
ROWS_AND_KEYS = (64, 64)


def _dense_rates(shape: Shape, device: Device, plan: Plan) -> dict[str, float]:
    """Executed FLOPs per second of FlexAttention without a window, the dense Triton kernel at hand, by task."""
    whole = Shape(shape.batch, shape.heads, shape.kv_heads, shape.length, shape.length, shape.head_dim, shape.dtype)
    found = comparison.compare(whole, TASKS, device, {"FlexAttention": flex}, plan.rounds, plan.thorough)
    share = work.useful_share(whole, *ROWS_AND_KEYS)
    return {
        task: work.useful_flops(whole, task) / share / result.timings["FlexAttention"].median
        for task, result in found.items()
        if "FlexAttention" in result.timings
    }


def _decoding(
    report: Report, shape: Shape, device: Device, roof: Roof, peers: Mapping[str, decoding.StepPeer], plan: Plan
) -> None:
    result = decoding.compare_steps(shape, device, peers, plan.rounds)
    row = comparison.make_row(shape, "decode", result, roof, OURS)
    report.add(row, result.details())
    if shape.batch >= 64 and "ms" in row:
        goal = f"decode, {shape}: share of memory"
        report.goals.append(measure.goal(goal, 1 / 1.3, row["share of memory"]))


def _training(
    report: Report,
    size: tuple[int, int],
    device: Device,
    roof: Roof,
    peak: float | None,
    plan: Plan,
    measure_training: Callable[..., Any],
) -> None:
    rows, absent = measure_training(*size, device, roof, peak, plan.rounds)
    for index, row in enumerate(rows):
        report.add(row, {"absent": absent if index == 0 else {}})


Part = tuple[str, Any, Callable[[], None]]


def _alternate(*kinds: list[Part]) -> Iterator[Part]:
    for index in range(max(len(kind) for kind in kinds)):
        for kind in kinds:
            if index < len(kind):
                yield kind[index]


def fill_columns(rows: list[dict[str, Any]]) -> None:
    """Give rows of one kind the same columns in the same order: one table of the page instead of many."""
    for kind in ("shape", "training step"):
        own = [row for row in rows if kind in row]
        columns = {column: None for row in own for column in row}
        for row in own:
            found = dict(row)
            row.clear()
            row.update({column: found.get(column) for column in columns})


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
