"""SPADE's bottom layer beside a layer of windowed attention: forward and backward of one layer, time and memory.

    python -m benchmarks.spade_cpu [--quick] [--lengths 2048] [--record]

Width 256, one thread and its processor's seconds, fp32, a softmax window of 512 with a relative bias in both. "kept":
A, B and dt are frozen, so what follows from them is kept from step to step; "anew": they are trained, so all is made in
every step. Making the taps alone, forward and backward, stands apart, by powers of the discrete matrix and by Cauchy
sums.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from benchmarks import measure
from benchmarks.layer_steps import LayerStep, Row, Script, built, growth, peak, take_turns
from swat_lm.layers import Layer

WINDOW, STATE = 512, 64
BATCHES = (1, 8)
FROZEN = {"transition_rate": 0.0, "entry_rate": 0.0, "step_rate": 0.0}
LAYERS: dict[str, dict[str, Any]] = {
    "window": {"kind": "attention", "relative_bias": "own"},
    "spade kept": {"kind": "spade", "relative_bias": "own", "state_size": STATE, **FROZEN},
    "spade anew": {"kind": "spade", "relative_bias": "own", "state_size": STATE},
    "spade anew, cauchy": {"kind": "spade", "relative_bias": "own", "state_size": STATE, "taps": "cauchy"},
}
# at most so many times a window layer: kept, and at batch 8 made anew
KEPT, ANEW, LINEAR = 2.2, 3.0, 1.15


def layer(name: str) -> Layer:
    """One of them."""
    return built(LAYERS[name], sliding_window=WINDOW, score_function="softmax", slopes="none", use_rotary=False)


def taps_of(name: str, length: int) -> Callable[[], None]:
    """Making the taps of a layer, and their gradient."""
    module = layer(name)

    def run() -> None:
        module.self_attn.ssm.taps(length).sum().backward()  # type: ignore[union-attr,operator]
        module.zero_grad(set_to_none=True)

    return run


def compare(batch: int, length: int, rounds: int) -> list[Row]:
    """All layers in turns."""
    timings = take_turns({name: LayerStep(layer(name), length, batch) for name in LAYERS}, rounds)
    row: Row = {"length": length, "batch": batch, "rounds": rounds}
    row |= {f"{name} s": timing.median for name, timing in timings.items()}
    window = timings["window"]
    row |= {
        f"{name} / window": 1 / timing.times_faster_than(window) for name, timing in timings.items() if name != "window"
    }
    for name in ("window", "spade kept", "spade anew"):
        row[f"{name} MiB"] = round(peak("spade_cpu", f"layer({name!r})", length, batch) / 2**20)
    return [row]


def making(length: int, rounds: int) -> list[Row]:
    """The taps alone, in turns."""
    names = ("spade kept", "spade anew", "spade anew, cauchy")
    timings = take_turns({name: taps_of(name, length) for name in names}, rounds)
    return [{"taps": length, "rounds": rounds, **{f"{name} s": timing.median for name, timing in timings.items()}}]


def judge(rows: list[Row]) -> list[Row]:
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
        for name in ("window", "spade kept"):
            for unit, what in (("s", "time"), ("MiB", "memory")):
                slope = growth({length: row[f"{name} {unit}"] for length, row in one.items()})
                found.append(measure.goal(f"{name}: linear in T, 1 / the slope of log {what}", 1 / LINEAR, 1 / slope))
    return found


def tasks(lengths: tuple[int, ...], quick: bool) -> Mapping[str, Callable[[], list[Row]]]:
    """At each length a comparison with one row and with several, and the taps."""
    found: dict[str, Callable[[], list[Row]]] = {}
    rounds = 2 if quick else 3
    for length in lengths:
        found |= {f"T {length}, batch {batch}": partial(compare, batch, length, rounds) for batch in BATCHES}
        found[f"taps {length}"] = partial(making, length, rounds)
    return found


main = Script(
    "spade_cpu", __doc__, ("tests/ops/test_structured_state.py", "tests/layers/test_spade.py"),
    {"window": WINDOW, "state size": STATE}, (2048, 16384), tasks, judge,
).main  # fmt: skip

if __name__ == "__main__":
    main()
