"""SPARSEK's and ECP's layers beside layers of windowed attention that see as much: forward and backward, on a CPU.

    python -m benchmarks.selection_cpu [--quick] [--lengths 2048] [--record]

One layer of width 256 in fp32, batch 1, on one thread. SPARSEK with k + W = 256, split in two ways, beside a softmax
window of 256; ECP with segments of m = 128 beside one of 2m. Seconds are the process's own, without those that it waits
for a core. Growth is the exponent between the two lengths: of seconds, or bytes, that go as T to the power of it.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from benchmarks import measure
from benchmarks.layer_steps import LayerStep, Row, Script, built, growth, peak, take_turns
from swat_lm.layers import Layer

SEEN = 256
LAYERS: dict[str, dict[str, Any]] = {
    "window": {"kind": "attention", "score_function": "softmax", "slopes": "none", "sliding_window": SEEN},
    "sparsek 64": {"kind": "sparsek", "k": SEEN // 4, "sliding_window": SEEN - SEEN // 4},
    "sparsek 128": {"kind": "sparsek", "k": SEEN // 2, "sliding_window": SEEN // 2},
    "ecp": {"kind": "ecp", "segment": SEEN // 2},
}
# at most so many times a window layer's time, and growth
MOST = {"sparsek 64": 1.5, "sparsek 128": 1.5, "ecp": 1.1}
LINEAR = 1.15


def layer(name: str) -> Layer:
    """One of them."""
    return built(LAYERS[name])


def compare(length: int, rounds: int) -> list[Row]:
    """All layers in turns at one length."""
    timings = take_turns({name: LayerStep(layer(name), length) for name in LAYERS}, rounds)
    row: Row = {"length": length, "rounds": rounds}
    row |= {f"{name} s": timing.median for name, timing in timings.items()}
    row |= {f"{name} / window": 1 / timings[name].times_faster_than(timings["window"]) for name in MOST}
    row |= {f"{name} MiB": round(peak("selection_cpu", f"layer({name!r})", length) / 2**20) for name in LAYERS}
    return [row]


def judge(rows: list[Row]) -> list[Row]:
    """The goals: ratios turned so that more is better."""
    found = [
        measure.goal(f"{name}, T {row['length']}: a window layer's time", 1 / most, 1 / row[f"{name} / window"])
        for row in rows
        for name, most in MOST.items()
    ]
    if len(rows) > 1:
        found += [
            measure.goal(
                f"{name}: linear in T, 1 / growth of {what}",
                1 / LINEAR,
                1 / growth({row["length"]: row[f"{name} {unit}"] for row in rows}),
            )
            for name in MOST
            for what, unit in (("seconds", "s"), ("bytes", "MiB"))
        ]
    return found


def tasks(lengths: tuple[int, ...], quick: bool) -> Mapping[str, Callable[[], list[Row]]]:
    """A comparison at each length."""
    return {f"T {length}": partial(compare, length, 3 if quick else 5) for length in lengths}


main = Script(
    "selection_cpu", __doc__, ("tests/ops/test_selected.py", "tests/ops/test_capped_simplex.py"), {"seen": SEEN},
    (2048, 16384), tasks, judge,
).main  # fmt: skip

if __name__ == "__main__":
    main()
