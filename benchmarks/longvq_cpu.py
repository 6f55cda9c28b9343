"""LongVQ (reconstruction) beside a layer of windowed attention: forward and backward of one layer, time and memory.

    python -m benchmarks.longvq_cpu [--quick] [--record]

Width 256, one thread, fp32, batch 1: 256 codes and blocks of 128, so that two blocks are as near as a softmax window of
256 is. Parts stand beside the whole: without a state space, and without attention. Growth is the exponent between two
lengths: of seconds that go as T to the power of it.
"""

import argparse
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure, record
from benchmarks.rows import Rows
from swat_lm import SwatConfig
from swat_lm.layers.base import Layer
from swat_lm.layers.chunk import Chunk
from swat_lm.model.building import build_layers, shared_by

LENGTHS, WIDTH, WINDOW = (2048, 8192, 16384), 256, 256
LONGVQ = {"kind": "longvq", "codes": 256, "block": WINDOW // 2}
LAYERS: dict[str, dict[str, Any]] = {
    "window": {"kind": "attention"},
    "longvq": LONGVQ,
    "without a state space": {**LONGVQ, "ssm": "none"},
    "without attention": {"kind": "longvq", "attention": "none"},
}
SLOPE = 1.1


def step_of(name: str, length: int) -> Callable[[], None]:
    """Forward and backward of a layer over a row, its auxiliary loss included."""
    torch.manual_seed(0)
    config = SwatConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=704, num_hidden_layers=1, num_attention_heads=4,
        sliding_window=WINDOW, score_function="softmax", slopes="none", layers=[LAYERS[name]],
    )  # fmt: skip
    layer = build_layers(config)[0][0]
    assert isinstance(layer, Layer)
    layer.init_weights(shared_by(config))
    layer.train()
    hidden, chunk = torch.randn(1, length, WIDTH, requires_grad=True), Chunk(torch.arange(length)[None])

    def run() -> None:
        output = layer(hidden, chunk, None)
        total: Tensor = output.hidden.sum()
        for loss, divisor in output.auxiliary.losses.values():
            total = total + loss / divisor
        total.backward()
        layer.zero_grad(set_to_none=True)
        hidden.grad = None

    return run


def compare(length: int, rounds: int) -> dict[str, Any]:
    """All layers in turns, and what each adds to memory."""
    timings = measure.take_turns({name: step_of(name, length) for name in LAYERS}, rounds)
    row: dict[str, Any] = {"length": length, "rounds": rounds}
    row |= {f"{name} s": timing.median for name, timing in timings.items()}
    row["longvq / window"] = 1 / timings["longvq"].times_faster_than(timings["window"])
    for name in ("window", "longvq"):
        code = f"from benchmarks.longvq_cpu import step_of\nrun = step_of({name!r}, {length})\nmark()\nrun()\n"
        row[f"{name} MiB"] = round(measure.peak_memory(code, threads=1) / 2**20)
    sys.stdout.write(f"{row}\n")
    return row


def judge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Time and memory go with the length, from the shortest to the longest."""
    first, last = rows[0], rows[-1]
    if first["length"] == last["length"]:
        return []
    found = []
    for name, what in (("longvq s", "time"), ("longvq MiB", "memory")):
        slope = math.log(last[name] / first[name]) / math.log(last["length"] / first["length"])
        found.append(measure.goal(f"{what} linear in T, 1 / its slope", 1 / SLOPE, 1 / slope))
    return found


def main() -> None:
    """Measure, judge the goals, save and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short length, fewer rounds; results are not saved")
    parser.add_argument("--record", action="store_true", help=record.HELP)
    arguments = parser.parse_args()
    if arguments.quick and arguments.record:
        parser.error("--record goes without --quick, whose results are not saved")
    torch.set_num_threads(1)
    measure.require_green_tests("tests/ops/test_quantised_attention.py", "tests/layers/test_longvq.py")
    settings = {"width": WIDTH, "window": WINDOW, "dtype": "float32", "step": "forward, backward"}
    kept = None if arguments.quick else Rows("longvq_cpu", settings)
    lengths, rounds = ((1024,), 2) if arguments.quick else (LENGTHS, 3)
    rows = []
    for length in lengths:
        run = partial(compare, length, rounds)
        rows.append(run() if kept is None else kept.measured(f"T {length}", run))
    goals = judge(rows)
    for line in goals:
        sys.stdout.write(f"{'reached' if line['reached'] else 'MISSED '}  {line['goal']}: {line['measured']}\n")
    if kept is not None:
        sys.stdout.write(record.finish(record.save("longvq_cpu", rows, goals, settings), arguments.record))
        kept.forget()


if __name__ == "__main__":
    main()
