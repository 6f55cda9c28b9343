"""SPADE's bottom layer beside a layer of windowed attention: forward and backward of one layer, time and memory.

    python -m benchmarks.spade_cpu [--quick] [--lengths 2048] [--record]

Width 256, one thread and its processor's seconds, fp32, a softmax window of 512 with a relative bias in both. "kept":
A, B and dt are frozen, so what follows from them is kept from step to step; "anew": they are trained, so all is made in
every step. Making the taps alone, forward and backward, stands apart, by powers of the discrete matrix and by Cauchy
sums.
"""

import argparse
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks import measure, record
from benchmarks.rows import Rows
from swat_lm import SwatConfig
from swat_lm.layers.base import Layer
from swat_lm.layers.chunk import Chunk
from swat_lm.model.building import build_layers, shared_by

LENGTHS, WIDTH, WINDOW, STATE = (2048, 16384), 256, 512, 64
BATCHES = (1, 8)
FROZEN = {"transition_rate": 0.0, "entry_rate": 0.0, "step_rate": 0.0}
LAYERS: dict[str, dict[str, Any]] = {
    "window": {"kind": "attention", "relative_bias": "own"},
    "spade kept": {"kind": "spade", "relative_bias": "own", "state_size": STATE, **FROZEN},
    "spade anew": {"kind": "spade", "relative_bias": "own", "state_size": STATE},
    "spade anew, cauchy": {"kind": "spade", "relative_bias": "own", "state_size": STATE, "taps": "cauchy"},
}
# of one thread, so that a machine that others use can be measured on
CLOCK = measure.processor_clock
# at most so many times a window layer: kept, and at batch 8 made anew
KEPT, ANEW, SLOPE = 2.2, 3.0, 1.15


def built(entry: dict[str, Any]) -> nn.Module:
    """One layer, ready to train."""
    torch.manual_seed(0)
    config = SwatConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=704, num_hidden_layers=1, num_attention_heads=4,
        sliding_window=WINDOW, score_function="softmax", slopes="none", use_rotary=False, layers=[entry],
    )  # fmt: skip
    layer = build_layers(config)[0][0]
    assert isinstance(layer, Layer)
    layer.init_weights(shared_by(config))
    return layer.train()


def step_of(name: str, batch: int, length: int) -> Callable[[], None]:
    """Forward and backward of a layer over rows of this length."""
    layer, hidden = built(LAYERS[name]), torch.randn(batch, length, WIDTH, requires_grad=True)
    chunk = Chunk(torch.arange(length)[None])

    def run() -> None:
        layer(hidden, chunk).hidden.sum().backward()
        layer.zero_grad(set_to_none=True)
        hidden.grad = None

    return run


def taps_of(name: str, length: int) -> Callable[[], None]:
    """Making the taps of a layer, and their gradient."""
    layer = built(LAYERS[name])

    def run() -> None:
        layer.self_attn.ssm.taps(length).sum().backward()  # type: ignore[union-attr,operator]
        layer.zero_grad(set_to_none=True)

    return run


def peak(name: str, batch: int, length: int) -> int:
    """Bytes that a step adds at most to what lies there before it."""
    code = f"from benchmarks.spade_cpu import step_of\nrun = step_of({name!r}, {batch}, {length})\nmark()\nrun()\n"
    return measure.peak_memory(code, threads=1)


def compare(batch: int, length: int, rounds: int) -> dict[str, Any]:
    """All layers in turns."""
    timings = measure.take_turns({name: step_of(name, batch, length) for name in LAYERS}, rounds, clock=CLOCK)
    row: dict[str, Any] = {"length": length, "batch": batch, "rounds": rounds}
    row |= {f"{name} s": timing.median for name, timing in timings.items()}
    window = timings["window"]
    row |= {
        f"{name} / window": 1 / timing.times_faster_than(window) for name, timing in timings.items() if name != "window"
    }
    row |= {f"{name} MiB": round(peak(name, batch, length) / 2**20) for name in ("window", "spade kept", "spade anew")}
    sys.stdout.write(f"{row}\n")
    return row


def making(length: int, rounds: int) -> dict[str, Any]:
    """The taps alone, in turns."""
    names = ("spade kept", "spade anew", "spade anew, cauchy")
    timings = measure.take_turns({name: taps_of(name, length) for name in names}, rounds, clock=CLOCK)
    row = {"taps": length, "rounds": rounds, **{f"{name} s": timing.median for name, timing in timings.items()}}
    sys.stdout.write(f"{row}\n")
    return row


def judge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The goals: ratios turned so that more is better."""
    found = []
    for row in rows:
        if "batch" not in row:
            continue
        where = f"T {row['length']}, batch {row['batch']}"
        found.append(measure.goal(f"{where}, kept: a window layer's time", 1 / KEPT, 1 / row["spade kept / window"]))
        if row["batch"] == max(BATCHES):
            found.append(
                measure.goal(f"{where}, anew: a window layer's time", 1 / ANEW, 1 / row["spade anew / window"])
            )
    one = {row["length"]: row for row in rows if row.get("batch") == 1}
    if len(one) > 1:
        shortest, longest = min(one), max(one)
        for name in ("window", "spade kept"):
            for unit, what in (("s", "time"), ("MiB", "memory")):
                grown = one[longest][f"{name} {unit}"] / one[shortest][f"{name} {unit}"]
                slope = math.log(grown) / math.log(longest / shortest)
                found.append(measure.goal(f"{name}: linear in T, 1 / the slope of log {what}", 1 / SLOPE, 1 / slope))
    return found


def main() -> None:
    """Measure, judge the goals, save and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short length, fewer rounds; results are not saved")
    parser.add_argument("--lengths", type=int, nargs="+", choices=LENGTHS, default=LENGTHS, help="leave others out")
    parser.add_argument("--record", action="store_true", help=record.HELP)
    arguments = parser.parse_args()
    if arguments.quick and arguments.record:
        parser.error("--record goes without --quick, whose results are not saved")
    torch.set_num_threads(1)
    measure.require_green_tests("tests/ops/test_structured_state.py", "tests/layers/test_spade.py")
    settings = {"width": WIDTH, "window": WINDOW, "state_size": STATE, "dtype": "float32", "step": "forward, backward",
                "seconds": "of one processor"}  # fmt: skip
    kept = None if arguments.quick else Rows("spade_cpu", settings)
    lengths, rounds = ((1024,), 2) if arguments.quick else (sorted(arguments.lengths), 3)
    rows = []
    for length in lengths:
        tasks = {f"T {length}, batch {batch}": partial(compare, batch, length, rounds) for batch in BATCHES}
        tasks[f"taps {length}"] = partial(making, length, rounds)
        for label, run in tasks.items():
            rows.append(run() if kept is None else kept.measured(label, run))
    goals = judge(rows)
    for line in goals:
        sys.stdout.write(f"{'reached' if line['reached'] else 'MISSED '}  {line['goal']}: {line['measured']}\n")
    if kept is not None:
        sys.stdout.write(record.finish(record.save("spade_cpu", rows, goals, settings), arguments.record))
        if set(arguments.lengths) == set(LENGTHS):
            kept.forget()


if __name__ == "__main__":
    main()
