"""SPARSEK's and ECP's layers beside layers of windowed attention that see as much: forward and backward, on a CPU.

    python -m benchmarks.selection_cpu [--quick] [--record]

One layer of width 256 in fp32, batch 1, on one thread. SPARSEK with k + W = 256, split in two ways, beside a softmax
window of 256; ECP with segments of m = 128 beside one of 2m. Seconds are the process's own, without those that it waits
for a core. Growth is the exponent between the two lengths: of seconds, or bytes, that go as T to the power of it.
"""

import argparse
import math
import sys
from typing import Any

import torch

from benchmarks import measure, record
from benchmarks.rows import Rows
from swat_lm import SwatConfig
from swat_lm.layers import Layer
from swat_lm.layers.chunk import Chunk
from swat_lm.model.building import build_layers, shared_by

WIDTH, FEED_FORWARD, HEADS, SEEN = 256, 704, 4, 256
LENGTHS = (2048, 16384)
LAYERS: dict[str, dict[str, Any]] = {
    "window": {"kind": "attention", "score_function": "softmax", "slopes": "none", "sliding_window": SEEN},
    "sparsek 64": {"kind": "sparsek", "k": SEEN // 4, "sliding_window": SEEN - SEEN // 4},
    "sparsek 128": {"kind": "sparsek", "k": SEEN // 2, "sliding_window": SEEN // 2},
    "ecp": {"kind": "ecp", "segment": SEEN // 2},
}
# at most so many times a window layer's time, and growth
MOST = {"sparsek 64": 1.5, "sparsek 128": 1.5, "ecp": 1.1}
LINEAR = 1.15


class Step:
    """Forward and backward of a layer on one row."""

    def __init__(self, name: str, length: int) -> None:
        torch.manual_seed(0)
        config = SwatConfig(
            vocab_size=64, hidden_size=WIDTH, intermediate_size=FEED_FORWARD, num_hidden_layers=1,
            num_attention_heads=HEADS, layers=[LAYERS[name]],
        )  # fmt: skip
        layer = build_layers(config)[0][0]
        assert isinstance(layer, Layer)
        layer.init_weights(shared_by(config))
        self.layer = layer.train()
        self.hidden = torch.randn(1, length, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
        self.positions = torch.arange(length)[None]

    def __call__(self) -> None:
        """Gradients of everything, and none kept."""
        self.layer(self.hidden, Chunk(self.positions)).hidden.sum().backward()
        self.layer.zero_grad(set_to_none=True)
        self.hidden.grad = None


def peak(name: str, length: int) -> int:
    """Bytes that a step adds to a process that holds layer and row."""
    code = (
        "from benchmarks.selection_cpu import Step\n"
        f"Step({name!r}, 512)()\nstep = Step({name!r}, {length})\nmark()\nstep()\n"
    )
    return measure.peak_memory(code, threads=1)


def compare(length: int, rounds: int) -> dict[str, Any]:
    """All layers in turns at one length."""
    timings = measure.take_turns({name: Step(name, length) for name in LAYERS}, rounds, clock=measure.processor_clock)
    window = timings["window"]
    row: dict[str, Any] = {"length": length, "rounds": rounds}
    row |= {f"{name} s": timing.median for name, timing in timings.items()}
    row |= {f"{name} / window": 1 / timings[name].times_faster_than(window) for name in MOST}
    row |= {f"{name} MiB": round(peak(name, length) / 2**20) for name in LAYERS}
    sys.stdout.write(f"{row}\n")
    return row


def growth(rows: list[dict[str, Any]], column: str) -> float:
    """The exponent between the least and the greatest length."""
    short, long = min(rows, key=lambda row: row["length"]), max(rows, key=lambda row: row["length"])
    return math.log(long[column] / short[column]) / math.log(long["length"] / short["length"])


def judge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The goals: ratios turned so that more is better."""
    found = [
        measure.goal(f"{name}, T {row['length']}: a window layer's time", 1 / most, 1 / row[f"{name} / window"])
        for row in rows
        for name, most in MOST.items()
    ]
    if len(rows) > 1:
        found += [
            measure.goal(f"{name}: linear in T, 1 / growth of {what}", 1 / LINEAR, 1 / growth(rows, f"{name} {unit}"))
            for name in MOST
            for what, unit in (("seconds", "s"), ("bytes", "MiB"))
        ]
    return found


def main() -> None:
    """Measure, judge the goals, save and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short length, fewer rounds; nothing is saved")
    parser.add_argument("--record", action="store_true", help=record.HELP)
    arguments = parser.parse_args()
    if arguments.quick and arguments.record:
        parser.error("--record goes without --quick, whose results are not saved")
    torch.set_num_threads(1)
    measure.require_green_tests("tests/ops/test_selected.py", "tests/ops/test_capped_simplex.py")
    settings = {"width": WIDTH, "heads": HEADS, "seen": SEEN, "dtype": "float32", "step": "forward, backward"}
    kept = None if arguments.quick else Rows("selection_cpu", settings)
    lengths, rounds = ((1024,), 3) if arguments.quick else (LENGTHS, 5)
    rows = []
    for length in lengths:
        rows.append(
            compare(length, rounds)
            if kept is None
            else kept.measured(f"T {length}", lambda length=length: compare(length, rounds))
        )
    goals = judge(rows)
    for line in goals:
        sys.stdout.write(f"{'reached' if line['reached'] else 'MISSED '}  {line['goal']}: {line['measured']}\n")
    if kept is not None:
        sys.stdout.write(record.finish(record.save("selection_cpu", rows, goals, settings), arguments.record))
        kept.forget()


if __name__ == "__main__":
    main()
