"""LongVQ (reconstruction) beside a layer of windowed attention: forward and backward of one layer, time and memory.

    python -m benchmarks.longvq_cpu [--quick] [--lengths 2048] [--record]

Width 256, one thread, fp32, batch 1: 256 codes and blocks of 128, so that two blocks are as near as a softmax window of
256 is. Parts stand beside the whole: without a state space, and without attention. Growth is the exponent between two
lengths: of seconds that go as T to the power of it.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from benchmarks import measure
from benchmarks.layer_steps import LayerStep, Row, Script, built, growth, peak, take_turns
from swat_lm.layers import Layer

WINDOW = 256
LONGVQ = {"kind": "longvq", "codes": 256, "block": WINDOW // 2}
LAYERS: dict[str, dict[str, Any]] = {
    "window": {"kind": "attention"},
    "longvq": LONGVQ,
    "without a state space": {**LONGVQ, "ssm": "none"},
    "without attention": {"kind": "longvq", "attention": "none"},
}
LINEAR = 1.1


def layer(name: str) -> Layer:
    """One of them."""
    return built(LAYERS[name], sliding_window=WINDOW, score_function="softmax", slopes="none")


def compare(length: int, rounds: int) -> list[Row]:
    """All layers in turns, and what two of them add to memory."""
    timings = take_turns({name: LayerStep(layer(name), length) for name in LAYERS}, rounds)
    row: Row = {"length": length, "rounds": rounds}
    row |= {f"{name} s": timing.median for name, timing in timings.items()}
    row["longvq / window"] = 1 / timings["longvq"].times_faster_than(timings["window"])
    for name in ("window", "longvq"):
        row[f"{name} MiB"] = round(peak("longvq_cpu", f"layer({name!r})", length) / 2**20)
    return [row]


def judge(rows: list[Row]) -> list[Row]:
    """Time and memory go with the length, from the shortest to the longest."""
    if len(rows) < 2:
        return []
    return [
        measure.goal(
            f"longvq: {what} linear in T, 1 / its slope",
            1 / LINEAR,
            1 / growth({row["length"]: row[f"longvq {unit}"] for row in rows}),
        )
        for unit, what in (("s", "time"), ("MiB", "memory"))
    ]


def tasks(lengths: tuple[int, ...], quick: bool) -> Mapping[str, Callable[[], list[Row]]]:
    """A comparison at each length."""
    return {f"T {length}": partial(compare, length, 2 if quick else 3) for length in lengths}


main = Script(
    "longvq_cpu", __doc__, ("tests/ops/test_quantised_attention.py", "tests/layers/test_longvq.py"),
    {"window": WINDOW}, (2048, 8192, 16384), tasks, judge,
).main  # fmt: skip

if __name__ == "__main__":
    main()
